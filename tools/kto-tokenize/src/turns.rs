//! Which of a conversation's assistant turns are trained on (`--train-on`).
//!
//! A turn is a run of assistant messages. Each trained turn is a row of its own: all messages before it are its prompt,
//! so what users, tools and the system say is never trained on, and kto-train computes a prompt that rows share once.

use crate::args::TrainOn;
use kto_cli::{Error, Result};
use kto_formats::chat;
use serde_json::Value;
use std::{iter, ops::Range};

/// Returns the places of the completions in `messages`, the first `prompt` of which are the record's prompt.
/// Errors (65): a row that holds no assistant turn to train on.
pub fn trained(messages: &[Value], prompt: usize, on: TrainOn) -> Result<Vec<Range<usize>>> {
    let turns = || runs(messages).into_iter().filter(|turn| turn.start > 0);
    match on {
        TrainOn::Completion => Ok(iter::once(prompt..messages.len()).collect()),
        TrainOn::Last => match turns().next_back().filter(|turn| turn.end > prompt) {
            Some(turn) => Ok(vec![turn]),
            None => Err(Error::data("the completion has no assistant message to train on")),
        },
        TrainOn::All => match turns().collect::<Vec<_>>() {
            none if none.is_empty() => Err(Error::data("no assistant message to train on behind the first")),
            turns => Ok(turns),
        },
    }
}

/// The runs of assistant messages, in order.
fn runs(messages: &[Value]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, _) in messages.iter().enumerate().filter(|(_, m)| chat::role(m) == "assistant") {
        match runs.last_mut() {
            Some(run) if run.end == i => run.end = i + 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

/// Joins a completion to the assistant's message that the prompt ends with. Returns false when the prompt ends
/// otherwise. Errors (65): one of the two is not plain text.
pub fn join(messages: &mut Vec<Value>, prompt: usize) -> Result<bool> {
    if messages.get(prompt - 1).map(chat::role) != Some("assistant") {
        return Ok(false);
    }
    let text = |message: &Value| message.get("content").and_then(Value::as_str).map(str::to_string);
    let open = text(&messages[prompt - 1]);
    let next = messages.get(prompt).filter(|m| chat::role(m) == "assistant").and_then(text);
    let (Some(open), Some(next)) = (open, next) else {
        return Err(Error::data(
            "an answer can be continued when it and the first message of the completion are the assistant's text",
        ));
    };
    // The completion's message may call tools; what the prompt began is its text.
    messages[prompt]["content"] = Value::String(open + &next);
    messages.remove(prompt - 1);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chat(roles: &str) -> Vec<Value> {
        let name = |c| match c {
            'u' => "user",
            't' => "tool",
            's' => "system",
            _ => "assistant",
        };
        roles.chars().map(|c| json!({"role": name(c), "content": c.to_string()})).collect()
    }

    #[test]
    fn each_turn_is_a_row() {
        let one = |turn: Range<usize>| Ok::<Vec<_>, String>(iter::once(turn).collect());
        let of = |roles: &str, prompt, on| trained(&chat(roles), prompt, on).map_err(|e| e.to_string());
        assert_eq!(of("suauata", 4, TrainOn::Completion), one(4..7));
        assert_eq!(of("suauata", 4, TrainOn::Last), one(6..7));
        assert_eq!(of("suauata", 4, TrainOn::All), Ok(vec![2..3, 4..5, 6..7]));
        assert_eq!(of("uaa", 1, TrainOn::Last), one(1..3));
        assert_eq!(of("auaat", 2, TrainOn::All), one(2..4));
        assert!(of("uau", 2, TrainOn::Last).is_err());
        assert!(of("uu", 1, TrainOn::All).is_err());
    }

    #[test]
    fn an_open_answer_and_its_end_are_one_message() {
        let mut messages = chat("uaa");
        assert!(join(&mut messages, 2).unwrap());
        assert_eq!(messages, [chat("u")[0].clone(), json!({"role": "assistant", "content": "aa"})]);
        assert!(!join(&mut chat("ua"), 1).unwrap());
        assert!(join(&mut chat("uau"), 2).is_err());
        let mut call = chat("uaa");
        call[1]["content"] = json!([{"type": "text", "text": "x"}]);
        assert!(join(&mut call, 2).is_err());
    }
}
