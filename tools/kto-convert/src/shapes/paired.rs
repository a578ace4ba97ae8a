//! TRL's explicit pairs: prompt, chosen, rejected. Also UltraFeedback's, whose sides repeat the prompt.

use super::{Fields, Rules, Unit, content::content, implicit, join, split_chat, unpaired::name, votes};
use crate::problem::Problem;
use kto_formats::record::Content;

pub fn convert(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    votes::margin(row, rules)?;
    // UltraFeedback's table says the chosen dialogue twice.
    if row.get("messages").is_some_and(|messages| Some(messages) == row.get("chosen")) {
        row.shift_remove("messages");
    }
    let prompt = content(row, "prompt")?;
    let chosen = content(row, "chosen")?;
    let rejected = content(row, "rejected")?;
    let (chosen, rejected) = match (chosen, rejected) {
        (Content::Chat(c), Content::Chat(r))
            if join::is_whole(&prompt, &c) && join::is_whole(&prompt, &r) =>
        {
            let mut unit = split_chat::pair("paired conversational", c, r, rules.keep_differing)?;
            unit.mixed = true;
            return Ok(unit);
        }
        sides => sides,
    };
    if matches!(prompt, Content::Text(_)) && is_text(&chosen) != is_text(&rejected) {
        return Err(implicit::unlike(is_text(&chosen)));
    }
    let chosen = join::join(prompt.clone(), chosen, "chosen")?;
    let rejected = join::join(prompt, rejected, "rejected")?;
    let shape = name(&chosen.prompt, "paired text", "paired conversational");
    let (mixed, differ) = (chosen.mixed || rejected.mixed, chosen.prompt != rejected.prompt);
    if differ && !rules.keep_differing {
        return Err(split_chat::differ());
    }
    let mut unit =
        Unit::pair(shape, (chosen.prompt, chosen.completion), (rejected.prompt, rejected.completion));
    (unit.mixed, unit.differ) = (mixed, differ);
    Ok(unit)
}

fn is_text(content: &Content) -> bool {
    matches!(content, Content::Text(_))
}
