//! A JSON object as places in its text, for rows whose texts are copied rather than rebuilt.
//!
//! Called by kto-convert. A string is kept as the JSON text between its quotes, in the one form that [`crate::json_out`] writes: so equal
//! spans are equal texts, and a span is written as it is. [`Fields::read`] takes what it is certain of and leaves everything else, good
//! or bad, to the strict parser ([`crate::json`]): it never says what is wrong. Deliberately absent: any other judgement of a row.

use crate::{chat, json, json_out};
use serde_json::Value;
use std::ops::Range;

/// Fields of a row, at most.
const MOST_FIELDS: usize = 24;
/// Brackets of a nested value, at most: far below the depth at which the parser gives up.
const MOST_BRACKETS: usize = 100;

/// The fields of one object. Kept from row to row: its buffers are used again.
#[derive(Default)]
pub struct Fields {
    fields: Vec<(Range<usize>, Field)>,
    /// The turns of all message lists.
    turns: Vec<Turn>,
    /// The text in the written form, when it came in another one.
    rewritten: String,
    is_rewritten: bool,
}

/// The value of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// What stands between the quotes.
    Text(Range<usize>),
    /// A list of messages, each of a role and a text and nothing else: numbers of turns.
    Turns(Range<usize>),
    /// A number, as it is written.
    Number(Range<usize>),
    /// True or false.
    Bool(bool),
    /// Null.
    Null,
    /// A list or an object of another kind.
    Nested(Value),
}

/// A message: its role and what is said, between their quotes.
#[derive(Clone, Debug)]
struct Turn {
    role: Range<usize>,
    content: Range<usize>,
}

/// Why a text is not taken as it is.
enum Leave {
    /// It has escapes that are written otherwise.
    Rewrite,
    /// The strict parser is to say.
    Parser,
}

type Taken<T> = Result<T, Leave>;

impl Fields {
    /// Reads the object that `line` is. False: it is to be parsed.
    pub fn read(&mut self, line: &[u8]) -> bool {
        let Ok(text) = std::str::from_utf8(line) else { return false };
        self.is_rewritten = false;
        match self.scan(text) {
            Ok(()) => true,
            Err(Leave::Parser) => false,
            Err(Leave::Rewrite) => {
                let mut own = std::mem::take(&mut self.rewritten);
                let good = rewrite(text, &mut own) && self.scan(&own).is_ok();
                self.rewritten = own;
                self.is_rewritten = good;
                good
            }
        }
    }

    /// The fields with their names, in order. `line` is what was read.
    pub fn iter<'a>(&'a self, line: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a Field)> {
        self.fields.iter().map(move |(name, field)| (self.at(line, name), field))
    }

    /// How many fields there are.
    pub fn len(&self) -> usize {
        self.fields.len()
    }

    /// True for an object without fields.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    /// A field by its number.
    pub fn field(&self, number: usize) -> &Field {
        &self.fields[number].1
    }

    /// The text at a place. `line` is what was read.
    pub fn at<'a>(&'a self, line: &'a [u8], place: &Range<usize>) -> &'a [u8] {
        let text = if self.is_rewritten { self.rewritten.as_bytes() } else { line };
        &text[place.clone()]
    }

    /// Role and content of a turn, by its number.
    pub fn turn<'a>(&'a self, line: &'a [u8], number: usize) -> (&'a [u8], &'a [u8]) {
        let turn = &self.turns[number];
        (self.at(line, &turn.role), self.at(line, &turn.content))
    }

    /// Appends a field as the records have it.
    pub fn write(&self, line: &[u8], field: &Field, out: &mut Vec<u8>) {
        match field {
            Field::Text(place) => {
                out.push(b'"');
                out.extend_from_slice(self.at(line, place));
                out.push(b'"');
            }
            Field::Turns(turns) => write_turns(turns.clone().map(|i| self.turn(line, i)), out),
            Field::Number(place) => out.extend_from_slice(self.at(line, place)),
            Field::Bool(true) => out.extend_from_slice(b"true"),
            Field::Bool(false) => out.extend_from_slice(b"false"),
            Field::Null => out.extend_from_slice(b"null"),
            Field::Nested(value) => json_out::value(value, out),
        }
    }

    fn scan(&mut self, text: &str) -> Taken<()> {
        self.fields.clear();
        self.turns.clear();
        let mut scan = Scan { text: text.as_bytes(), at: 0 };
        scan.expect(b'{')?;
        if scan.peek() != Some(b'}') {
            loop {
                let name = scan.string()?;
                if self.fields.len() == MOST_FIELDS || scan.text[name.clone()].contains(&b'\\') {
                    return Err(Leave::Parser);
                }
                scan.expect(b':')?;
                let value = self.value(&mut scan, text)?;
                self.fields.push((name, value));
                match scan.next() {
                    Some(b',') => {}
                    Some(b'}') => break,
                    _ => return Err(Leave::Parser),
                }
            }
        } else {
            scan.at += 1;
        }
        if scan.peek().is_some() { Err(Leave::Parser) } else { Ok(()) }
    }

    fn value(&mut self, scan: &mut Scan<'_>, text: &str) -> Taken<Field> {
        match scan.peek() {
            Some(b'"') => scan.string().map(Field::Text),
            Some(b't') => scan.word(b"true").map(|()| Field::Bool(true)),
            Some(b'f') => scan.word(b"false").map(|()| Field::Bool(false)),
            Some(b'n') => scan.word(b"null").map(|()| Field::Null),
            Some(b'-' | b'0'..=b'9') => scan.number(text).map(Field::Number),
            Some(b'[') => {
                let (start, first) = (scan.at, self.turns.len());
                match self.messages(scan) {
                    Err(Leave::Parser) => {
                        self.turns.truncate(first);
                        scan.at = start;
                        scan.nested(text)
                    }
                    taken => taken.map(|()| Field::Turns(first..self.turns.len())),
                }
            }
            Some(b'{') => scan.nested(text),
            _ => Err(Leave::Parser),
        }
    }

    /// Takes a list of messages; one that holds anything else, or in another order, is left.
    fn messages(&mut self, scan: &mut Scan<'_>) -> Taken<()> {
        scan.expect(b'[')?;
        loop {
            scan.expect(b'{')?;
            scan.key(b"role")?;
            let role = scan.string()?;
            scan.expect(b',')?;
            scan.key(b"content")?;
            let content = scan.string()?;
            scan.expect(b'}')?;
            self.turns.push(Turn { role, content });
            match scan.next() {
                Some(b',') => {}
                Some(b']') => return Ok(()),
                _ => return Err(Leave::Parser),
            }
        }
    }
}

/// Appends a message list.
pub fn write_turns<'a>(turns: impl Iterator<Item = (&'a [u8], &'a [u8])>, out: &mut Vec<u8>) {
    for (i, (role, content)) in turns.enumerate() {
        out.extend_from_slice(if i == 0 { b"[{\"role\": \"" } else { b", {\"role\": \"" });
        out.extend_from_slice(role);
        out.extend_from_slice(b"\", \"content\": \"");
        out.extend_from_slice(content);
        out.extend_from_slice(b"\"}");
    }
    out.push(b']');
}

/// True for the role of a message that a template can render.
pub fn is_role(role: &[u8]) -> bool {
    chat::ROLES.iter().any(|known| known.as_bytes() == role)
}

/// True when a string, as it is between its quotes, holds nothing but blanks.
pub fn is_blank(span: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(span) else { return false };
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        let blank = match c {
            '\\' => match rest.next() {
                Some('n' | 'r' | 't' | 'f') => true,
                // The one blank without a short escape.
                Some('u') => rest.by_ref().take(4).eq("000b".chars()),
                _ => false,
            },
            c => c.is_whitespace(),
        };
        if !blank {
            return false;
        }
    }
    true
}

/// A place in a JSON text.
struct Scan<'a> {
    text: &'a [u8],
    at: usize,
}

impl Scan<'_> {
    /// The next byte that is no blank; it stays.
    fn peek(&mut self) -> Option<u8> {
        while let Some(byte) = self.text.get(self.at) {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(*byte);
            }
            self.at += 1;
        }
        None
    }

    /// The same; it is taken.
    fn next(&mut self) -> Option<u8> {
        let byte = self.peek();
        self.at += usize::from(byte.is_some());
        byte
    }

    fn expect(&mut self, byte: u8) -> Taken<()> {
        if self.next() == Some(byte) { Ok(()) } else { Err(Leave::Parser) }
    }

    fn word(&mut self, word: &[u8]) -> Taken<()> {
        if !self.text[self.at..].starts_with(word) {
            return Err(Leave::Parser);
        }
        self.at += word.len();
        Ok(())
    }

    fn key(&mut self, name: &[u8]) -> Taken<()> {
        let found = self.string()?;
        if &self.text[found] == name { self.expect(b':') } else { Err(Leave::Parser) }
    }

    /// Takes a string; returns what is between its quotes.
    fn string(&mut self) -> Taken<Range<usize>> {
        self.expect(b'"')?;
        let start = self.at;
        loop {
            self.at += json_out::plain(&self.text[self.at..]);
            match self.text.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(start..self.at - 1);
                }
                Some(b'\\') => self.escape()?,
                _ => return Err(Leave::Parser),
            }
        }
    }

    /// Passes over an escape that is written as it stands here.
    fn escape(&mut self) -> Taken<()> {
        match self.text.get(self.at + 1) {
            Some(b'"' | b'\\' | b'n' | b'r' | b't' | b'b' | b'f') => {
                self.at += 2;
                Ok(())
            }
            Some(b'u') => match self.text.get(self.at + 2..self.at + 6) {
                Some(digits) if is_control(digits) => {
                    self.at += 6;
                    Ok(())
                }
                _ => Err(Leave::Rewrite),
            },
            Some(b'/') => Err(Leave::Rewrite),
            _ => Err(Leave::Parser),
        }
    }

    /// Takes a number that a 64-bit float can hold.
    fn number(&mut self, text: &str) -> Taken<Range<usize>> {
        let start = self.at;
        let digits = |scan: &mut Self| {
            let from = scan.at;
            while scan.text.get(scan.at).is_some_and(u8::is_ascii_digit) {
                scan.at += 1;
            }
            if scan.at == from { Err(Leave::Parser) } else { Ok(scan.at - from) }
        };
        self.at += usize::from(self.text[self.at] == b'-');
        let zero = self.text.get(self.at) == Some(&b'0');
        let mut long = digits(self)?;
        if zero && long > 1 {
            return Err(Leave::Parser);
        }
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            long += digits(self)?;
        }
        if matches!(self.text.get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            self.at += usize::from(matches!(self.text.get(self.at), Some(b'+' | b'-')));
            digits(self)?;
            long = usize::MAX;
        }
        // Three hundred digits fit; beyond that the value decides.
        let fits = long < 300 || text[start..self.at].parse().is_ok_and(f64::is_finite);
        if fits { Ok(start..self.at) } else { Err(Leave::Parser) }
    }

    /// Takes a list or an object through the strict parser.
    fn nested(&mut self, text: &str) -> Taken<Field> {
        let start = self.at;
        let (mut depth, mut brackets) = (0_usize, 0);
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.string()?;
                    continue;
                }
                Some(b'[' | b'{') => {
                    depth += 1;
                    brackets += 1;
                }
                Some(b']' | b'}') => depth -= 1,
                Some(_) => {}
                None => return Err(Leave::Parser),
            }
            self.at += 1;
            if depth == 0 {
                break;
            }
        }
        match json::parse(&text.as_bytes()[start..self.at]) {
            Ok(parsed) if !parsed.inexact && brackets <= MOST_BRACKETS => Ok(Field::Nested(parsed.value)),
            _ => Err(Leave::Parser),
        }
    }
}

/// True for the four digits of a control character that has no short escape, as they are written.
fn is_control(digits: &[u8]) -> bool {
    let second = digits[3];
    let low = digits[2] == b'0' && matches!(second, b'0'..=b'7' | b'b' | b'e' | b'f');
    let high = digits[2] == b'1' && matches!(second, b'0'..=b'9' | b'a'..=b'f');
    &digits[..2] == b"00" && (low || high)
}

/// Puts escapes into the form that is written. False: one of them says nothing.
fn rewrite(text: &str, out: &mut String) -> bool {
    out.clear();
    let mut rest = text;
    while let Some(at) = memchr::memchr(b'\\', rest.as_bytes()) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let taken = match rest.as_bytes().get(1) {
            Some(b'/') => {
                out.push('/');
                2
            }
            Some(b'u') => {
                let Some((c, taken)) = unescaped(rest.as_bytes()) else { return false };
                json_out::escaped(c, out);
                taken
            }
            Some(b'"' | b'\\' | b'n' | b'r' | b't' | b'b' | b'f') => {
                out.push_str(&rest[..2]);
                2
            }
            _ => return false,
        };
        rest = &rest[taken..];
    }
    out.push_str(rest);
    true
}

/// The character of a `\u` escape, or of a pair of them, and its length.
fn unescaped(text: &[u8]) -> Option<(char, usize)> {
    let first = u32::from(json::escaped_unit(text)?);
    if !(0xd800..0xe000).contains(&first) {
        return char::from_u32(first).map(|c| (c, 6));
    }
    let second = u32::from(json::escaped_unit(text.get(6..)?)?);
    if first >= 0xdc00 || !(0xdc00..0xe000).contains(&second) {
        return None;
    }
    char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)).map(|c| (c, 12))
}
