//! TRL's unpaired form: prompt, completion, label. Also kto-mix, whose completion repeats the prompt.

use super::{Fields, Rules, Side, Unit, content::content, join};
use crate::problem::{Problem, Reason};
use kto_formats::record::Content;

pub fn convert(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let prompt = content(row, "prompt")?;
    let completion = content(row, "completion")?;
    let label = rules.labels.take(row, rules.table)?;
    let joined = join::join(prompt, completion, "completion")?;
    let shape = name(&joined.prompt, "unpaired text", "unpaired conversational");
    let mut unit = Unit::one(shape, Side { prompt: joined.prompt, completion: joined.completion, label });
    unit.mixed = joined.mixed;
    Ok(unit)
}

/// Picks the shape's name by what the prompt is.
pub fn name(prompt: &Content, text: &'static str, chat: &'static str) -> &'static str {
    if matches!(prompt, Content::Text(_)) { text } else { chat }
}

/// Refuses a prompt of no characters.
pub fn not_empty(prompt: &Content) -> Result<(), Problem> {
    match prompt {
        Content::Text(text) if text.is_empty() => Err(Reason::NoPrompt.says("field \"prompt\" is empty")),
        _ => Ok(()),
    }
}
