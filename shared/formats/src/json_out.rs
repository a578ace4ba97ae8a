//! JSON text as the records have it: on one line, with the spacing of Python's `json.dumps` (`, ` and `: `), which the peers' files
//! have, and all characters that need no escape as they are.
//!
//! Called by [`crate::record`] and kto-convert. The bytes are serde_json's but for the spacing; writing strings is what a
//! conversion does most, so it is done eight bytes at a time.

use serde_json::{Map, Value};

/// Appends a value.
pub fn value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) => out.extend_from_slice(number.to_string().as_bytes()),
        Value::String(string) => text(string, out),
        Value::Array(items) => list(items, out),
        Value::Object(fields) => object(fields, out),
    }
}

/// Appends a list.
pub fn list(items: &[Value], out: &mut Vec<u8>) {
    out.push(b'[');
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.extend_from_slice(b", ");
        }
        value(item, out);
    }
    out.push(b']');
}

/// Appends an object.
pub fn object(fields: &Map<String, Value>, out: &mut Vec<u8>) {
    out.push(b'{');
    for (i, (name, field)) in fields.iter().enumerate() {
        if i > 0 {
            out.extend_from_slice(b", ");
        }
        text(name, out);
        out.extend_from_slice(b": ");
        value(field, out);
    }
    out.push(b'}');
}

/// Appends a string with its quotes.
pub fn text(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    out.reserve(bytes.len() + 2);
    out.push(b'"');
    let mut rest = bytes;
    loop {
        let plain = plain(rest);
        out.extend_from_slice(&rest[..plain]);
        let Some(byte) = rest.get(plain) else { break };
        escape(*byte, out);
        rest = &rest[plain + 1..];
    }
    out.push(b'"');
}

/// Bytes that are looked at together.
const BLOCK: usize = 32;

/// How many bytes at the beginning need no escape.
pub(crate) fn plain(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    // The high bit of each byte that is zero; the lowest of them is exact, which is all that is asked.
    let zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGH;
    // Long stretches first, in blocks that compilers make SIMD of.
    let special = |byte: &u8| (*byte < 0x20) | (*byte == b'"') | (*byte == b'\\');
    let blocks = bytes.chunks_exact(BLOCK);
    let free = |block: &&[u8]| !block.iter().fold(false, |found, byte| found | special(byte));
    let mut at = BLOCK * blocks.take_while(free).count();
    for eight in bytes[at..].chunks_exact(8) {
        let word = u64::from_le_bytes([
            eight[0], eight[1], eight[2], eight[3], eight[4], eight[5], eight[6], eight[7],
        ]);
        let control = word.wrapping_sub(ONES * 0x20) & !word & HIGH;
        let found = control | zero(word ^ (ONES * 0x22)) | zero(word ^ (ONES * 0x5c));
        if found != 0 {
            return at + found.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let tail = &bytes[at..];
    at + tail.iter().position(|b| *b < 0x20 || matches!(b, b'"' | b'\\')).unwrap_or(tail.len())
}

/// Appends a character as it is written between quotes.
pub(crate) fn escaped(c: char, out: &mut String) {
    if c >= ' ' && c != '"' && c != '\\' {
        return out.push(c);
    }
    let mut text = Vec::with_capacity(6);
    escape(c as u8, &mut text);
    out.extend(text.into_iter().map(char::from));
}

fn escape(byte: u8, out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        b'"' => b'"',
        b'\\' => b'\\',
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        0x08 => b'b',
        0x0c => b'f',
        _ => {
            let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
            out.extend_from_slice(b"\\u00");
            out.extend_from_slice(&digits);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn written(of: &Value) -> String {
        let mut out = Vec::new();
        value(of, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn strings_are_serde_jsons() {
        let mut state = 1_u64;
        for length in 0..300 {
            let text: String = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    match state >> 61 {
                        0 => char::from((state >> 40) as u8 & 0x1f),
                        1 => ['"', '\\', '\u{7f}', '/', '\u{80}', '!', '#', '['][(state >> 50) as usize & 7],
                        2 => char::from_u32((state >> 40) as u32 & 0xffff).unwrap_or('x'),
                        3 => '\u{1f914}',
                        _ => char::from(b' ' + ((state >> 40) as u8 & 0x3f)),
                    }
                })
                .collect();
            let expected = serde_json::to_string(&text).unwrap();
            assert_eq!(written(&Value::String(text)), expected);
        }
        for byte in 0..=0x7f_u8 {
            for at in 0..20 {
                let text = format!("{}{}{}", "a".repeat(at), char::from(byte), "b".repeat(9));
                assert_eq!(written(&json!(text)), serde_json::to_string(&text).unwrap());
            }
        }
    }

    #[test]
    fn the_spacing_is_pythons() {
        let value =
            json!({"a": [1, 2.5, -3.5, null, true, false], "b": {}, "c": [], "d": {"e": "f", "g": 1.0}});
        let expected =
            r#"{"a": [1, 2.5, -3.5, null, true, false], "b": {}, "c": [], "d": {"e": "f", "g": 1.0}}"#;
        assert_eq!(written(&value), expected);
        assert_eq!(written(&value).replace(": ", ":").replace(", ", ","), value.to_string());
    }
}
