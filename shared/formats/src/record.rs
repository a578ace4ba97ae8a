//! The record that every KTO tool agrees on: a prompt, a completion, and whether the completion is desirable.
//!
//! It is TRL's unpaired preference form, one JSON object a line. kto-convert writes it, kto-tokenize reads it.
//! Invariant: prompt and completion are both text or both message lists. Everything else a row carried stays in
//! `extra`, in its order. What is deliberately absent: shapes other than this one (kto-convert knows them).

use crate::{
    chat,
    json::{describe, quoted},
    json_out,
};
use kto_cli::{Context, Error, Result, escape};
use serde_json::{Map, Value};
use std::ops::Range;

/// One side of a record.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Plain text, to be tokenized as it is.
    Text(String),
    /// Message objects as given (role, content, tool_calls, …), to go through a chat template. Never empty.
    Chat(Vec<Value>),
}

impl Content {
    /// Takes a JSON value as text or as a checked message list; `field` names it in errors.
    pub fn from_value(field: &str, value: Value) -> Result<Self> {
        match value {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(messages) => {
                chat::check(&messages).at(format_args!("field {}", quoted(field)))?;
                Ok(Self::Chat(messages))
            }
            other => {
                let found = describe(&other);
                Err(Error::data(format!(
                    "field {} must be text or a message list, found {found}",
                    quoted(field)
                )))
            }
        }
    }

    /// True when nothing but blanks is in it: an empty text, or messages without content and without tool calls.
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Text(text) => text.trim().is_empty(),
            Self::Chat(messages) => messages.iter().all(chat::is_blank),
        }
    }

    fn write_json(&self, out: &mut Vec<u8>) {
        match self {
            Self::Text(text) => json_out::text(text, out),
            Self::Chat(messages) => json_out::list(messages, out),
        }
    }
}

/// The only key of the line with which a tool that fails ends its stream of records.
pub const STOPPED: &str = "kto_error";

/// Refuses (65) the line with which the tool before us in the pipe said that its stream is not complete.
pub fn refuse_stopped(row: &Map<String, Value>) -> Result<()> {
    match row.get(STOPPED) {
        Some(Value::String(why)) => {
            Err(Error::data(format!("the stream ends with an error: {}", escape(why))))
        }
        _ => Ok(()),
    }
}

/// One row of KTO data.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// What the model is given.
    pub prompt: Content,
    /// What the model is to learn to say, or not to say. The same kind as `prompt`.
    pub completion: Content,
    /// True when the completion is desirable.
    pub label: bool,
    /// Tool definitions for the chat template: a list, or a JSON text of one.
    pub tools: Option<Value>,
    /// Variables for the chat template, of this row only.
    pub chat_template_kwargs: Option<Value>,
    /// The other columns of the row, carried along.
    pub extra: Map<String, Value>,
}

impl Record {
    /// Takes a JSON object in TRL's unpaired form. Errors (65) name the field and what was found in it.
    pub fn from_value(value: Value) -> Result<Self> {
        let Value::Object(mut row) = value else {
            return Err(Error::data(format!("a row must be a JSON object, found {}", describe(&value))));
        };
        refuse_stopped(&row)?;
        let prompt = Content::from_value("prompt", take(&mut row, "prompt")?)?;
        let completion = Content::from_value("completion", take(&mut row, "completion")?)?;
        let label = label("label", &take(&mut row, "label")?)?;
        if matches!(prompt, Content::Text(_)) != matches!(completion, Content::Text(_)) {
            let what = "\"prompt\" and \"completion\" must both be text or both be message lists";
            return Err(Error::data(what).with_hint("kto-convert makes them alike"));
        }
        let tools = optional(&mut row, "tools");
        let chat_template_kwargs = optional(&mut row, "chat_template_kwargs");
        Ok(Self { prompt, completion, label, tools, chat_template_kwargs, extra: row })
    }

    /// Appends the record as one line of JSON, keys in the order prompt, completion, label, tools,
    /// chat_template_kwargs, then the extra columns.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        self.write_json_exact(&[], None, out);
    }

    /// Like [`Record::write_json`], but the extra columns named in `exact` (name, JSON text) are written as that text, and the
    /// prompt is copied from `prompt`, a range of `out`, when it is known to be the one that was written there.
    pub fn write_json_exact(
        &self,
        exact: &[(String, String)],
        prompt: Option<Range<usize>>,
        out: &mut Vec<u8>,
    ) -> Written {
        out.extend_from_slice(b"{\"prompt\": ");
        let start = out.len();
        match prompt {
            Some(range) => out.extend_from_within(range),
            None => self.prompt.write_json(out),
        }
        let prompt = start..out.len();
        out.extend_from_slice(b", \"completion\": ");
        self.completion.write_json(out);
        let said = out.len();
        out.extend_from_slice(if self.label { b", \"label\": true" } else { b", \"label\": false" });
        for (key, value) in [("tools", &self.tools), ("chat_template_kwargs", &self.chat_template_kwargs)] {
            if let Some(value) = value {
                write_key(key, out);
                json_out::value(value, out);
            }
        }
        for (key, value) in &self.extra {
            write_key(key, out);
            match exact.iter().find(|(name, _)| name == key) {
                Some((_, text)) => out.extend_from_slice(text.as_bytes()),
                None => json_out::value(value, out),
            }
        }
        out.extend_from_slice(b"}\n");
        Written { prompt, said }
    }
}

/// Where in a buffer the parts of a written record are.
pub struct Written {
    /// The prompt's JSON.
    pub prompt: Range<usize>,
    /// The end of what holds prompt and completion, by which duplicates are told.
    pub said: usize,
}

/// Takes a label: exactly `true` or `false`, because 0, "no" and "false" mean different things to different tools.
pub fn label(field: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| {
        let what = format!("field {} must be true or false, found {}", quoted(field), describe(value));
        let error = Error::data(what);
        match label_map(value) {
            Some(map) => error.with_hint(format!("kto-convert --label-map {map}")),
            None => error,
        }
    })
}

/// The `--label-map` that would read a value: the usual pair of words when it is one of them.
fn label_map(value: &Value) -> Option<String> {
    const PAIRS: [(&str, &str); 8] = [
        ("true", "false"),
        ("True", "False"),
        ("1", "0"),
        ("1", "-1"),
        ("yes", "no"),
        ("up", "down"),
        ("good", "bad"),
        ("desirable", "undesirable"),
    ];
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    if let Some((yes, no)) = PAIRS.iter().find(|(yes, no)| *yes == text || *no == text) {
        return Some(format!("{yes}=true,{no}=false"));
    }
    let plain = !text.is_empty()
        && text.len() < 20
        && text.chars().all(|c| c.is_alphanumeric() || "-_.+".contains(c));
    plain.then(|| format!("{text}=true (or {text}=false)"))
}

fn take(row: &mut Map<String, Value>, field: &str) -> Result<Value> {
    row.shift_remove(field).ok_or_else(|| {
        let error = Error::data(format!("field {} is missing{}", quoted(field), columns(row)));
        if row.contains_key("chosen") || row.contains_key("messages") {
            error.with_hint("run kto-convert first")
        } else {
            error
        }
    })
}

/// Names the fields that a row has, for the message about the one it lacks.
pub fn columns(row: &Map<String, Value>) -> String {
    let names: Vec<String> = row.keys().take(8).map(|k| quoted(k)).collect();
    let more = if row.len() > 8 { ", …" } else { "" };
    if names.is_empty() {
        " (the row has no fields)".into()
    } else {
        format!(" (found {}{more})", names.join(", "))
    }
}

fn optional(row: &mut Map<String, Value>, field: &str) -> Option<Value> {
    row.shift_remove(field).filter(|v| !v.is_null())
}

fn write_key(key: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b", ");
    json_out::text(key, out);
    out.extend_from_slice(b": ");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_record_comes_back_as_it_was() {
        let line = concat!(
            r#"{"prompt": [{"role": "user", "content": "hé"}], "completion": [{"role": "assistant", "content": "a\u0000b"}], "#,
            r#""label": false, "tools": [{"type": "function"}], "chat_template_kwargs": {"k": 1}, "id": "7", "score": 1.5}"#,
            "\n"
        );
        let record = Record::from_value(serde_json::from_str(line).unwrap()).unwrap();
        let mut out = Vec::new();
        record.write_json(&mut out);
        assert_eq!(String::from_utf8(out).unwrap(), line);
    }

    #[test]
    fn errors_name_field_and_value() {
        let error = |v| Record::from_value(v).unwrap_err().to_string();
        assert_eq!(error(json!([1])), "a row must be a JSON object, found a list");
        assert_eq!(error(json!({})), "field \"prompt\" is missing (the row has no fields)");
        assert_eq!(
            error(json!({"prompt": "a", "completion": "b", "label": "yes"})),
            "field \"label\" must be true or false, found \"yes\""
        );
        assert_eq!(
            error(json!({"prompt": null, "completion": "b", "label": true})),
            "field \"prompt\" must be text or a message list, found null"
        );
        assert_eq!(
            error(
                json!({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}], "label": true})
            ),
            "\"prompt\" and \"completion\" must both be text or both be message lists"
        );
        assert_eq!(
            error(json!({"prompt": [], "completion": [], "label": true})),
            "field \"prompt\": the message list is empty"
        );
        assert_eq!(
            error(json!({"kto_error": "f:7: key \"a\" appears twice"})),
            "the stream ends with an error: f:7: key \"a\" appears twice"
        );
    }
}
