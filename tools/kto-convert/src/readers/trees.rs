//! OpenAssistant's flat form: a message a row, the rows of a tree behind one another. They become one row with the tree.

use crate::plan::Plan;
use kto_cli::Result;
use kto_formats::{
    chunks::{Chunk, Source},
    rows::Row,
};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;

/// Messages of one tree, at most: a file of one tree must not fill the memory.
const LARGEST: usize = 2_000;

/// Gives the source on, or what is made of its rows when the first one is a message of a tree.
pub fn grouped(mut source: impl Source + 'static, plan: &Plan) -> Result<Box<dyn Source>> {
    let first = source.next_chunk()?;
    let flat = match &first {
        Some(chunk) if plan.from.is_none_or(|shape| shape.name == "oasst") => chunk.begins_with(is_message),
        _ => false,
    };
    let source = Again { first, source };
    Ok(if flat {
        Box::new(Trees { source, rows: VecDeque::new(), end: None, done: false })
    } else {
        Box::new(source)
    })
}

fn is_message(row: &Value) -> bool {
    let has = |field: &str| row.get(field).is_some();
    has("message_id") && has("parent_id") && has("message_tree_id") && has("role") && has("text")
}

/// A source whose first chunk was looked at.
struct Again<S> {
    first: Option<Chunk>,
    source: S,
}

impl<S: Source> Source for Again<S> {
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        match self.first.take() {
            Some(chunk) => Ok(Some(chunk)),
            None => self.source.next_chunk(),
        }
    }
}

/// Rows put together.
struct Trees<S> {
    source: S,
    rows: VecDeque<Row>,
    end: Option<kto_cli::Error>,
    done: bool,
}

impl<S: Source> Source for Trees<S> {
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        let name = loop {
            let name = match self.source.next_chunk() {
                Ok(Some(chunk)) => {
                    let name = chunk.name().to_owned();
                    chunk.rows(|row, _| {
                        self.rows.push_back(row);
                        Ok(())
                    })?;
                    name
                }
                Ok(None) => {
                    self.done = true;
                    String::new()
                }
                Err(error) => {
                    self.done = true;
                    self.end = Some(error);
                    String::new()
                }
            };
            if self.done || self.has_whole_tree() {
                break name;
            }
        };
        let mut trees = Vec::new();
        while self.done && !self.rows.is_empty() || self.has_whole_tree() {
            trees.push(self.tree());
        }
        if trees.is_empty() {
            return self.end.take().map_or(Ok(None), Err);
        }
        Ok(Some(Chunk::of_rows(&name, trees)))
    }
}

impl<S> Trees<S> {
    /// True when the first tree's rows are all there: a row behind them is another's.
    fn has_whole_tree(&self) -> bool {
        let Some(first) = self.rows.front() else { return false };
        let id = tree_id(first);
        id.is_none() || self.rows.len() > LARGEST || self.rows.iter().any(|row| tree_id(row) != id)
    }

    /// Takes the first tree's rows. A row that is no message goes on as it is.
    fn tree(&mut self) -> Row {
        let Some(first) = self.rows.pop_front() else { return Row::none() };
        let Some(id) = tree_id(&first).map(str::to_owned) else { return first };
        let line = first.line;
        let mut messages = vec![first.value.unwrap_or_default()];
        while messages.len() < LARGEST && self.rows.front().is_some_and(|row| tree_id(row) == Some(&id)) {
            messages.extend(self.rows.pop_front().and_then(|row| row.value.ok()));
        }
        let stands_for = messages.len() as u64;
        let tree = json!({"message_tree_id": id, "prompt": nest(messages)});
        Row { line, value: Ok(tree), rows: stands_for, ..Row::none() }
    }
}

fn tree_id(row: &Row) -> Option<&str> {
    row.value.as_ref().ok()?.get("message_tree_id")?.as_str()
}

/// Hangs messages below their parents; the one without a parent is the root. Messages whose parent is not there are left out.
fn nest(messages: Vec<Value>) -> Value {
    let mut children: Map<String, Value> = Map::new();
    let mut root = Value::Null;
    for message in messages {
        match message.get("parent_id").and_then(Value::as_str).map(str::to_owned) {
            None => root = message,
            Some(parent) => {
                if let Value::Array(list) = children.entry(parent).or_insert_with(|| json!([])) {
                    list.push(message);
                }
            }
        }
    }
    attach(&mut root, &mut children);
    root
}

fn attach(message: &mut Value, children: &mut Map<String, Value>) {
    let id = message.get("message_id").and_then(Value::as_str).unwrap_or_default();
    let Some(Value::Array(mut replies)) = children.shift_remove(id) else { return };
    replies.iter_mut().for_each(|reply| attach(reply, children));
    if let Some(fields) = message.as_object_mut() {
        fields.insert("replies".into(), Value::Array(replies));
    }
}
