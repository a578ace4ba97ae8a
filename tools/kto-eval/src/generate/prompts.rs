//! Prompts from files: JSON Lines, plain lines, or token ids.

use crate::args::GenerateArgs;
use kto_cli::{Context, Error, Result, escape, input};
use kto_formats::{
    chat,
    json::{describe, quoted},
    jsonl::JsonLines,
    record::{Content, columns},
};
use serde_json::{Map, Value};
use std::{
    io::{BufRead, Read},
    path::PathBuf,
    vec,
};

/// Longest line of plain text.
const LINE_CAP: u64 = 64 << 20;

/// What is to be answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Plain text to be continued.
    Text(String),
    /// Messages for the chat template.
    Chat(Vec<Value>),
}

/// One prompt of the input.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// `file:line`.
    pub place: String,
    /// Place in the whole input, from 0.
    pub number: u64,
    /// What is to be answered; empty with `--ids`.
    pub body: Body,
    /// The ids of `--ids`.
    pub ids: Vec<u32>,
    /// The row's other columns.
    pub columns: Map<String, Value>,
}

impl Prompt {
    /// Returns another column of the row.
    pub fn column(&self, name: &str) -> Option<&Value> {
        self.columns.get(name).filter(|v| !v.is_null())
    }
}

/// The prompts of all files, in order.
pub struct Prompts {
    paths: vec::IntoIter<PathBuf>,
    current: Option<Reader>,
    text: bool,
    ids: bool,
    number: u64,
}

enum Reader {
    Json { name: String, lines: JsonLines },
    Text { name: String, reader: Box<dyn BufRead + Send>, line: u64 },
}

impl Prompts {
    /// Opens the first file, so that a missing one is found before any work.
    pub fn new(paths: Vec<PathBuf>, args: &GenerateArgs) -> Result<Self> {
        let mut this =
            Self { paths: paths.into_iter(), current: None, text: args.text, ids: args.ids, number: 0 };
        this.open_next()?;
        Ok(this)
    }

    /// Returns the next prompt. Errors carry its place.
    pub fn next(&mut self) -> Result<Option<Prompt>> {
        while let Some(reader) = &mut self.current {
            let first = self.number == 0;
            if let Some((place, value)) = reader.next().map_err(|e| hinted(e, first))? {
                let mut prompt = match value {
                    Value::String(text) if self.text => Prompt {
                        place,
                        number: 0,
                        body: Body::Text(text),
                        ids: Vec::new(),
                        columns: Map::new(),
                    },
                    value if self.ids => from_ids(place.clone(), value).at(place)?,
                    value => from_row(place.clone(), value).at(place)?,
                };
                prompt.number = self.number;
                self.number += 1;
                return Ok(Some(prompt));
            }
            self.open_next()?;
        }
        Ok(None)
    }

    fn open_next(&mut self) -> Result<()> {
        self.current = match self.paths.next() {
            None => None,
            Some(path) => {
                let input = input::open(&path)?;
                let name = input.name.clone();
                Some(match self.text {
                    true => Reader::Text { name, reader: input.reader, line: 0 },
                    false => Reader::Json { name, lines: JsonLines::new(input) },
                })
            }
        };
        Ok(())
    }
}

impl Reader {
    /// Returns the next place and value; a plain line is a text.
    fn next(&mut self) -> Result<Option<(String, Value)>> {
        match self {
            Self::Json { name, lines } => {
                Ok(lines.next()?.map(|(line, value)| (format!("{name}:{line}"), value)))
            }
            Self::Text { name, reader, line } => {
                *line += 1;
                let place = format!("{name}:{line}");
                Ok(plain_line(reader, &place)?.map(|text| (place, Value::String(text))))
            }
        }
    }
}

/// Plain text that is taken for JSON shows in the first row.
fn hinted(error: Error, first: bool) -> Error {
    let is_text = first && error.hint().is_none() && error.to_string().contains("JSON");
    if is_text { error.with_hint("--text takes lines of plain text") } else { error }
}

/// Reads a line without its end.
fn plain_line(reader: &mut impl BufRead, place: &str) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    reader.by_ref().take(LINE_CAP + 1).read_until(b'\n', &mut bytes).map_err(|e| input::error(place, &e))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() as u64 > LINE_CAP {
        return Err(Error::data(format!("{place}: line longer than {LINE_CAP} bytes")));
    }
    let text = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    let text = std::str::from_utf8(text).map_err(|e| {
        Error::data(format!("{place}: invalid UTF-8 at byte {} of the line", e.valid_up_to()))
    })?;
    Ok(Some(text.to_string()))
}

/// Takes a row with "prompt", or with "messages" whose last answers are what is to be made.
fn from_row(place: String, value: Value) -> Result<Prompt> {
    let mut columns = object(value)?;
    let body = if let Some(prompt) = columns.shift_remove("prompt").filter(|p| !p.is_null()) {
        match Content::from_value("prompt", prompt)? {
            Content::Text(text) => Body::Text(text),
            Content::Chat(messages) => Body::Chat(messages),
        }
    } else if let Some(messages) = columns.shift_remove("messages") {
        Body::Chat(asked(messages)?)
    } else {
        return Err(Error::data(format!(
            "neither \"prompt\" nor \"messages\" is there{}",
            self::columns(&columns)
        ))
        .with_hint("--text takes lines of plain text"));
    };
    for name in ["completion", "label"] {
        if let Some(value) = columns.shift_remove(name) {
            columns.insert(format!("given_{name}"), value);
        }
    }
    Ok(Prompt { place, number: 0, body, ids: Vec::new(), columns })
}

/// Leaves the assistant's turns at the end out.
fn asked(messages: Value) -> Result<Vec<Value>> {
    let Value::Array(mut messages) = messages else {
        return Err(Error::data(format!(
            "field \"messages\" must be a message list, found {}",
            describe(&messages)
        )));
    };
    chat::check(&messages).at("field \"messages\"")?;
    while messages.last().is_some_and(|m| chat::role(m) == "assistant") {
        messages.pop();
    }
    if messages.is_empty() {
        return Err(Error::data("field \"messages\": nothing comes before the assistant's turns"));
    }
    Ok(messages)
}

fn from_ids(place: String, value: Value) -> Result<Prompt> {
    let mut columns = object(value)?;
    let Some(ids) = columns.shift_remove("prompt_ids") else {
        return Err(Error::data(format!("field \"prompt_ids\" is missing{}", self::columns(&columns))));
    };
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    let found = ids.as_array().and_then(|list| list.iter().map(id).collect::<Option<Vec<u32>>>());
    let Some(ids) = found else {
        return Err(Error::data(format!("field {} must be a list of token ids", quoted("prompt_ids"))));
    };
    if let Some(given) = columns.shift_remove("completion_ids") {
        columns.insert("given_completion_ids".into(), given);
    }
    Ok(Prompt { place, number: 0, body: Body::Text(String::new()), ids, columns })
}

fn object(value: Value) -> Result<Map<String, Value>> {
    match value {
        Value::Object(map) => Ok(map),
        other => {
            Err(Error::data(format!("a row must be a JSON object, found {}", escape(&describe(&other))))
                .with_hint("--text takes lines of plain text"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(value: Value) -> Result<Prompt> {
        from_row("f:1".into(), value)
    }

    #[test]
    fn the_answer_of_a_row_is_set_aside() {
        let prompt = row(json!({"id": 7, "prompt": "a", "completion": "b", "label": true})).unwrap();
        assert_eq!(prompt.body, Body::Text("a".into()));
        assert_eq!(
            Value::Object(prompt.columns),
            json!({"id": 7, "given_completion": "b", "given_label": true})
        );
        let message = |role: &str| json!({"role": role, "content": "x"});
        let messages = json!([message("user"), message("assistant"), message("user"), message("assistant")]);
        let prompt = row(json!({"messages": messages})).unwrap();
        assert!(matches!(prompt.body, Body::Chat(m) if m.len() == 3));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |v: Value| row(v).unwrap_err().to_string();
        assert_eq!(error(json!("a")), "a row must be a JSON object, found \"a\"");
        assert_eq!(
            error(json!({"text": "a"})),
            "neither \"prompt\" nor \"messages\" is there (found \"text\")"
        );
        assert_eq!(error(json!({"prompt": 3})), "field \"prompt\" must be text or a message list, found 3");
        let only = json!([{"role": "assistant", "content": "x"}]);
        assert_eq!(
            error(json!({"messages": only})),
            "field \"messages\": nothing comes before the assistant's turns"
        );
    }

    #[test]
    fn plain_lines_lose_their_ends_only() {
        let mut text = &b"a \r\n\nb"[..];
        let mut next = || plain_line(&mut text, "f:1").unwrap();
        assert_eq!(
            [next(), next(), next(), next()],
            [Some("a ".into()), Some(String::new()), Some("b".into()), None]
        );
        assert!(plain_line(&mut &b"\xff\n"[..], "f:1").is_err());
    }
}
