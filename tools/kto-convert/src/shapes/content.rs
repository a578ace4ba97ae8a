//! A field as text or messages, whatever the writer called its parts.
//!
//! ShareGPT's `from` and `value` become `role` and `content`, text parts one text, a call of a function written as text the
//! `tool_calls` that chat templates know. Other media are refused with the field's name.

use super::{Fields, tools};
use crate::problem::{Problem, Reason};
use kto_cli::{Context, Error};
use kto_formats::{
    json::{self, quoted},
    record::Content,
};
use serde_json::{Map, Value, json};

/// Takes a field as text or checked messages. A single message is a list of one.
pub fn content(row: &mut Fields, field: &str) -> Result<Content, Problem> {
    let value = row.shift_remove(field).unwrap_or_default();
    from_value(field, value)
}

/// Takes a value as text or checked messages.
pub fn from_value(field: &str, mut value: Value) -> Result<Content, Problem> {
    if value.is_object() {
        value = Value::Array(vec![value]);
    }
    if let Value::Array(messages) = &mut value {
        for (i, message) in messages.iter_mut().enumerate() {
            normalise(message).map_err(|(reason, what)| {
                reason.says(format!("field {}: message {}: {what}", quoted(field), i + 1))
            })?;
        }
    }
    Content::from_value(field, value).map_err(Reason::Content.because())
}

/// Takes a field as checked messages.
pub fn chat_content(row: &mut Fields, field: &str) -> Result<Vec<Value>, Problem> {
    match content(row, field)? {
        Content::Chat(messages) => Ok(messages),
        Content::Text(text) => {
            let what = format!("field {} must be a message list, found {}", quoted(field), quoted(&text));
            Err(Reason::Content.says(what))
        }
    }
}

/// Takes a field as messages; a text is one of `role`.
pub fn turns(row: &mut Fields, field: &str, role: &str) -> Result<Vec<Value>, Problem> {
    let value = row.shift_remove(field).unwrap_or_default();
    turns_of(field, value, role)
}

/// Takes a value as messages; a text is one of `role`.
pub fn turns_of(field: &str, value: Value, role: &str) -> Result<Vec<Value>, Problem> {
    Ok(match from_value(field, value)? {
        Content::Chat(messages) => messages,
        Content::Text(text) => vec![turn(role, text)],
    })
}

/// A message.
pub fn turn(role: &str, content: String) -> Value {
    json!({"role": role, "content": content})
}

/// A cell that holds JSON text becomes what the text says; all else stays.
pub fn parse_cell(row: &mut Fields, field: &str) -> Result<(), Problem> {
    if let Some(cell) = row.get_mut(field)
        && let Value::String(text) = cell
        && text.trim_start().starts_with(['[', '{'])
    {
        let parsed = json::parse(text.as_bytes());
        let fault = |f: json::Fault| Error::data(format!("column {} is not JSON: {}", quoted(field), f.what));
        *cell = parsed.map_err(|f| Reason::Content.error(fault(f)))?.value;
    }
    Ok(())
}

/// Message lists that a table of text holds as JSON become lists; other text that begins so stays text.
pub fn parse_cells(row: &mut Fields) -> Result<(), Problem> {
    let is_messages = |cell: &str| {
        let has = |key: &str| cell.contains(key);
        let named = (has("\"role\"") && has("\"content\"")) || (has("\"from\"") && has("\"value\""));
        cell.trim_start().starts_with(['[', '{']) && named
    };
    for field in ["prompt", "completion", "chosen", "rejected", "messages", "conversations"] {
        if row.get(field).and_then(Value::as_str).is_some_and(is_messages) {
            parse_cell(row, field)?;
        }
    }
    Ok(())
}

type Fault = (Reason, String);

fn normalise(message: &mut Value) -> Result<(), Fault> {
    let Value::Object(fields) = message else { return Ok(()) };
    if !fields.contains_key("role") && fields.contains_key("from") && fields.contains_key("value") {
        *message = from_share_gpt(fields)?;
        return Ok(());
    }
    // LLaMA-Factory's v1 form weights messages; KTO weights completions.
    fields.shift_remove("loss_weight");
    let Some(Value::Array(parts)) = fields.get_mut("content") else { return Ok(()) };
    let parts = std::mem::take(parts);
    let (mut text, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for part in parts {
        let said = ["text", "value"].iter().find_map(|key| part.get(*key)?.as_str());
        match (part.get("type").and_then(Value::as_str), said) {
            (Some("text" | "input_text" | "output_text"), Some(said)) => text += said,
            (Some("reasoning"), Some(said)) => reasoning += said,
            (Some("tool_call"), Some(said)) => {
                calls.extend(tools::calls(said).map_err(|what| (Reason::Content, what))?);
            }
            (Some("text"), None) => return Err((Reason::Content, "a text part has no \"text\"".into())),
            (Some(kind), _) => {
                let what = format!("a content part of type {} (only text can be trained on)", quoted(kind));
                return Err((Reason::Multimodal, what));
            }
            (None, _) => return Err((Reason::Content, "a content part has no \"type\"".into())),
        }
    }
    fields.insert("content".into(), Value::String(text));
    if !reasoning.is_empty() {
        fields.insert("reasoning_content".into(), Value::String(reasoning));
    }
    if !calls.is_empty() {
        fields.insert("tool_calls".into(), Value::Array(calls));
    }
    Ok(())
}

/// `{"from": tag, "value": text}` as a message. Other keys of the turn are dropped: templates know none of them.
fn from_share_gpt(turn: &Map<String, Value>) -> Result<Value, Fault> {
    let fault = |what: String| (Reason::Content, what);
    let found = |key: &str| json::describe(turn.get(key).unwrap_or(&Value::Null));
    let text = |key: &str| {
        let text = turn.get(key).and_then(Value::as_str).map(str::to_owned);
        text.ok_or_else(|| fault(format!("\"{key}\" must be text, found {}", found(key))))
    };
    let (tag, value) = (text("from")?, text("value")?);
    let role = match tag.as_str() {
        "human" | "user" | "prompter" => "user",
        "gpt" | "assistant" | "chatgpt" | "model" | "bing" | "bard" | "bot" => "assistant",
        "system" | "developer" => "system",
        "observation" | "tool" | "function" | "function_response" => "tool",
        "function_call" | "tool_call" => {
            let calls = tools::calls(&value).map_err(fault)?;
            return Ok(json!({"role": "assistant", "tool_calls": calls}));
        }
        other => return Err(fault(format!("unknown tag {}", quoted(other)))),
    };
    Ok(json!({"role": role, "content": value}))
}

/// Checks a list that was put together from parts that are known to be good.
pub fn checked(field: &str, messages: Vec<Value>) -> Result<Vec<Value>, Problem> {
    kto_formats::chat::check(&messages)
        .at(format_args!("field {}", quoted(field)))
        .map_err(Reason::Content.because())?;
    Ok(messages)
}
