//! Every option with its value and where that came from.

use super::{
    file::{self, Origin},
    layers::{Layers, Words, raw},
    option::{Opt, Scope, Shape},
};
use crate::{Context, Error, Kind, Result, escape};
use clap::{ArgMatches, parser::ValueSource};
use serde_json::{Map, Value as Json};
use std::ffi::OsString;

/// Options that permit something once, or say how to begin: a repetition decides anew.
const NOT_REPEATED: [&str; 4] = ["force", "resume", "dry-run", "wait"];

/// An option's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Not given, and without a default.
    Unset,
    /// A switch, or a value that is true or false.
    Bool(bool),
    /// In a form that TOML and JSON share.
    Number(String),
    /// A text.
    Text(String),
    /// The values of an option that takes many.
    List(Vec<Value>),
}

/// The configuration of a run.
#[derive(Clone, Debug, Default)]
pub struct Resolution {
    /// The tool, with its subcommand.
    pub tool: String,
    pub(super) tables: Vec<String>,
    pub(super) settings: Vec<Resolved>,
    /// What is odd about the environment.
    pub(crate) warnings: Vec<String>,
}

/// An option's key and value.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    pub key: String,
    pub value: Value,
    pub origin: Origin,
    /// The default that the tool finds itself.
    pub derived: Option<String>,
    /// A part of the manifest.
    repeated: bool,
}

impl Resolution {
    pub(super) fn new(tool: &str, scope: &Scope, layers: &Layers, matches: &ArgMatches) -> Self {
        let tables = [Some(tool.to_string()), scope.sub.clone()].into_iter().flatten().collect();
        let settings = scope.options.iter().enumerate().filter(|(_, option)| !option.steering);
        let resolved = |(index, option): (usize, &Opt)| {
            let matches = scope.matches(index, matches);
            let typed = matches.value_source(&option.id) == Some(ValueSource::CommandLine);
            let setting = layers.get(index).filter(|s| typed || s.words == Words::Off);
            Resolved {
                key: option.key.clone(),
                value: value(option, matches),
                origin: setting.map_or(Origin::Default, |s| s.origin.clone()),
                derived: option.derived.clone(),
                repeated: !option.common && !NOT_REPEATED.contains(&option.key.as_str()),
            }
        };
        Self {
            tool: scope.full_name(tool),
            tables,
            settings: settings.map(resolved).collect(),
            warnings: Vec::new(),
        }
    }
    /// Returns what a manifest keeps, and `--from-manifest` sets again: neither messages, nor paths of make, nor what
    /// permits something once.
    pub fn configuration(&self) -> Map<String, Json> {
        let kept = self.settings.iter().filter(|s| s.repeated);
        kept.filter_map(|s| Some((s.key.clone(), json(&s.value)?))).collect()
    }
}

impl Resolution {
    /// Puts the place of a value that was not typed in front of an error about it, which names the flag (2), or begins with the path
    /// that is not to be read or written (66, 73). A wrong value that was not typed is 78.
    pub(crate) fn placed(&self, error: Error) -> Error {
        let text = error.to_string();
        let is_path = |value: &str| text.strip_prefix(value).is_some_and(|rest| rest.starts_with([':', '/']));
        let is_meant = |s: &&Resolved| match (error.kind(), &s.value) {
            (Kind::Usage, _) => names_flag(&text, &s.key),
            (Kind::NoInput | Kind::CantCreate, Value::Text(value)) => is_path(&escape(value)),
            _ => false,
        };
        let elsewhere = self.settings.iter().filter(|s| !matches!(s.origin, Origin::Flag | Origin::Default));
        let Some(setting) = elsewhere.filter(|s| !is_place(&text, s)).find(is_meant) else { return error };
        let kind = if error.kind() == Kind::Usage { Kind::Config } else { error.kind() };
        let place = match (&setting.origin, words(&setting.value)) {
            (Origin::Variable(name), Some(value)) if kind == Kind::Config => format!("{name}={value}"),
            (origin, _) => origin.to_string(),
        };
        let placed: Result<()> = Err(error.with_kind(kind)).at(place);
        placed.err().unwrap_or_else(|| Error::internal("an error remains one"))
    }
}

/// Whether a message begins with a setting's place already.
fn is_place(text: &str, setting: &Resolved) -> bool {
    text.starts_with(&format!("{}: ", setting.origin))
}

fn names_flag(text: &str, key: &str) -> bool {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.split(|c| !is_name(c)).any(|word| word.strip_prefix("--") == Some(key))
}

/// A value as a variable has it.
fn words(value: &Value) -> Option<String> {
    match value {
        Value::Unset => None,
        Value::Bool(on) => Some(u8::from(*on).to_string()),
        Value::Number(text) | Value::Text(text) => Some(escape(text)),
        Value::List(list) => Some(list.iter().filter_map(words).collect::<Vec<_>>().join(",")),
    }
}

fn value(option: &Opt, matches: &ArgMatches) -> Value {
    match option.shape {
        Shape::Switch => Value::Bool(matches.get_flag(&option.id)),
        Shape::Count => Value::Number(matches.get_count(&option.id).to_string()),
        Shape::Many => match raw(matches, &option.id) {
            values if values.is_empty() => Value::Unset,
            values => Value::List(values.into_iter().map(|v| scalar(option, v)).collect()),
        },
        Shape::One { .. } => match raw(matches, &option.id).into_iter().next() {
            Some(value) => scalar(option, value),
            // The flag alone.
            None if matches.contains_id(&option.id) => Value::Bool(true),
            None => Value::Unset,
        },
    }
}

fn scalar(option: &Opt, value: OsString) -> Value {
    let text = value.to_string_lossy().into_owned();
    match text.as_str() {
        "true" | "false" if option.boolean => Value::Bool(text == "true"),
        _ if !option.text && file::is_number(&text) => Value::Number(text),
        _ => Value::Text(text),
    }
}

fn json(value: &Value) -> Option<Json> {
    match value {
        Value::Unset => None,
        Value::Bool(on) => Some(Json::Bool(*on)),
        // A number too large for JSON's readers stays a text, which the flag's parser reads as well.
        Value::Number(text) => {
            Some(serde_json::from_str(text).unwrap_or_else(|_| Json::String(text.clone())))
        }
        Value::Text(text) => Some(Json::String(text.clone())),
        Value::List(list) => Some(Json::Array(list.iter().filter_map(json).collect())),
    }
}
