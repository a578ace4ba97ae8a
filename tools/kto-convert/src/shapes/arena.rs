//! Votes between two models: the Chatbot Arena's conversations, and its table with prompts and responses as lists.

use super::{
    Fields, Rules, Side, Unit,
    content::{chat_content, parse_cell},
    split_chat,
    votes::{number, said},
};
use crate::problem::{Problem, Reason};
use kto_formats::{
    json::{describe, quoted},
    record::Content,
};
use serde_json::Value;

/// What the voter said.
enum Winner {
    A,
    B,
    Tie,
    BothBad,
}

/// `conversation_a`, `conversation_b`, `winner`.
pub fn conversations(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let winner = match row.shift_remove("winner") {
        Some(Value::String(word)) => match word.as_str() {
            "model_a" | "a" | "A" => Winner::A,
            "model_b" | "b" | "B" => Winner::B,
            "tie" => Winner::Tie,
            "tie (bothbad)" | "both_bad" | "bothbad" => Winner::BothBad,
            other => {
                let what = format!("field \"winner\": unknown value {}", quoted(other));
                return Err(Reason::Label.says(what));
            }
        },
        Some(Value::Null) | None => return Err(Reason::NoRating.says("field \"winner\" is null")),
        Some(other) => {
            return Err(
                Reason::Label.says(format!("field \"winner\" must be text, found {}", describe(&other)))
            );
        }
    };
    for field in ["conversation_a", "conversation_b"] {
        parse_cell(row, field)?;
    }
    let a = chat_content(row, "conversation_a")?;
    let b = chat_content(row, "conversation_b")?;
    vote(winner, a, b, rules)
}

/// `prompt`, `response_a`, `response_b` as lists of texts (or JSON texts of such), `winner_model_a`, `winner_model_b`, `winner_tie`.
pub fn table(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let mut won = |name: &str| row.shift_remove(name).as_ref().and_then(number) == Some(1.0);
    let winner = match (won("winner_model_a"), won("winner_model_b"), won("winner_tie")) {
        (true, false, false) => Winner::A,
        (false, true, false) => Winner::B,
        (false, false, _) => Winner::Tie,
        _ => return Err(Reason::Label.says("more than one winner")),
    };
    for field in ["prompt", "response_a", "response_b"] {
        parse_cell(row, field)?;
    }
    let prompts = texts(row, "prompt");
    let a = rounds(&prompts, &texts(row, "response_a"), "response_a")?;
    let b = rounds(&prompts, &texts(row, "response_b"), "response_b")?;
    vote(winner, a, b, rules)
}

fn texts(row: &mut Fields, field: &str) -> Vec<Value> {
    match row.shift_remove(field) {
        Some(Value::Array(list)) => list,
        Some(Value::Null) | None => Vec::new(),
        Some(one) => vec![one],
    }
}

fn rounds(prompts: &[Value], responses: &[Value], field: &str) -> Result<Vec<Value>, Problem> {
    if prompts.is_empty() || prompts.len() != responses.len() {
        let what =
            format!("field {}: {} answers to {} prompts", quoted(field), responses.len(), prompts.len());
        return Err(Reason::Content.says(what));
    }
    let mut turns = Vec::new();
    for (prompt, response) in prompts.iter().zip(responses) {
        turns.push(said("user", prompt, "prompt")?);
        turns.push(said("assistant", response, field)?);
    }
    Ok(turns)
}

/// The two conversations as a pair. Each has its own rounds, so the prompt may differ behind the first.
fn vote(winner: Winner, a: Vec<Value>, b: Vec<Value>, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let shape = "arena";
    match winner {
        Winner::A => split_chat::pair(shape, a, b, rules.keep_differing),
        Winner::B => split_chat::pair(shape, b, a, rules.keep_differing),
        Winner::Tie => Err(Reason::Tie.says("the vote is a tie")),
        Winner::BothBad if rules.both_bad => {
            let side = |mut turns: Vec<Value>| {
                let completion = turns.split_off(split_chat::last_run(&turns)?);
                Ok(Side { prompt: Content::Chat(turns), completion: Content::Chat(completion), label: false })
            };
            Ok(Unit::of(shape, vec![side(a)?, side(b)?]))
        }
        Winner::BothBad => Err(Reason::BothBad.says("the vote calls both answers bad")),
    }
}
