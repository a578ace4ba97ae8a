//! TRL's implicit prompts: chosen and rejected, each with the prompt in front. Texts (HH-RLHF and others) or messages.

use super::{Fields, Rules, Unit, content::content, dialogue, split_chat, split_text};
use crate::problem::{Problem, Reason};
use kto_formats::record::Content;

pub fn convert(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    match (content(row, "chosen")?, content(row, "rejected")?) {
        (Content::Text(chosen), Content::Text(rejected)) => texts(&chosen, &rejected, rules),
        (Content::Chat(chosen), Content::Chat(rejected)) => {
            split_chat::pair("implicit conversational", chosen, rejected, rules.keep_differing)
        }
        (chosen, _) => Err(unlike(matches!(chosen, Content::Text(_)))),
    }
}

/// The problem of a pair of a text and a message list.
pub fn unlike(chosen_is_text: bool) -> Problem {
    let (text, list) = if chosen_is_text { ("chosen", "rejected") } else { ("rejected", "chosen") };
    Reason::Content.says(format!("\"{text}\" is text and \"{list}\" a message list: both must be alike"))
}

fn texts(chosen: &str, rejected: &str, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let (shape, split) = if let Some(marker) = rules.split_after {
        ("implicit text", split_text::after_marker(chosen, rejected, marker)?)
    } else if split_text::is_dialogue(chosen) && split_text::is_dialogue(rejected) {
        ("implicit text (HH-RLHF)", split_text::dialogue(chosen, rejected)?)
    } else {
        ("implicit text", split_text::plain(chosen, rejected)?)
    };
    if split.differ && !rules.keep_differing {
        return Err(split_chat::differ());
    }
    let (asked, other) = (&chosen[..split.chosen], &rejected[..split.rejected]);
    let (good, bad) = (&chosen[split.chosen..], &rejected[split.rejected..]);
    let text = |prompt: &str, said: &str| (Content::Text(prompt.into()), Content::Text(said.into()));
    let (chosen, rejected) = match (shape.ends_with("(HH-RLHF)") && !rules.dialogue_as_text, split.differ) {
        (false, _) => (text(asked, good), text(other, bad)),
        (true, true) => {
            (dialogue::side(dialogue::prompt(asked), good), dialogue::side(dialogue::prompt(other), bad))
        }
        (true, false) => {
            let prompt = dialogue::prompt(asked);
            (dialogue::side(prompt.clone(), good), dialogue::side(prompt, bad))
        }
    };
    let mut unit = Unit::pair(shape, chosen, rejected);
    unit.differ = split.differ;
    Ok(unit)
}
