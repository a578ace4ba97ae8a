//! The forms of `--to`: how a record is written.

use crate::{args::Form, problem::Reason};
use kto_formats::{
    json_out,
    record::{Content, Record, Written},
};
use serde_json::{Map, Value, json};
use std::ops::Range;
use twox_hash::XxHash3_64;

/// Appends the line of a record. `prompt` is where the same prompt was written, when it is known to be the same. Returns where
/// its parts are, or why the form has no place for the record.
pub fn write(
    form: Form,
    record: &Record,
    exact: &[(String, String)],
    prompt: Option<Range<usize>>,
    out: &mut Vec<u8>,
) -> Result<Written, Reason> {
    if form == Form::Kto {
        return Ok(record.write_json_exact(exact, prompt, out));
    }
    if !record.label {
        return Err(Reason::Form);
    }
    let mut row = Map::new();
    match (form, &record.prompt, &record.completion) {
        (Form::SftText, Content::Text(prompt), Content::Text(completion)) => {
            row.insert("text".into(), format!("{prompt}{completion}").into());
        }
        (Form::SftText, ..) => return Err(Reason::Form),
        (Form::Mlx, Content::Text(prompt), Content::Text(completion)) => {
            row.insert("prompt".into(), prompt.as_str().into());
            row.insert("completion".into(), completion.as_str().into());
        }
        (_, prompt, completion) => {
            let turns = messages(prompt, "user").into_iter().chain(messages(completion, "assistant"));
            row.insert("messages".into(), turns.collect());
        }
    }
    if let Some(tools) = record.tools.clone().filter(|_| form != Form::SftText) {
        row.insert("tools".into(), tools);
    }
    if form != Form::Mlx {
        extras(record, exact, &mut row);
    }
    line(&row, out);
    Ok(Written { prompt: 0..0, said: out.len() })
}

/// Appends the line of a pair.
pub fn write_pair(chosen: &Record, rejected: &Record, exact: &[(String, String)], out: &mut Vec<u8>) {
    let mut row = Map::new();
    row.insert("prompt".into(), value(&chosen.prompt));
    row.insert("chosen".into(), value(&chosen.completion));
    row.insert("rejected".into(), value(&rejected.completion));
    for (name, column) in [("tools", &chosen.tools), ("chat_template_kwargs", &chosen.chat_template_kwargs)] {
        if let Some(column) = column {
            row.insert(name.into(), column.clone());
        }
    }
    extras(chosen, exact, &mut row);
    line(&row, out);
}

/// The hash by which records are put into splits: equal prompts are in one.
pub fn prompt_hash(prompt: &Content) -> u64 {
    match prompt {
        Content::Text(text) => XxHash3_64::oneshot(text.as_bytes()),
        Content::Chat(turns) => {
            let mut text = Vec::new();
            json_out::list(turns, &mut text);
            XxHash3_64::oneshot(&text)
        }
    }
}

fn value(content: &Content) -> Value {
    match content {
        Content::Text(text) => text.as_str().into(),
        Content::Chat(turns) => turns.clone().into(),
    }
}

fn messages(content: &Content, role: &str) -> Vec<Value> {
    match content {
        Content::Text(text) => vec![json!({"role": role, "content": text})],
        Content::Chat(turns) => turns.clone(),
    }
}

/// Other columns, numbers as they were written.
fn extras(record: &Record, exact: &[(String, String)], row: &mut Map<String, Value>) {
    for (key, value) in &record.extra {
        if row.contains_key(key) {
            continue;
        }
        let same = exact.iter().find(|(name, _)| name == key);
        let value =
            same.and_then(|(_, text)| serde_json::from_str(text).ok()).unwrap_or_else(|| value.clone());
        row.insert(key.clone(), value);
    }
}

fn line(row: &Map<String, Value>, out: &mut Vec<u8>) {
    json_out::object(row, out);
    out.push(b'\n');
}
