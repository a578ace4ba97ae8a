//! JSON texts that are not lines: the elements of one array, or values one behind the other.
//!
//! Called by kto-convert. The whole is never held: a scanner that knows strings and brackets finds where a text ends, and the text
//! goes to the strict parser. A text that is bad inside does not end the stream; an array that is not closed does,
//! because nobody can say where the next row begins.

use crate::{
    chunks::{self, Chunk, Source},
    json,
    rows::{Place, ReadOptions, located, too_long},
};
use kto_cli::{Error, Result, input};
use std::{io::BufRead, ops::Range, sync::Arc};

/// A stream of the elements of one JSON array, or of JSON values with nothing but blanks between them.
pub struct JsonTexts<R> {
    name: Arc<str>,
    reader: R,
    options: ReadOptions,
    at: Place,
    state: State,
    /// The texts of the next piece.
    texts: Vec<u8>,
    rows: Vec<(Place, Range<usize>)>,
    /// What is wrong behind them.
    broken: Option<Error>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Before everything.
    Start,
    /// Values without an array around them.
    Values,
    /// After `[`: an element or `]`.
    First,
    /// After `,`: an element.
    Next,
    /// After `]`.
    Done,
}

/// How the scan of a text ended.
enum End {
    /// Behind it; in an array at a comma or the closing bracket, which is still unread.
    Found,
    TooLong,
    InputEnds,
}

impl<R: BufRead> JsonTexts<R> {
    /// Reads a byte stream; `name` stands for it in messages.
    pub fn new(name: String, reader: R, options: ReadOptions) -> Self {
        let (at, name) = (Place { line: 1, column: 1, offset: 0 }, name.into());
        let (state, texts, rows) = (State::Start, Vec::new(), Vec::new());
        Self { name, reader, options, at, state, texts, rows, broken: None }
    }

    /// Adds the next text to the piece; false at the end.
    fn next_text(&mut self) -> Result<bool> {
        if self.state == State::Start {
            match self.peek()? {
                None => return Ok(false),
                Some(b'[') => {
                    self.skip(1);
                    self.state = State::First;
                }
                Some(_) => self.state = State::Values,
            }
        }
        match (self.peek()?, self.state) {
            (None, State::Done | State::Values) => Ok(false),
            (Some(_), State::Done) => Err(self.broken("more text after the end of the array")),
            (Some(_), State::Values) => self.text().map(|()| true),
            (Some(b']'), State::First) => {
                self.close();
                self.next_text()
            }
            (Some(b']' | b','), _) => Err(self.broken("a comma with nothing after it")),
            (None, _) => Err(self.broken("unexpected end: the array is not closed")),
            (Some(_), _) => self.element().map(|()| true),
        }
    }

    fn element(&mut self) -> Result<()> {
        self.text()?;
        match self.peek()? {
            Some(b',') => {
                self.skip(1);
                self.state = State::Next;
            }
            Some(b']') => self.close(),
            _ => return Err(self.broken("unexpected end: the array is not closed")),
        }
        Ok(())
    }

    fn text(&mut self) -> Result<()> {
        let (place, start) = (self.at, self.texts.len());
        let what = if self.state == State::Values { "value" } else { "element" };
        match self.scan(start)? {
            End::Found => {
                self.rows.push((place, start..self.texts.len()));
                Ok(())
            }
            End::TooLong => {
                let what = if what == "value" { "JSON value" } else { "array element" };
                Err(too_long(&self.name, place.line, what, self.options.max_line))
            }
            End::InputEnds => {
                // A stray quote makes the scan run to the end; the parser knows the better place.
                let fault =
                    json::parse(&self.texts[start..]).err().filter(|f| f.what != json::UNEXPECTED_END);
                Err(match fault {
                    Some(fault) => located(&self.name, place, &fault),
                    None => self
                        .broken(&format!("unexpected end in the {what} that begins on line {}", place.line)),
                })
            }
        }
    }

    /// Appends the bytes of one text, which begin at `start` of the piece.
    fn scan(&mut self, start: usize) -> Result<End> {
        let alone = self.state == State::Values;
        let mut scan = Scan { alone, ..Scan::default() };
        loop {
            let chunk = self
                .reader
                .fill_buf()
                .map_err(|e| input::error(&format!("{}:{}", self.name, self.at.line), &e))?;
            if chunk.is_empty() {
                // A word or number has no end of its own.
                return Ok(if alone && scan.is_word() { End::Found } else { End::InputEnds });
            }
            let found = scan.end(chunk);
            let taken = found.unwrap_or(chunk.len());
            if (self.texts.len() - start + taken) as u64 > self.options.max_line {
                return Ok(End::TooLong);
            }
            self.texts.extend_from_slice(&chunk[..taken]);
            self.at.advance(&chunk[..taken]);
            self.reader.consume(taken);
            if found.is_some() {
                return Ok(End::Found);
            }
        }
    }

    /// The next byte that is not blank, left unread.
    fn peek(&mut self) -> Result<Option<u8>> {
        loop {
            let chunk = self
                .reader
                .fill_buf()
                .map_err(|e| input::error(&format!("{}:{}", self.name, self.at.line), &e))?;
            if chunk.is_empty() {
                return Ok(None);
            }
            let bom = if self.at.offset == 0 && chunk.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
            let blanks = bom + chunk[bom..].iter().take_while(|b| b.is_ascii_whitespace()).count();
            let next = chunk.get(blanks).copied();
            self.at.advance(&chunk[..blanks]);
            self.reader.consume(blanks);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    fn skip(&mut self, bytes: usize) {
        self.reader.consume(bytes);
        self.at.column += bytes as u64;
        self.at.offset += bytes as u64;
    }

    fn close(&mut self) {
        self.skip(1);
        self.state = State::Done;
    }

    fn broken(&self, what: &str) -> Error {
        Error::data(format!("{}:{}:{}: {what}", self.name, self.at.line, self.at.column))
    }
}

impl<R: BufRead + Send> Source for JsonTexts<R> {
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        while self.texts.len() < chunks::SIZE {
            match self.next_text() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if self.rows.is_empty() => return Err(error),
                Err(error) => {
                    self.broken = Some(error);
                    break;
                }
            }
        }
        let (texts, rows) = (std::mem::take(&mut self.texts), std::mem::take(&mut self.rows));
        Ok((!rows.is_empty()).then(|| Chunk::texts(&self.name, self.options, texts, rows)))
    }
}

/// Finds the end of a text that comes in parts.
#[derive(Default)]
struct Scan {
    /// Nothing around the values: a text ends with its own last byte, a word in front of what cannot belong to it.
    alone: bool,
    depth: u64,
    inside: bool,
    escaped: bool,
    begun: bool,
}

impl Scan {
    /// Returns where in `part` the text ends.
    fn end(&mut self, part: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < part.len() {
            if self.inside {
                if self.escaped {
                    self.escaped = false;
                    at += 1;
                    continue;
                }
                at += memchr::memchr2(b'"', b'\\', &part[at..])?;
                self.escaped = part[at] == b'\\';
                self.inside = self.escaped;
                at += 1;
                if !self.inside && self.alone && self.depth == 0 {
                    return Some(at);
                }
                continue;
            }
            match part[at] {
                b'"' if self.alone && self.depth == 0 && self.begun => return Some(at),
                b'"' => self.inside = true,
                b'[' | b'{' if self.alone && self.depth == 0 && self.begun => return Some(at),
                b'[' | b'{' => self.depth += 1,
                b',' | b']' | b'}' if self.depth == 0 && (!self.alone || self.begun) => return Some(at),
                b']' | b'}' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.alone && self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                byte if self.alone && self.depth == 0 && byte.is_ascii_whitespace() => return Some(at),
                _ => {}
            }
            self.begun = true;
            at += 1;
        }
        None
    }

    fn is_word(&self) -> bool {
        self.depth == 0 && !self.inside && self.begun
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io::BufReader;

    /// Reads with a buffer of `size` bytes, so that every boundary is met.
    fn read(text: &str, size: usize) -> Result<Vec<(u64, Result<Value>)>> {
        let reader = BufReader::with_capacity(size, text.as_bytes());
        let mut texts = JsonTexts::new("f".into(), reader, ReadOptions { max_line: 100, lossy: false });
        let mut rows = Vec::new();
        while let Some(chunk) = texts.next_chunk()? {
            chunk.rows(|row, _| {
                rows.push((row.line, row.value));
                Ok(())
            })?;
        }
        Ok(rows)
    }

    fn good(text: &str, size: usize) -> Vec<(u64, Value)> {
        read(text, size).unwrap().into_iter().map(|(line, v)| (line, v.unwrap())).collect()
    }

    #[test]
    fn elements_are_found_at_every_buffer_size() {
        let text = "\u{feff} [\n  {\"a\": \"],}\\\"\\\\\", \"b\": [1, {\"c\": []}]} ,\n\n {\n\"a\": 2\n}, [], \"x\", 7 ] \n";
        for size in 3..40 {
            let expected = [
                (2, json!({"a": "],}\"\\", "b": [1, {"c": []}]})),
                (4, json!({"a": 2})),
                (6, json!([])),
                (6, json!("x")),
                (6, json!(7)),
            ];
            assert_eq!(good(text, size), expected);
        }
        assert!(good(" [ ] ", 2).is_empty());
        assert!(good("", 2).is_empty());
    }

    #[test]
    fn values_without_an_array_are_found_at_every_buffer_size() {
        let text = "{\n \"a\": \"}\\\"{\"\n}{\"b\": [1]} {\"c\": {}}\n\n  {\"d\": 1}\n7 true\"x\"{}";
        for size in 1..40 {
            let expected = [
                (1, json!({"a": "}\"{"})),
                (3, json!({"b": [1]})),
                (3, json!({"c": {}})),
                (5, json!({"d": 1})),
                (6, json!(7)),
                (6, json!(true)),
                (6, json!("x")),
                (6, json!({})),
            ];
            assert_eq!(good(text, size), expected);
        }
        assert_eq!(good("{\"a\": 1}\n8", 3), [(1, json!({"a": 1})), (2, json!(8))]);
    }

    #[test]
    fn a_bad_element_has_its_place_and_does_not_end_the_array() {
        let rows = read("[{\"a\": 1},\n {\"a\": x}, {\"a\":\n y}, {\"a\": 4}]", 8).unwrap();
        let error = |i: usize| rows[i].1.as_ref().unwrap_err().to_string();
        assert_eq!(error(1), "f:2:8: unexpected 'x' in JSON");
        assert_eq!(error(2), "f:3:2: unexpected 'y' in JSON");
        assert_eq!(rows[3].1.as_ref().unwrap(), &json!({"a": 4}));
    }

    #[test]
    fn a_broken_stream_ends_behind_its_good_rows() {
        for (text, expected) in [
            ("[1, 2", "f:1:6: unexpected end in the element that begins on line 1"),
            ("[1, ", "f:1:5: unexpected end: the array is not closed"),
            ("[1,]", "f:1:4: a comma with nothing after it"),
            ("[,1]", "f:1:2: a comma with nothing after it"),
            ("[1]\n[2]", "f:2:1: more text after the end of the array"),
            ("[{\"a\": \"b}, {\"c\": 1}]", "f:1:15: expected `,` or `}`"),
            ("{\"a\": 1}\n{\"b\":\n", "f:3:1: unexpected end in the value that begins on line 2"),
            (&format!("[\n\"{}\"]", "x".repeat(200)), "f:2: array element longer than 100 bytes"),
            (&format!("{{\n\"{}\"}}", "x".repeat(200)), "f:1: JSON value longer than 100 bytes"),
        ] {
            assert_eq!(read(text, 7).unwrap_err().to_string(), expected, "{text}");
        }
    }
}
