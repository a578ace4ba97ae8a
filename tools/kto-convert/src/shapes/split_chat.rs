//! Where the prompt of a dialogue ends.

use super::{Unit, is_reply, within};
use crate::problem::{Problem, Reason};
use kto_cli::Error;
use kto_formats::{chat, record::Content};
use serde_json::Value;

/// Splits a pair of dialogues behind the turns that both sides share, before the last turn of the shorter one.
/// When a user turn is left behind the split, the sides have different prompts: with `keep`, each side is split before
/// its own last assistant turns.
pub fn pair(
    shape: &'static str,
    chosen: Vec<Value>,
    rejected: Vec<Value>,
    keep: bool,
) -> Result<Unit, Problem> {
    let shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    let cut = shared.min(chosen.len().min(rejected.len()) - 1);
    let differ = !chosen[cut..].iter().chain(&rejected[cut..]).all(is_reply);
    let split = |mut turns: Vec<Value>, field: &str| {
        let at = if differ { within(last_run(&turns), field)? } else { cut };
        within(ends_with_assistant(&turns), field)?;
        let completion = turns.split_off(at);
        Ok((Content::Chat(turns), Content::Chat(completion)))
    };
    let (chosen, rejected) = (split(chosen, "chosen")?, split(rejected, "rejected")?);
    if differ && !keep {
        return Err(self::differ());
    }
    if !differ && cut == 0 {
        return Err(
            Reason::NoPrompt.says("\"chosen\" and \"rejected\" share no first turn that could be the prompt")
        );
    }
    let mut unit = Unit::pair(shape, chosen, rejected);
    unit.differ = differ;
    Ok(unit)
}

/// The problem of a pair whose sides answer different prompts.
pub fn differ() -> Problem {
    let error = Error::data("\"chosen\" and \"rejected\" have different prompts");
    Reason::PromptsDiffer
        .error(error.with_hint("--prompts-differ keep gives each side its own, skip leaves such pairs out"))
}

/// Returns the index of the last assistant turns, which end the dialogue.
pub fn last_run(turns: &[Value]) -> Result<usize, Problem> {
    ends_with_assistant(turns)?;
    match turns.iter().rposition(|m| chat::role(m) != "assistant") {
        Some(before) => Ok(before + 1),
        None => Err(Reason::NoPrompt.says("nothing but assistant turns, so there is no prompt")),
    }
}

/// Refuses a dialogue that ends with another's turn.
pub fn ends_with_assistant(turns: &[Value]) -> Result<(), Problem> {
    match turns.last().map(chat::role) {
        Some("assistant") => Ok(()),
        other => {
            let role = other.unwrap_or_default();
            Err(Reason::LastTurn.says(format!("the last turn is of \"{role}\", not of the assistant")))
        }
    }
}
