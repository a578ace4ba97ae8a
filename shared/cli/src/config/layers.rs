//! Settings of all layers in one list, and the command line that says the same.

use super::{
    file::{self, Entry, Item, Origin},
    option::{Opt, Scope, Shape},
    unknown,
};
use crate::{Error, Kind, Result, escape, foreign};
use clap::{ArgMatches, parser::ValueSource};
use serde_json::Value as Json;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

/// Whose tables a file may hold; `tests/workspace.rs` compares the list with the workspace.
const TOOLS: [&str; 6] =
    ["kto-convert", "kto-tokenize", "kto-quantize", "kto-train", "kto-eval", "kto-merge"];

/// What an option is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Words {
    /// Nothing to type: a switch that is off, or a default that a file spells out. Layers below are not asked.
    Off,
    /// The flag alone, so many times.
    Bare(u8),
    /// The flag with each of the values.
    Values(Vec<OsString>),
}

/// An option's setting.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub words: Words,
    pub origin: Origin,
}

/// Settings by the index of their option in the scope; a higher layer's come later.
#[derive(Debug, Default)]
pub(super) struct Layers {
    settings: Vec<(usize, Setting)>,
}

impl Layers {
    /// Sets an option, in place of what lower layers say.
    pub fn set(&mut self, index: usize, words: Words, origin: Origin) {
        self.settings.retain(|(i, _)| *i != index);
        self.settings.push((index, Setting { words, origin }));
    }
    /// Puts a higher layer on top.
    pub fn extend(&mut self, higher: Layers) {
        higher.settings.into_iter().for_each(|(index, s)| self.set(index, s.words, s.origin));
    }
    /// Adds what was typed.
    pub fn add_typed(&mut self, scope: &Scope, typed: &ArgMatches) {
        for (index, option) in scope.options.iter().enumerate() {
            let matches = scope.matches(index, typed);
            if matches.value_source(&option.id) != Some(ValueSource::CommandLine) {
                continue;
            }
            let words = match option.shape {
                Shape::Switch => Words::Bare(1),
                Shape::Count => Words::Bare(matches.get_count(&option.id)),
                _ => match raw(matches, &option.id) {
                    values if values.is_empty() => Words::Bare(1),
                    values => Words::Values(values),
                },
            };
            self.set(index, words, Origin::Flag);
        }
    }
    /// Adds the switches, by their keys, that were turned off.
    pub fn add_off(&mut self, scope: &Scope, off: &[String]) {
        let index = |key: &String| scope.options.iter().position(|option| option.key == *key);
        off.iter().filter_map(index).for_each(|index| self.set(index, Words::Off, Origin::Flag));
    }
    /// Adds a file: the keys at the top, then those of the tool's table, then those of the subcommand's table in it.
    /// Errors (78): an unknown key or table, a value of the wrong type.
    pub fn add_file(&mut self, tool: &str, scope: &Scope, path: &Path) -> Result<()> {
        let mut own = Vec::new();
        let mut top = Vec::new();
        for entry in file::read(path)? {
            match entry.item {
                Item::Table(inner) if entry.key == tool => own = inner,
                Item::Table(_) if TOOLS.contains(&entry.key.as_str()) => {}
                Item::Table(_) if scope.find(&entry.key).is_none() => {
                    let mut known = vec![tool];
                    known.extend(TOOLS);
                    return Err(unknown(&place(path, entry.line), "table", &entry.key, &known));
                }
                _ => top.push(entry),
            }
        }
        let others = |name: &str| scope.is_of_another(name);
        self.add_entries(scope, path, top, others)?;
        let (mut inner, mut rest) = (Vec::new(), Vec::new());
        for entry in own {
            match entry.item {
                Item::Table(list) if scope.sub.as_ref() == Some(&entry.key) => inner = list,
                Item::Table(_) if scope.others.iter().any(|(name, _)| *name == entry.key) => {}
                _ => rest.push(entry),
            }
        }
        self.add_entries(scope, path, rest, others)?;
        self.add_entries(scope, path, inner, |_| false)
    }

    /// Keys for which `skipped` is true are known, but not to this call.
    fn add_entries(
        &mut self,
        scope: &Scope,
        path: &Path,
        entries: Vec<Entry>,
        skipped: impl Fn(&str) -> bool,
    ) -> Result<()> {
        for entry in entries {
            let place = place(path, entry.line);
            let Some(index) = scope.index(&entry.key) else {
                if skipped(&entry.key) {
                    continue;
                }
                return Err(match foreign::hint(&scope.tool, &entry.key) {
                    Some(hint) => {
                        let text = format!("{place}: unknown key \"{}\"", escape(&entry.key));
                        Error::new(Kind::Config, text).with_hint(hint)
                    }
                    None => unknown(&place, "key", &entry.key, &scope.keys()),
                });
            };
            let words = entry.item.words(&scope.options[index]);
            let words = words.map_err(|what| Error::new(Kind::Config, format!("{place}: {what}")))?;
            self.set(
                index,
                unless_default(words, &scope.options[index]),
                Origin::File(path.into(), entry.line),
            );
        }
        Ok(())
    }
    /// Adds one value of a manifest's configuration. Error (78): a key or a value that this tool does not know.
    pub fn add_manifest(&mut self, scope: &Scope, path: &Path, key: &str, value: &Json) -> Result<()> {
        let place = escape(&path.display().to_string());
        let Some(index) = scope.index(key) else {
            return Err(unknown(&place, "option", key, &scope.keys()));
        };
        let item = item(value).ok_or_else(|| Error::config(format!("{place}: \"{key}\" holds no value")))?;
        let words =
            item.words(&scope.options[index]).map_err(|what| Error::config(format!("{place}: {what}")))?;
        self.set(index, unless_default(words, &scope.options[index]), Origin::Manifest(path.into()));
        Ok(())
    }
    /// Returns the command line that says all of it.
    pub fn argv(&self, scope: &Scope, tool: &str) -> Vec<OsString> {
        let (mut own, mut inner) = (vec![OsString::from(tool)], Vec::new());
        // By index: clap tells positional arguments apart by their order.
        let mut positional: BTreeMap<usize, Vec<OsString>> = BTreeMap::new();
        for (index, Setting { words, .. }) in &self.settings {
            let option = &scope.options[*index];
            let to = if *index < scope.own { &mut own } else { &mut inner };
            let flag = OsString::from(format!("--{}", option.key));
            match words {
                Words::Off => {}
                Words::Values(values) if option.positional => {
                    positional.insert(*index, values.clone());
                }
                Words::Bare(times) => to.extend(vec![flag; usize::from(*times)]),
                Words::Values(values) => to.extend(values.iter().map(|value| {
                    let mut word = flag.clone();
                    word.push("=");
                    word.push(value);
                    word
                })),
            }
        }
        own.extend(scope.sub.iter().map(OsString::from));
        own.append(&mut inner);
        if !positional.is_empty() {
            own.push("--".into());
            own.extend(positional.into_values().flatten());
        }
        own
    }
    /// Returns an option's setting.
    pub fn get(&self, index: usize) -> Option<&Setting> {
        self.settings.iter().find(|(i, _)| *i == index).map(|(_, s)| s)
    }
    /// Whether a switch is on.
    pub fn is_on(&self, scope: &Scope, id: &str) -> bool {
        self.by_id(scope, id).is_some_and(|s| s.words != Words::Off)
    }
    /// Returns the value of an option that takes a path.
    pub fn path(&self, scope: &Scope, id: &str) -> Option<PathBuf> {
        match &self.by_id(scope, id)?.words {
            Words::Values(values) => values.first().map(PathBuf::from),
            _ => None,
        }
    }
    /// Returns where the option that clap's messages call `shown` has its value from.
    pub fn origin_of(&self, scope: &Scope, shown: &str) -> Option<&Origin> {
        let index = scope.options.iter().position(|o| o.shown == shown)?;
        self.get(index).map(|s| &s.origin)
    }

    fn by_id(&self, scope: &Scope, id: &str) -> Option<&Setting> {
        self.get(scope.options.iter().position(|o| o.id == id)?)
    }
}

impl Scope {
    fn index(&self, key: &str) -> Option<usize> {
        let found = self.find(key)?;
        self.options.iter().position(|o| o.id == found.id && o.key == found.key)
    }
}

/// The values of an option as they were given.
pub(super) fn raw(matches: &ArgMatches, id: &str) -> Vec<OsString> {
    matches.get_raw(id).map(|values| values.map(OsString::from).collect()).unwrap_or_default()
}

/// A printed configuration and a manifest spell defaults out. Typed, they would contradict options that only conflict with
/// what somebody wanted.
fn unless_default(words: Words, option: &Opt) -> Words {
    let number = |word: &OsString| word.to_str().and_then(|text| text.parse::<f64>().ok());
    let same = |a: &OsString, b: &OsString| a == b || number(a).is_some_and(|a| number(b) == Some(a));
    match &words {
        Words::Values(values)
            if values.len() == option.defaults.len()
                && values.iter().zip(&option.defaults).all(|(a, b)| same(a, b)) =>
        {
            Words::Off
        }
        _ => words,
    }
}

fn place(path: &Path, line: usize) -> String {
    Origin::File(path.into(), line).to_string()
}

fn item(value: &Json) -> Option<Item> {
    match value {
        Json::Bool(on) => Some(Item::Bool(*on)),
        Json::Number(n) => Some(Item::Number(n.to_string())),
        Json::String(text) => Some(Item::Text(text.clone())),
        Json::Array(list) => list.iter().map(item).collect::<Option<_>>().map(Item::List),
        Json::Null | Json::Object(_) => None,
    }
}
