//! A dialogue and a label (LLaMA-Factory's KTO form): the last assistant turns are the completion, all before them the
//! prompt.

use super::{Fields, Rules, Side, Unit, chat_content, split_chat, within};
use crate::problem::{Problem, Reason};
use kto_cli::Error;
use kto_formats::{json, record::Content};
use serde_json::Value;

pub fn convert(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    if rules.table {
        parse_cell(row)?;
    }
    let mut turns = chat_content(row, "messages")?;
    let label = rules.labels.take(row, rules.table)?;
    let completion = turns.split_off(within(split_chat::last_run(&turns), "messages")?);
    let side = Side { prompt: Content::Chat(turns), completion: Content::Chat(completion), label };
    Ok(Unit::one("messages", side))
}

/// A table holds the list as JSON text.
fn parse_cell(row: &mut Fields) -> Result<(), Problem> {
    if let Some(cell) = row.get_mut("messages")
        && let Value::String(text) = cell
    {
        let parsed = json::parse(text.as_bytes());
        let fault = |f: json::Fault| Error::data(format!("column \"messages\" is not JSON: {}", f.what));
        *cell = parsed.map_err(|f| Reason::Content.error(fault(f)))?.value;
    }
    Ok(())
}
