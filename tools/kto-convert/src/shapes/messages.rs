//! A dialogue and a label (LLaMA-Factory's KTO form, ShareGPT with `kto_tag`, logs with a thumb): the last assistant turns are
//! the completion, all before them the prompt. Also ms-swift's pair: a dialogue and another answer.

use super::{
    Fields, Rules, Side, Unit,
    content::{chat_content, parse_cell, turns},
    split_chat, votes, within,
};
use crate::problem::Problem;
use kto_formats::record::Content;

/// `messages` with a label.
pub fn convert(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    labelled(row, rules, "messages", "messages")
}

/// `conversations` with a label.
pub fn share_gpt(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    labelled(row, rules, "conversations", "sharegpt")
}

fn labelled(
    row: &mut Fields,
    rules: &Rules<'_>,
    field: &'static str,
    shape: &'static str,
) -> Result<Unit, Problem> {
    if rules.table {
        parse_cell(row, field)?;
    }
    let mut turns = with_system(row, field)?;
    let label = rules.labels.take(row, rules.table)?;
    let completion = turns.split_off(within(split_chat::last_run(&turns), field)?);
    let side = Side { prompt: Content::Chat(turns), completion: Content::Chat(completion), label };
    Ok(Unit::one(shape, side))
}

/// ShareGPT keeps the system text in a column of its own.
fn with_system(row: &mut Fields, field: &str) -> Result<Vec<serde_json::Value>, Problem> {
    let mut turns = chat_content(row, field)?;
    if let Some(text) = row.get("system").and_then(|v| v.as_str()) {
        if !text.is_empty() && kto_formats::chat::role(&turns[0]) != "system" {
            turns.insert(0, super::content::turn("system", text.to_owned()));
        }
        row.shift_remove("system");
    }
    Ok(turns)
}

/// `conversations` without the answer, `chosen`, `rejected` (LLaMA-Factory's ranking).
pub fn share_gpt_pair(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let prompt = with_system(row, "conversations")?;
    answers(row, rules, prompt, ("chosen", "rejected"), "sharegpt pair")
}

/// `messages` with the chosen answer as its last turn, `rejected_response` or `rejected_messages`.
pub fn swift(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let mut prompt = with_system(row, "messages")?;
    if row.contains_key("rejected_messages") {
        let rejected = chat_content(row, "rejected_messages")?;
        return split_chat::pair("messages and rejected", prompt, rejected, rules.keep_differing);
    }
    let chosen = prompt.split_off(within(split_chat::last_run(&prompt), "messages")?);
    let rejected = turns(row, "rejected_response", "assistant")?;
    within(split_chat::ends_with_assistant(&rejected), "rejected_response")?;
    Ok(Unit::answers("messages and rejected", prompt, chosen, rejected))
}

/// OpenAI's preference form: `input` with messages and tools, `preferred_output`, `non_preferred_output`.
pub fn open_ai(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let mut input = match row.shift_remove("input") {
        Some(serde_json::Value::Object(input)) => input,
        Some(other) => Fields::from_iter([("messages".to_owned(), other)]),
        None => Fields::new(),
    };
    let prompt = chat_content(&mut input, "messages")?;
    input.shift_remove("parallel_tool_calls");
    if let Some(tools) = input.shift_remove("tools").filter(|t| t.as_array().is_some_and(|t| !t.is_empty())) {
        row.entry("tools").or_insert(tools);
    }
    let names = ["preferred_output", "preferred_completion"];
    let chosen = names.into_iter().find(|n| row.contains_key(*n)).unwrap_or(names[0]);
    let rejected = if chosen == names[0] { "non_preferred_output" } else { "non_preferred_completion" };
    answers(row, rules, prompt, (chosen, rejected), "openai preference")
}

/// LLaMA-Factory's v1 form: two whole dialogues.
pub fn v1(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let chosen = chat_content(row, "chosen_messages")?;
    let rejected = chat_content(row, "rejected_messages")?;
    split_chat::pair("chosen and rejected messages", chosen, rejected, rules.keep_differing)
}

fn answers(
    row: &mut Fields,
    rules: &Rules<'_>,
    prompt: Vec<serde_json::Value>,
    (chosen, rejected): (&str, &str),
    shape: &'static str,
) -> Result<Unit, Problem> {
    votes::margin(row, rules)?;
    let mut side = |field: &str| {
        let said = turns(row, field, "assistant")?;
        within(super::join::replies_only(&said), field)?;
        Ok(said)
    };
    let (chosen, rejected) = (side(chosen)?, side(rejected)?);
    Ok(Unit::answers(shape, prompt, chosen, rejected))
}
