//! Instruction data: a question in a column of some name, with or without a system text, a history, an input; answered by
//! a pair (Orca, LLaMA-Factory's alpaca ranking, axolotl's dpo) or by one labelled text (Alpaca, axolotl's kto, ratings).

use super::{
    Fields, Rules, Side, Unit,
    content::{checked, turn, turns, turns_of},
    is_reply, split_chat, within,
};
use crate::problem::{Problem, Reason};
use kto_formats::{chat, json::quoted, record::Content};
use serde_json::Value;

/// Columns of a question, in the order in which they are asked.
pub const QUESTIONS: [&str; 6] = ["question", "instruction", "prompt", "query", "input", "user_input"];
/// Columns of an answer.
pub const ANSWERS: [&str; 6] = ["completion", "response", "output", "answer", "generation", "text_output"];
/// Columns of the better and of the worse answer.
pub const CHOSEN: [&str; 3] = ["chosen", "chosen_response", "preferred"];
pub const REJECTED: [&str; 3] = ["rejected", "rejected_response", "dispreferred"];

/// The first of the columns that a row has.
pub fn first(row: &Fields, columns: &[&'static str]) -> Option<&'static str> {
    columns.iter().copied().find(|c| super::table::has(row, c))
}

/// Takes the question: system, history, instruction and input as turns, the last one of the user.
pub fn question(row: &mut Fields) -> Result<Vec<Value>, Problem> {
    let missing = || Reason::MissingField.says(format!("none of the fields {}", QUESTIONS.join(", ")));
    let column = first(row, &QUESTIONS).ok_or_else(missing)?;
    let mut asked = Vec::new();
    for name in ["system", "system_prompt"] {
        if let Some(Value::String(text)) = row.shift_remove(name)
            && !text.is_empty()
        {
            asked.push(turn("system", text));
        }
    }
    history(row, &mut asked)?;
    match row.shift_remove(column).unwrap_or_default() {
        Value::String(mut text) => {
            if let Some(Value::String(input)) = more(row, column)
                && !input.is_empty()
            {
                text = if text.is_empty() { input } else { format!("{text}\n{input}") };
            }
            if text.is_empty() {
                return Err(Reason::NoPrompt.says(format!("field {} is empty", quoted(column))));
            }
            asked.push(turn("user", text));
        }
        messages => asked.extend(turns_of(column, messages, "user")?),
    }
    checked(column, asked)
}

/// The input of an instruction, or the query of a prompt.
fn more(row: &mut Fields, column: &str) -> Option<Value> {
    match column {
        "instruction" => row.shift_remove("input"),
        "prompt" => row.shift_remove("query"),
        _ => None,
    }
}

/// Alpaca's earlier rounds: a list of (question, answer).
fn history(row: &mut Fields, asked: &mut Vec<Value>) -> Result<(), Problem> {
    let Some(Value::Array(rounds)) = row.get("history") else { return Ok(()) };
    for round in rounds {
        let text = |i: usize| round.get(i).and_then(Value::as_str).map(str::to_owned);
        let (Some(question), Some(answer)) = (text(0), text(1)) else {
            return Err(Reason::Content.says("field \"history\" must be a list of (question, answer)"));
        };
        asked.extend([turn("user", question), turn("assistant", answer)]);
    }
    row.shift_remove("history");
    Ok(())
}

/// Takes an answer as turns that the model says.
pub fn answer(row: &mut Fields, column: &str, asked: &mut Vec<Value>) -> Result<Vec<Value>, Problem> {
    let mut said = turns(row, column, "assistant")?;
    if !said.iter().all(is_reply) {
        // The whole dialogue once more: what it adds is the answer.
        let at = within(split_chat::last_run(&said), column)?;
        let answer = said.split_off(at);
        let same =
            said.iter().rfind(|m| chat::role(m) == "user") == asked.iter().rfind(|m| chat::role(m) == "user");
        if !same {
            let what = format!("field {}: a dialogue that is not about the question", quoted(column));
            return Err(Reason::Content.says(what));
        }
        *asked = said;
        return Ok(answer);
    }
    within(split_chat::ends_with_assistant(&said), column)?;
    Ok(said)
}

/// Question, chosen, rejected.
pub fn pair(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let (chosen, rejected) = (first(row, &CHOSEN), first(row, &REJECTED));
    let (Some(chosen), Some(rejected)) = (chosen, rejected) else {
        return Err(Reason::MissingField.says("field \"chosen\" or \"rejected\" is missing"));
    };
    let shape = if row.contains_key("system") || row.contains_key("question") {
        "question and pair"
    } else {
        "instruction and pair"
    };
    let mut asked = question(row)?;
    let mut other = asked.clone();
    let chosen = answer(row, chosen, &mut asked)?;
    let rejected = answer(row, rejected, &mut other)?;
    let differ = asked != other;
    if differ && !rules.keep_differing {
        return Err(split_chat::differ());
    }
    let chat = |turns| Content::Chat(turns);
    let mut unit = Unit::pair(shape, (chat(asked), chat(chosen)), (chat(other), chat(rejected)));
    unit.differ = differ;
    Ok(unit)
}

/// Question, answer, label.
pub fn one(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let missing = || Reason::MissingField.says(format!("none of the fields {}", ANSWERS.join(", ")));
    let column = first(row, &ANSWERS).ok_or_else(missing)?;
    rules.labels.missing(row)?;
    let label = rules.labels.take(row, rules.table)?;
    let mut asked = question(row)?;
    let completion = Content::Chat(answer(row, column, &mut asked)?);
    let side = Side { prompt: Content::Chat(asked), completion, label };
    Ok(Unit::one("question and answer", side))
}
