//! One JSON text, parsed strictly, with the place and the words for what is wrong with it.
//!
//! Called by the readers of JSON Lines and JSON arrays. Stricter than `serde_json::Value`: a key that appears twice in
//! one object is an error (the last one would win in silence). Numbers that a `Value` cannot hold exactly are noticed,
//! so that columns we only carry keep their text. Nesting is bounded (128) by `serde_json`.

pub use crate::json_fault::{Fault, NUL, UNEXPECTED_END};

use crate::json_fault::{fault, utf8_fault};
use kto_cli::escape;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value, map::Entry, value::RawValue};
use std::{cell::Cell, fmt};

/// A parsed JSON text.
#[derive(Debug)]
pub struct Parsed {
    /// The value, without duplicate keys.
    pub value: Value,
    /// True when a number of the text went through `f64`: see [`exact_fields`].
    pub inexact: bool,
}

/// Parses one JSON text.
pub fn parse(text: &[u8]) -> Result<Parsed, Fault> {
    let inexact = Cell::new(false);
    let parsed = std::str::from_utf8(text).map_err(|e| utf8_fault(text, e.valid_up_to())).and_then(|utf8| {
        let mut json = serde_json::Deserializer::from_str(utf8);
        let value = Strict { inexact: &inexact }.deserialize(&mut json).map_err(|e| fault(text, &e))?;
        json.end().map_err(|e| fault(text, &e))?;
        Ok(value)
    });
    Ok(Parsed { value: parsed?, inexact: inexact.get() })
}

/// Returns `key → JSON text` for those top-level fields of an object that hold a number which went through `f64`.
/// The text is as given, without blanks between tokens, so a 70-bit identifier stays what it was.
pub fn exact_fields(text: &[u8]) -> Vec<(String, String)> {
    let Ok(utf8) = std::str::from_utf8(text) else { return Vec::new() };
    let mut json = serde_json::Deserializer::from_str(utf8);
    let Ok(fields) = json.deserialize_map(RawFields) else { return Vec::new() };
    fields
        .into_iter()
        .filter(|(_, raw)| parse(raw.get().as_bytes()).is_ok_and(|p| p.inexact))
        .map(|(key, raw)| (key, minified(raw.get())))
        .collect()
}

/// Replaces what no Unicode text can hold (invalid UTF-8, lone `\ud800`-style escapes) by U+FFFD.
/// Returns the repaired text and how many replacements were made.
pub fn repair(text: &[u8]) -> (Vec<u8>, u64) {
    let utf8 = String::from_utf8_lossy(text);
    let given = text.windows(3).filter(|w| *w == "\u{fffd}".as_bytes()).count();
    let mut count = (utf8.matches('\u{fffd}').count() - given) as u64;
    let mut out = utf8.into_owned().into_bytes();
    let mut at = 0;
    while at + 6 <= out.len() {
        if out[at] != b'\\' {
            at += 1;
            continue;
        }
        match escaped_unit(&out[at..]) {
            Some(0xd800..=0xdbff) if matches!(escaped_unit(&out[at + 6..]), Some(0xdc00..=0xdfff)) => {
                at += 12
            }
            Some(0xd800..=0xdfff) => {
                out[at + 2..at + 6].copy_from_slice(b"fffd");
                count += 1;
                at += 6;
            }
            _ => at += 2,
        }
    }
    (out, count)
}

/// The code unit of a `\uXXXX` escape at the start of `text`.
pub(crate) fn escaped_unit(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(b"\\u")?.get(..4)?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Names a JSON value for a message: `"yes"`, `1`, `null`, `a list`, `an object`; long texts are cut.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => quoted(s),
        Value::Array(a) if a.is_empty() => "an empty list".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// Returns the JSON of a value of a settings file for a message: at most 60 characters, safe for a terminal.
pub fn short(value: &Value) -> String {
    let text = value.to_string();
    let mut cut: String = text.chars().take(60).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    escape(&cut)
}

/// Quotes a text of a file for a message: at most 40 characters, safe for a terminal.
pub fn quoted(text: &str) -> String {
    let mut cut: String = text.chars().take(40).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("\"{}\"", escape(&cut))
}

/// Drops blanks outside strings.
fn minified(json: &str) -> String {
    let (mut out, mut inside, mut escaped) = (String::with_capacity(json.len()), false, false);
    for c in json.chars() {
        if inside {
            inside = escaped || c != '"';
            escaped = c == '\\' && !escaped;
        } else if c.is_ascii_whitespace() {
            continue;
        } else {
            inside = c == '"';
        }
        out.push(c);
    }
    out
}

/// Builds a [`Value`], refusing duplicate keys and noting numbers that became `f64`.
#[derive(Clone, Copy)]
struct Strict<'a> {
    inexact: &'a Cell<bool>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        self.inexact.set(true);
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            match object.entry(key) {
                Entry::Vacant(place) => {
                    place.insert(entries.next_value_seed(self)?);
                }
                Entry::Occupied(old) => {
                    let key = quoted(old.key());
                    return Err(A::Error::custom(format_args!("key {key} appears twice")));
                }
            }
        }
        Ok(Value::Object(object))
    }
}

/// Collects an object's fields as raw text.
struct RawFields;

impl<'de> Visitor<'de> for RawFields {
    type Value = Vec<(String, &'de RawValue)>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = entries.next_entry::<String, &'de RawValue>()? {
            fields.push(field);
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn what(text: &str) -> String {
        parse(text.as_bytes()).unwrap_err().what
    }

    #[test]
    fn duplicate_keys_are_named_at_any_depth() {
        assert_eq!(what(r#"{"label": true, "label": false}"#), r#"key "label" appears twice"#);
        assert_eq!(what(r#"{"m": [{"role": "a", "role": "b"}]}"#), r#"key "role" appears twice"#);
    }

    #[test]
    fn long_values_are_cut_for_messages() {
        assert_eq!(short(&serde_json::json!({"a": "\u{1b}"})), r#"{"a":"\u001b"}"#);
        let long = short(&serde_json::json!("é".repeat(100_000)));
        assert_eq!((long.chars().count(), long.ends_with("é…")), (61, true));
    }

    #[test]
    fn large_numbers_keep_their_text() {
        let text = br#"{"id": 1180591620717411303424, "n": [1, {"x" : 2.50}], "s": "a \" 1.5 b", "k": 7}"#;
        assert!(parse(text).unwrap().inexact);
        let fields = exact_fields(text);
        assert_eq!(
            fields,
            [
                ("id".to_owned(), "1180591620717411303424".to_owned()),
                ("n".to_owned(), "[1,{\"x\":2.50}]".to_owned())
            ]
        );
        assert!(!parse(br#"{"id": 18446744073709551615}"#).unwrap().inexact);
    }

    #[test]
    fn faults_say_what_and_where() {
        for (text, expected) in [
            (r#"{"a": "#, "unexpected end of the JSON text"),
            (r#"{"a": 1} {"a": 2}"#, "more text after the end of the JSON value"),
            ("{\"a\": 1}\r{\"a\": 2}\r", "lines end in CR only (old Mac text)"),
            (r#"{"a": 1,}"#, "a comma with nothing after it"),
            (r#"{"a": NaN}"#, "unexpected 'N' in JSON"),
            (r#"{"a": 1e400}"#, "a number too large for a 64-bit float"),
            ("{\"a\": \"\u{1}\"}", "raw control character inside a string"),
            (r#"{'a': True}"#, "this is a Python literal, not JSON"),
            ("<html>", "this looks like an HTML or XML page, not JSON"),
            ("version https://git-lfs.github.com/spec/v1", "this is a Git LFS pointer, not the data"),
            ("{\"a\": 1}\0\0\0", "NUL bytes"),
            (r#"{"a": "\ud83e"}"#, "lone surrogate escape (half a character)"),
            (r#"{"a": "\ud83e x"}"#, "lone surrogate escape (half a character)"),
            (r#"{"a": "\udc00"}"#, "lone surrogate escape (half a character)"),
        ] {
            assert_eq!(what(text), expected, "{text}");
        }
        assert_eq!(what(&"[".repeat(100_000)), "nesting deeper than 128");
        let fault = parse(b"{\"a\": \"\xff\"}").unwrap_err();
        assert_eq!((fault.line, fault.column), (1, 8));
    }

    #[test]
    fn repair_replaces_only_what_is_broken() {
        let (text, n) =
            repair(br#"{"a": "\ud83e", "b": "\ud83e\udd14", "c": "\\ud83e", "d": "\udc00\ud800\u0041"}"#);
        assert_eq!(
            String::from_utf8(text).unwrap(),
            r#"{"a": "\ufffd", "b": "\ud83e\udd14", "c": "\\ud83e", "d": "\ufffd\ufffd\u0041"}"#
        );
        assert_eq!(n, 3);
        let (text, n) = repair(b"\xef\xbf\xbd \xff \xc3");
        assert_eq!((String::from_utf8(text).unwrap().as_str(), n), ("\u{fffd} \u{fffd} \u{fffd}", 2));
    }
}
