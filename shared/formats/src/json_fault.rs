//! What is wrong with a JSON text, in our words and with what to do about it.
//!
//! Called by [`crate::json`] only. Texts that are no JSON at all (UTF-16, HTML, Git LFS pointers, Python literals, old Mac
//! line ends) are named for what they are.

/// The words for NUL bytes; the column of that fault counts bytes of the whole text, not of a line.
pub const NUL: &str = "NUL bytes";

/// The words for a text that ends before its value does.
pub const UNEXPECTED_END: &str = "unexpected end of the JSON text";

/// What is wrong with a JSON text.
#[derive(Debug)]
pub struct Fault {
    /// Line inside the text, from 1.
    pub line: u64,
    /// Byte column inside that line, from 1 (0: the line as a whole).
    pub column: u64,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// The fault of a text that is not UTF-8 from byte `at` on.
pub(crate) fn utf8_fault(text: &[u8], at: usize) -> Fault {
    let line = 1 + text[..at].iter().filter(|b| **b == b'\n').count() as u64;
    let start = text[..at].iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
    Fault {
        line,
        column: (at - start) as u64 + 1,
        what: format!("invalid UTF-8 (byte 0x{:02x})", text[at]),
        hint: Some("kto-convert --lossy replaces it by U+FFFD".into()),
    }
}

/// Turns serde_json's error into our words.
pub(crate) fn fault(text: &[u8], error: &serde_json::Error) -> Fault {
    let (line, column) = (error.line() as u64, error.column() as u64);
    let raw = error.to_string();
    let words = raw.split(" at line ").next().unwrap_or(&raw);
    let fault = |what: &str, hint: Option<&str>| Fault {
        line,
        column,
        what: what.into(),
        hint: hint.map(Into::into),
    };
    if let Some(fault) = foreign(text) {
        return fault;
    }
    if words.contains("surrogate") || (words.contains("unexpected end of hex escape") && !error.is_eof()) {
        return fault(
            "lone surrogate escape (half a character)",
            Some("kto-convert --lossy replaces it by U+FFFD"),
        );
    }
    if error.is_eof() {
        return match text.trim_ascii() {
            b"[" => fault("this is a JSON array, not JSON Lines", Some("jq -c '.[]' FILE, or kto-convert")),
            b"{" => {
                fault("this is a JSON object over several lines", Some("one object a line: jq -c . FILE"))
            }
            _ => fault(UNEXPECTED_END, None),
        };
    }
    match words {
        "trailing characters" => trailing(text, line, column),
        "trailing comma" => fault("a comma with nothing after it", None),
        "recursion limit exceeded" => fault("nesting deeper than 128", None),
        "control character (\\u0000-\\u001F) found while parsing a string" => fault(
            "raw control character inside a string",
            Some("JSON writes it as an escape such as \\n or \\u0007"),
        ),
        "number out of range" => fault("a number too large for a 64-bit float", None),
        "key must be a string" | "expected value" | "expected ident" => {
            fault(&unexpected(text, line, column), None)
        }
        other => fault(other, None),
    }
}

/// Texts that are not JSON at all and that we can name.
fn foreign(text: &[u8]) -> Option<Fault> {
    let whole = |what: String, hint: Option<&str>| {
        Some(Fault { line: 1, column: 0, what, hint: hint.map(Into::into) })
    };
    let body = text.trim_ascii_start();
    if let Some(at) = text.iter().position(|b| *b == 0) {
        let alternate = text.len() > 3 && text.chunks_exact(2).take(8).all(|c| (c[0] == 0) != (c[1] == 0));
        if alternate {
            return whole("this looks like UTF-16, not UTF-8".into(), Some("iconv -f UTF-16 -t UTF-8 FILE"));
        }
        return Some(Fault { line: 1, column: at as u64 + 1, what: NUL.into(), hint: None });
    }
    if body.starts_with(b"version https://git-lfs") {
        return whole("this is a Git LFS pointer, not the data".into(), Some("run git lfs pull"));
    }
    if body.starts_with(b"<") {
        return whole("this looks like an HTML or XML page, not JSON".into(), None);
    }
    if [&b"{'"[..], b"[{'", b"{u'"].iter().any(|p| body.starts_with(p)) {
        return whole("this is a Python literal, not JSON".into(), Some("write rows with json.dumps"));
    }
    None
}

fn trailing(text: &[u8], line: u64, column: u64) -> Fault {
    let start = text.split(|b| *b == b'\n').take(line as usize - 1).map(|l| l.len() + 1).sum::<usize>();
    let at = (start + column as usize).saturating_sub(1).min(text.len());
    let old_mac =
        text[..at].trim_ascii_end().len() < at && text[..at].contains(&b'\r') && !text.contains(&b'\n');
    let (what, hint) = if old_mac {
        ("lines end in CR only (old Mac text)", "tr '\\r' '\\n' < FILE")
    } else {
        ("more text after the end of the JSON value", "one value a line: jq -c . FILE")
    };
    Fault { line, column, what: what.into(), hint: Some(hint.into()) }
}

fn unexpected(text: &[u8], line: u64, column: u64) -> String {
    let found = text.split(|b| *b == b'\n').nth(line as usize - 1).unwrap_or_default();
    let rest = &found[(column as usize).saturating_sub(1).min(found.len())..];
    match String::from_utf8_lossy(rest).chars().next() {
        Some(c) => format!("unexpected {:?} in JSON", c),
        None => "not a JSON value".into(),
    }
}
