//! The shapes of preference rows and the one table that decides between them.
//!
//! Called for every row: the shape of one row says nothing about the next. A new shape is a file beside this one and a
//! line in [`SHAPES`]; the first line whose fields are all there wins.

mod advice;
mod implicit;
mod join;
mod messages;
mod paired;
mod split_chat;
mod split_text;
mod unpaired;

use crate::{
    labels::Labels,
    problem::{Problem, Reason},
};
use kto_cli::{Context, Error};
use kto_formats::{
    chat,
    json::quoted,
    record::{Content, columns},
};
use serde_json::{Map, Value};

/// A row's fields while they are taken apart; what is left over is carried along.
pub type Fields = Map<String, Value>;

/// What a shape may ask.
pub struct Rules<'a> {
    /// How the label is found and read.
    pub labels: &'a Labels,
    /// Cells are text, so words stand for bools.
    pub table: bool,
    /// Sides of a pair with different prompts keep each their own.
    pub keep_differing: bool,
    /// `--split-after`: ends the prompt of a text pair.
    pub split_after: Option<&'a str>,
}

/// One completion of a row.
#[derive(Debug, PartialEq)]
pub struct Side {
    /// What the model is given.
    pub prompt: Content,
    /// What it said.
    pub completion: Content,
    /// Whether that is desirable.
    pub label: bool,
}

/// A row in KTO's terms.
#[derive(Debug)]
pub struct Unit {
    /// The shape's name in the summary.
    pub shape: &'static str,
    /// One side, or two: chosen, rejected.
    pub sides: Vec<Side>,
    /// The sides of the pair have different prompts.
    pub differ: bool,
    /// Text beside messages: the text was made a message, or the repeated prompt was taken away.
    pub mixed: bool,
}

impl Unit {
    fn one(shape: &'static str, side: Side) -> Self {
        Self { shape, sides: vec![side], differ: false, mixed: false }
    }

    fn pair(shape: &'static str, chosen: (Content, Content), rejected: (Content, Content)) -> Self {
        let side = |(prompt, completion), label| Side { prompt, completion, label };
        Self { shape, sides: vec![side(chosen, true), side(rejected, false)], differ: false, mixed: false }
    }
}

/// A shape: which fields make it, and how they become completions.
struct Shape {
    /// All of these are there and not null.
    needs: &'static [&'static str],
    /// There must be a label as well.
    labelled: bool,
    convert: fn(&mut Fields, &Rules<'_>) -> Result<Unit, Problem>,
}

/// The dispatch table, more telling shapes first.
const SHAPES: [Shape; 4] = [
    Shape { needs: &["prompt", "completion"], labelled: true, convert: unpaired::convert },
    Shape { needs: &["prompt", "chosen", "rejected"], labelled: false, convert: paired::convert },
    Shape { needs: &["chosen", "rejected"], labelled: false, convert: implicit::convert },
    Shape { needs: &["messages"], labelled: true, convert: messages::convert },
];

/// Fields that hint at a shape when no shape is complete: its own error says what is missing.
const SIGNS: [(&str, usize); 5] =
    [("completion", 0), ("chosen", 2), ("rejected", 2), ("messages", 3), ("prompt", 0)];

/// Takes the completions of a row out of its fields.
pub fn convert(row: &mut Fields, rules: &Rules<'_>) -> Result<Unit, Problem> {
    let has = |field: &str| row.get(field).is_some_and(|v| !v.is_null());
    let complete = SHAPES
        .iter()
        .find(|s| s.needs.iter().all(|f| has(f)) && (!s.labelled || rules.labels.is_known_for(row)));
    let likely =
        || SIGNS.iter().find(|(field, _)| row.contains_key(*field)).map(|(_, shape)| &SHAPES[*shape]);
    let Some(shape) = complete.or_else(likely) else {
        let error = Error::data(format!("no known shape{}", columns(row)));
        let usual = || "--map prompt=COLUMN,completion=COLUMN,label=COLUMN names the columns".into();
        return Err(Reason::UnknownShape.error(error.with_hint(advice::hint(row).unwrap_or_else(usual))));
    };
    missing(shape, row, rules)?;
    let foreign = shape.needs.iter().find_map(|field| advice::share_gpt(field, row.get(*field)?));
    (shape.convert)(row, rules).map_err(|problem| match foreign {
        Some(hint) => problem.reason.error(problem.error.with_hint(hint)),
        None => problem,
    })
}

/// Names the first field that a shape needs and the row has not, beside those that it has.
fn missing(shape: &Shape, row: &Fields, rules: &Rules<'_>) -> Result<(), Problem> {
    if let Some(field) = shape.needs.iter().find(|f| !row.contains_key(**f)) {
        let what = format!("field {} is missing{}", quoted(field), columns(row));
        let usual = || format!("--map {field}=COLUMN names the column that holds it");
        let hint = advice::hint(row).unwrap_or_else(usual);
        return Err(Reason::MissingField.error(Error::data(what).with_hint(hint)));
    }
    if shape.labelled { rules.labels.missing(row) } else { Ok(()) }
}

/// Takes a field as text or checked messages. A single message is a list of one; text parts are joined.
fn content(row: &mut Fields, field: &str) -> Result<Content, Problem> {
    let mut value = row.shift_remove(field).unwrap_or_default();
    if value.is_object() {
        value = Value::Array(vec![value]);
    }
    let parts = value.as_array().is_some_and(|m| m.iter().any(has_foreign_part));
    let reason = if parts { Reason::Multimodal } else { Reason::Content };
    let mut content = Content::from_value(field, value).map_err(reason.because())?;
    if let Content::Chat(messages) = &mut content {
        messages.iter_mut().for_each(join_parts);
    }
    Ok(content)
}

/// Takes a field as checked messages.
fn chat_content(row: &mut Fields, field: &str) -> Result<Vec<Value>, Problem> {
    match content(row, field)? {
        Content::Chat(messages) => Ok(messages),
        Content::Text(text) => {
            let what = format!("field {} must be a message list, found {}", quoted(field), quoted(&text));
            Err(Reason::Content.says(what))
        }
    }
}

fn has_foreign_part(message: &Value) -> bool {
    let parts = message.get("content").and_then(Value::as_array);
    parts
        .is_some_and(|p| p.iter().any(|p| p.get("type").and_then(Value::as_str).is_some_and(|t| t != "text")))
}

/// `[{"type": "text", "text": …}, …]` becomes one text, which every chat template can render.
fn join_parts(message: &mut Value) {
    let Some(content) = message.get_mut("content") else { return };
    if let Value::Array(parts) = content {
        let text: String = parts.iter().filter_map(|p| p.get("text").and_then(Value::as_str)).collect();
        *content = Value::String(text);
    }
}

/// True for turns that a completion may consist of.
fn is_reply(message: &Value) -> bool {
    matches!(chat::role(message), "assistant" | "tool" | "function" | "ipython" | "environment")
}

/// Says where in the row a problem of a message list is.
fn within<T>(result: Result<T, Problem>, field: &str) -> Result<T, Problem> {
    result.or_else(|p| Err(p.error).at(format_args!("field {}", quoted(field))).map_err(p.reason.because()))
}

#[cfg(test)]
mod tests;
