//! JSON text exactly as Python's `json.dumps` writes it.
//!
//! The files that PEFT and transformers write are Python JSON with sorted keys and an indent of two; writing the same
//! bytes keeps `diff` and `cmp` useful. Called by [`crate::adapter`], [`crate::bnb`] and the tools that copy config.json.
//! Python escapes everything that is not ASCII and prints floats with an exponent of two digits (`1e-05`).

use serde_json::Value;
use std::fmt::Write as _;

/// Returns `value` over several lines, indent 2, keys sorted, as `json.dumps(value, indent=2, sort_keys=True)`.
pub fn pretty_sorted(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value, Some(0));
    out
}

/// Returns `value` on one line in the order of its keys, as `json.dumps(value)`.
pub fn one_line(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value, None);
    out
}

/// Returns the shortest text of a finite float that reads back equal, in the form of Python's `repr`.
pub fn float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Writes `value`; `depth` is the indent level, `None` for everything on one line.
fn write_value(out: &mut String, value: &Value, depth: Option<usize>) {
    match value {
        Value::Number(n) if n.is_f64() => out.push_str(&float(n.as_f64().unwrap_or(0.0))),
        Value::String(s) => write_string(out, s),
        Value::Array(items) => {
            write_list(out, '[', ']', depth, items.iter(), write_value);
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            if depth.is_some() {
                entries.sort_by_key(|(key, _)| *key);
            }
            write_list(out, '{', '}', depth, entries.into_iter(), |out, (key, item), depth| {
                write_string(out, key);
                out.push_str(": ");
                write_value(out, item, depth);
            });
        }
        other => out.push_str(&other.to_string()),
    }
}

fn write_list<T>(
    out: &mut String,
    open: char,
    close: char,
    depth: Option<usize>,
    items: impl ExactSizeIterator<Item = T>,
    mut write: impl FnMut(&mut String, T, Option<usize>),
) {
    out.push(open);
    let empty = items.len() == 0;
    let inner = depth.map(|d| d + 1);
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.push_str(if inner.is_some() { "," } else { ", " });
        }
        new_line(out, inner);
        write(out, item, inner);
    }
    if !empty {
        new_line(out, depth);
    }
    out.push(close);
}

fn new_line(out: &mut String, depth: Option<usize>) {
    if let Some(depth) = depth {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', 2 * depth));
    }
}

fn write_string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn floats_look_like_python() {
        for (value, text) in [
            (1e-5, "1e-05"),
            (1e-4, "0.0001"),
            (1.5e-7, "1.5e-07"),
            (16.0, "16.0"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e100, "1.25e+100"),
            (0.130_844_116_210_937_5, "0.1308441162109375"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn layouts() {
        let value = json!({"b": [1, 2.0, []], "a": {"x": null, "y": {}}, "s": "é\u{7f}\u{1F600}\"\\\n"});
        assert_eq!(
            one_line(&value),
            r#"{"b": [1, 2.0, []], "a": {"x": null, "y": {}}, "s": "\u00e9\u007f\ud83d\ude00\"\\\n"}"#
        );
        assert_eq!(
            pretty_sorted(&json!({"b": [1, 2], "a": {}})),
            "{\n  \"a\": {},\n  \"b\": [\n    1,\n    2\n  ]\n}"
        );
    }
}
