//! A configuration file in TOML, and what its values may be.

use super::{
    layers::Words,
    option::{Opt, Shape},
};
use crate::{Error, Kind, Result, escape, input};
use std::{
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// Longest configuration file that is read, in bytes.
const MOST: u64 = 1 << 20;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// An environment variable.
    Variable(String),
    /// A line of a file.
    File(PathBuf, usize),
    /// A manifest of an earlier run.
    Manifest(PathBuf),
    /// The tool's own definition.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |path: &Path| escape(&path.display().to_string());
        match self {
            Self::Flag => write!(f, "flag"),
            Self::Variable(name) => write!(f, "{name}"),
            Self::File(path, line) => write!(f, "{}:{line}", shown(path)),
            Self::Manifest(path) => write!(f, "{}", shown(path)),
            Self::Default => write!(f, "default"),
        }
    }
}

/// A value of a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    Bool(bool),
    /// As the flag's own parser will read it.
    Number(String),
    Text(String),
    List(Vec<Item>),
    Table(Vec<Entry>),
    /// A form that no option takes.
    Date,
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub key: String,
    pub item: Item,
    pub line: usize,
}

/// Reads a file. Errors: 66 for one that is not there, 78 for one that is not TOML.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>> {
    let text = input::read_text(path, MOST)?;
    parse(&text).map_err(|(line, what)| {
        let place = escape(&path.display().to_string());
        Error::new(Kind::Config, format!("{place}:{line}: not TOML: {}", escape(&what)))
    })
}

/// Returns the entries in the order of their lines, or the line of what is wrong.
fn parse(text: &str) -> Result<Vec<Entry>, (usize, String)> {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|b| *b == b'\n').count();
    match DeTable::parse(text) {
        Ok(table) => Ok(entries(table.get_ref(), &line)),
        Err(e) => Err((line(e.span().map_or(0, |s| s.start)), e.message().replace('\n', " "))),
    }
}

fn entries(table: &DeTable<'_>, line: &dyn Fn(usize) -> usize) -> Vec<Entry> {
    let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
        let name: &std::borrow::Cow<'_, str> = key.get_ref();
        Entry { key: name.to_string(), item: item(value.get_ref(), line), line: line(key.span().start) }
    };
    let mut all: Vec<Entry> = table.iter().map(entry).collect();
    all.sort_by_key(|e| e.line);
    all
}

fn item(value: &DeValue<'_>, line: &dyn Fn(usize) -> usize) -> Item {
    match value {
        DeValue::String(text) => Item::Text(text.to_string()),
        DeValue::Integer(n) if n.radix() == 10 => Item::Number(n.as_str().trim_start_matches('+').into()),
        DeValue::Integer(n) => match i128::from_str_radix(n.as_str(), n.radix()) {
            Ok(number) => Item::Number(number.to_string()),
            Err(_) => Item::Number(n.to_string()),
        },
        DeValue::Float(x) => Item::Number(x.as_str().trim_start_matches('+').into()),
        DeValue::Boolean(yes) => Item::Bool(*yes),
        DeValue::Datetime(_) => Item::Date,
        DeValue::Array(list) => Item::List(list.iter().map(|v| item(v.get_ref(), line)).collect()),
        DeValue::Table(table) => Item::Table(entries(table, line)),
    }
}

/// Whether a text is a number of TOML, so that it needs no quotes.
pub(super) fn is_number(text: &str) -> bool {
    let begins = text.trim_start_matches('-').starts_with(|c: char| c.is_ascii_digit());
    match DeValue::parse(text).map(Spanned::into_inner) {
        Ok(DeValue::Integer(n)) => begins && n.radix() == 10 && n.as_str() == text,
        Ok(DeValue::Float(x)) => begins && x.as_str() == text,
        _ => false,
    }
}

impl Item {
    fn kind(&self) -> &'static str {
        match self {
            Self::Bool(true) => "true",
            Self::Bool(false) => "false",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
            Self::List(list) if list.is_empty() => "an empty list",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
            Self::Date => "a date",
        }
    }
    /// Returns what `option` is given by this value, or what it must be instead.
    pub(super) fn words(&self, option: &Opt) -> Result<Words, String> {
        let wrong = |wanted: &str| format!("\"{}\" must be {wanted}, found {}", option.key, self.kind());
        match (option.shape, self) {
            (Shape::Switch, Self::Bool(on)) => Ok(if *on { Words::Bare(1) } else { Words::Off }),
            (Shape::Switch, _) => Err(wrong("true or false")),
            (Shape::Count, Self::Number(text)) => match text.parse() {
                Ok(0) => Ok(Words::Off),
                Ok(times) => Ok(Words::Bare(times)),
                Err(_) => Err(wrong("a small whole number")),
            },
            (Shape::Count, _) => Err(wrong("a small whole number")),
            (Shape::One { optional: true }, Self::Bool(on)) if !option.boolean => {
                Ok(if *on { Words::Bare(1) } else { Words::Off })
            }
            (Shape::Many, Self::List(list)) if !list.is_empty() => {
                let words: Option<Vec<_>> = list.iter().map(|item| item.word(option)).collect();
                words.map(Words::Values).ok_or_else(|| wrong(&format!("a list of {}s", option.wanted())))
            }
            (_, item) => match item.word(option) {
                Some(word) => Ok(Words::Values(vec![word])),
                None => Err(wrong(&format!("a {}", option.wanted()))),
            },
        }
    }
    fn word(&self, option: &Opt) -> Option<OsString> {
        match self {
            Self::Text(text) if !option.boolean => Some(text.into()),
            Self::Number(text) if !option.text && !option.boolean => Some(text.into()),
            Self::Bool(on) if option.boolean => Some(on.to_string().into()),
            _ => None,
        }
    }
}

impl Opt {
    fn wanted(&self) -> &'static str {
        match (self.boolean, self.text) {
            (true, _) => "boolean",
            (_, true) => "string",
            _ => "number or string",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_keys() {
        let text = "a = 1\n\n[t]\nb = [\n 1,\n \"x\"]\nc.d = 0x10\n";
        let all = parse(text).unwrap();
        assert_eq!((all[0].key.as_str(), &all[0].item, all[0].line), ("a", &Item::Number("1".into()), 1));
        let Item::Table(inner) = &all[1].item else { panic!("{all:?}") };
        let list = Item::List(vec![Item::Number("1".into()), Item::Text("x".into())]);
        assert_eq!((&inner[0].item, inner[0].line), (&list, 4));
        let Item::Table(deep) = &inner[1].item else { panic!("{inner:?}") };
        assert_eq!((&deep[0].item, deep[0].line), (&Item::Number("16".into()), 7));
    }

    #[test]
    fn what_is_no_toml_has_a_line() {
        assert_eq!(parse("a = 1\nb = \n").unwrap_err().0, 2);
        assert_eq!(parse("a = 1\na = 2\n").unwrap_err().0, 2);
    }

    #[test]
    fn numbers_need_no_quotes() {
        for text in ["0", "-5", "42", "0.000005", "5e-6", "1E3", "18446744073709551615"] {
            assert!(is_number(text), "{text}");
        }
        for text in
            ["", "007", ".5", "5.", "1_000", "0x10", "inf", "nan", "5GB", "1 2", "1 # 2", "2020-01-01"]
        {
            assert!(!is_number(text), "{text}");
        }
    }
}
