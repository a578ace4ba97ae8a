//! What to do about a row of no known shape: the hints behind the errors of this module.

use super::Fields;
use kto_cli::escape;
use serde_json::Value;

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
    row.iter().find_map(|(column, value)| share_gpt(column, value)).or_else(|| pair(row))
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

/// What to do about a column of ShareGPT turns, which have `from` and `value`.
pub fn share_gpt(column: &str, value: &Value) -> Option<String> {
    let first = value.as_array()?.first()?;
    let plain = column.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !plain || first.get("from").is_none() || first.get("value").is_none() {
        return None;
    }
    Some(format!(
        "{column} has ShareGPT turns (from, value), which are not read yet; first jq -c '.{column} |= map({{role: \
         ({{human: \"user\", gpt: \"assistant\"}}[.from] // .from), content: .value}})' FILE{}",
        match column {
            "messages" | "chosen" | "rejected" | "prompt" | "completion" => String::new(),
            _ => format!(", then --map messages={column}"),
        }
    ))
}
