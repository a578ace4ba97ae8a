//! What to do about a row of no known shape: the hints behind the errors of this module.

use super::Fields;
use kto_cli::escape;

/// Words that name the two sides of a pair in column names.
const SIDES: [(&str, &str); 6] = [
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("preferred", "rejected"),
    ("good", "bad"),
    ("better", "worse"),
    ("winner", "loser"),
];

/// Columns that usually hold the prompt.
const PROMPTS: [&str; 4] = ["question", "instruction", "query", "input"];

/// A hint made for the columns of this row, if they look like something.
pub fn hint(row: &Fields) -> Option<String> {
    share_gpt(row).or_else(|| pair(row))
}

/// The `--map` for two columns whose names differ in the words for good and bad only.
fn pair(row: &Fields) -> Option<String> {
    let other = |column: &String| {
        let names = SIDES.iter().filter(|(good, _)| column.contains(good));
        names.map(|(good, bad)| column.replacen(good, bad, 1)).find(|name| row.contains_key(name))
    };
    let (good, bad) = row.keys().find_map(|column| Some((column, other(column)?)))?;
    if (good.as_str(), bad.as_str()) == ("chosen", "rejected") {
        return None;
    }
    let prompt = PROMPTS.iter().find(|name| row.contains_key(**name) && !row.contains_key("prompt"));
    let prompt = prompt.map(|name| format!("prompt={name},")).unwrap_or_default();
    Some(format!("--map {prompt}chosen={},rejected={} names the columns", escape(good), escape(&bad)))
}

/// ShareGPT turns in a column of another name.
fn share_gpt(row: &Fields) -> Option<String> {
    let (column, _) = row.iter().find(|(_, value)| {
        let first = value.as_array().and_then(|list| list.first());
        first.is_some_and(|turn| turn.get("from").is_some() && turn.get("value").is_some())
    })?;
    let plain = column.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    (plain && column != "conversations").then(|| format!("--map messages={column} names the column"))
}
