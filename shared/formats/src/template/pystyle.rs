//! How Python prints values: `str`, `repr` and `json.dumps`, for templates that print more than text.

use crate::python_json::float;
use minijinja::{
    Error, ErrorKind, Output, State,
    value::{Value, ValueKind},
};
use std::fmt::Write as _;

/// Depth of nested values, at most.
const DEPTH: usize = 200;

/// Prints the result of `{{ … }}`: text as it is, nothing for an undefined value, everything else as `str` does.
pub fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => minijinja::escape_formatter(out, state, value),
        _ => {
            let text = str(value)?;
            state.consume_fuel(text.len() as u64 / 8)?;
            out.write_str(&text).map_err(Error::from)
        }
    }
}

/// Returns Python's `str(value)`.
pub fn str(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.into()),
        None => {
            let mut out = String::new();
            repr(&mut out, value, DEPTH)?;
            Ok(out)
        }
    }
}

fn repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    let deeper = depth.checked_sub(1).ok_or_else(too_deep)?;
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(out, value),
        ValueKind::String => repr_text(out, value.as_str().unwrap_or_default()),
        ValueKind::Map => {
            out.push('{');
            for (i, (key, item)) in pairs(value)?.into_iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, &key, deeper)?;
                out.push_str(": ");
                repr(out, &item, deeper)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter()? {
                out.push_str(if count > 0 { ", " } else { "" });
                repr(out, &item, deeper)?;
                count += 1;
            }
            out.push_str(if tuple && count == 1 { "," } else { "" });
            out.push(if tuple { ')' } else { ']' });
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn number(out: &mut String, value: &Value) {
    match f64::try_from(value.clone()) {
        Ok(f) if !value.is_integer() => out.push_str(&float_text(f, ["nan", "inf", "-inf"])),
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

fn float_text(value: f64, names: [&str; 3]) -> String {
    match value {
        f if f.is_nan() => names[0].into(),
        f64::INFINITY => names[1].into(),
        f64::NEG_INFINITY => names[2].into(),
        f => float(f),
    }
}

/// Single quotes, unless only double ones avoid an escape.
fn repr_text(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// The options of `json.dumps` that templates use.
pub struct JsonStyle {
    /// Escape everything that is not ASCII.
    pub ascii: bool,
    /// The text of one level of indent; None for one line.
    pub indent: Option<String>,
    /// Between items, and between key and value; Python's defaults when None.
    pub separators: Option<(String, String)>,
    /// Sort the keys of objects.
    pub sort_keys: bool,
}

/// Returns Python's `json.dumps(value, …)`.
pub fn json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let (item, key) = match &style.separators {
        Some((item, key)) => (item.clone(), key.clone()),
        None => (if style.indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let mut writer = JsonWriter { out: String::new(), style, item, key };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct JsonWriter<'a> {
    out: String,
    style: &'a JsonStyle,
    item: String,
    key: String,
}

impl JsonWriter<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(too_deep());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(f) if !value.is_integer() => {
                    self.out.push_str(&float_text(f, ["NaN", "Infinity", "-Infinity"]));
                }
                _ => number(&mut self.out, value),
            },
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Map => return self.map(value, depth),
            ValueKind::Seq | ValueKind::Iterable => return self.list(value, depth),
            kind => return Err(Error::new(ErrorKind::BadSerialization, format!("{kind} is not JSON"))),
        }
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut any = false;
        for item in value.try_iter()? {
            self.between(any, depth);
            self.value(&item, depth + 1)?;
            any = true;
        }
        self.close(any, depth, ']');
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut entries = pairs(value)?;
        if self.style.sort_keys {
            entries.sort_by_cached_key(|(key, _)| key.to_string());
        }
        self.out.push('{');
        let any = !entries.is_empty();
        for (i, (key, item)) in entries.into_iter().enumerate() {
            self.between(i > 0, depth);
            match key.as_str() {
                Some(text) => self.text(text),
                None => {
                    self.out.push('"');
                    self.value(&key, depth + 1)?;
                    self.out.push('"');
                }
            }
            self.out.push_str(&self.key);
            self.value(&item, depth + 1)?;
        }
        self.close(any, depth, '}');
        Ok(())
    }

    fn between(&mut self, any: bool, depth: usize) {
        if any {
            self.out.push_str(&self.item);
        }
        self.new_line(depth + 1);
    }

    fn close(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn pairs(map: &Value) -> Result<Vec<(Value, Value)>, Error> {
    map.try_iter()?.map(|key| map.get_item(&key).map(|item| (key, item))).collect()
}

fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a value nested deeper than {DEPTH}"))
}
