//! A JSON array of rows, read one element at a time.
//!
//! Called by kto-convert. The array is never held: a scanner that knows strings and brackets finds where an element
//! ends, and the element goes to the strict parser. An element that is bad inside does not end the stream; an array that
//! is not closed does, because nobody can say where the next row begins.

use crate::{
    json,
    rows::{Place, ReadOptions, Row, located, parse_row, too_long},
};
use kto_cli::{Error, Result, input};
use std::io::BufRead;

/// A stream of the elements of one JSON array.
pub struct JsonArray<R> {
    name: String,
    reader: R,
    options: ReadOptions,
    at: Place,
    state: State,
    element: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Before `[`.
    Start,
    /// After `[`: an element or `]`.
    First,
    /// After `,`: an element.
    Next,
    /// After `]`.
    Done,
}

/// How the scan of an element ended.
enum End {
    /// At a comma or the closing bracket, which is still unread.
    Found,
    TooLong,
    InputEnds,
}

impl<R: BufRead> JsonArray<R> {
    /// Reads an array from a byte stream; `name` stands for it in messages.
    pub fn new(name: String, reader: R, options: ReadOptions) -> Self {
        let at = Place { line: 1, column: 1, offset: 0 };
        Self { name, reader, options, at, state: State::Start, element: Vec::new() }
    }

    /// Returns the next element as a row, good or bad. `Err` means that the array itself is broken.
    pub fn next_row(&mut self) -> Result<Option<Row>> {
        if self.state == State::Start {
            match self.peek()? {
                None => return Ok(None),
                Some(b'[') => self.skip(1),
                Some(_) => {
                    return Err(self
                        .broken("expected a JSON array")
                        .with_hint("--in-format jsonl reads JSON Lines"));
                }
            }
            self.state = State::First;
        }
        if self.state == State::Done {
            return match self.peek()? {
                None => Ok(None),
                Some(_) => Err(self.broken("more text after the end of the array")),
            };
        }
        match self.peek()? {
            Some(b']') if self.state == State::First => {
                self.close();
                self.next_row()
            }
            Some(b']' | b',') => Err(self.broken("a comma with nothing after it")),
            None => Err(self.broken("unexpected end: the array is not closed")),
            Some(_) => self.element().map(Some),
        }
    }

    fn element(&mut self) -> Result<Row> {
        let place = self.at;
        let row = match self.scan()? {
            End::Found => parse_row(&self.name, place, &self.element, self.options),
            End::TooLong => {
                return Err(too_long(&self.name, place.line, "array element", self.options.max_line));
            }
            End::InputEnds => {
                // A stray quote makes the scan run to the end; the parser knows the better place.
                let fault = json::parse(&self.element).err().filter(|f| f.what != json::UNEXPECTED_END);
                return Err(match fault {
                    Some(fault) => located(&self.name, place, &fault),
                    None => self
                        .broken(&format!("unexpected end in the element that begins on line {}", place.line)),
                });
            }
        };
        match self.peek()? {
            Some(b',') => {
                self.skip(1);
                self.state = State::Next;
            }
            Some(b']') => self.close(),
            _ => return Err(self.broken("unexpected end: the array is not closed")),
        }
        Ok(row)
    }

    /// Collects the bytes of one element into `self.element`.
    fn scan(&mut self) -> Result<End> {
        self.element.clear();
        self.element.shrink_to(1 << 20);
        let (mut depth, mut inside, mut escaped) = (0_u64, false, false);
        loop {
            let chunk = self
                .reader
                .fill_buf()
                .map_err(|e| input::error(&format!("{}:{}", self.name, self.at.line), &e))?;
            if chunk.is_empty() {
                return Ok(End::InputEnds);
            }
            let mut found = None;
            for (i, &byte) in chunk.iter().enumerate() {
                if inside {
                    inside = escaped || byte != b'"';
                    escaped = byte == b'\\' && !escaped;
                    continue;
                }
                match byte {
                    b'"' => inside = true,
                    b'[' | b'{' => depth += 1,
                    b',' | b']' | b'}' if depth == 0 => {
                        found = Some(i);
                        break;
                    }
                    b']' | b'}' => depth -= 1,
                    _ => {}
                }
            }
            let taken = found.unwrap_or(chunk.len());
            if (self.element.len() + taken) as u64 > self.options.max_line {
                return Ok(End::TooLong);
            }
            self.element.extend_from_slice(&chunk[..taken]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io::BufReader;

    /// Reads with a buffer of `chunk` bytes, so that every boundary is met.
    fn read(text: &str, chunk: usize) -> Result<Vec<(u64, Result<Value>)>> {
        let reader = BufReader::with_capacity(chunk, text.as_bytes());
        let mut array = JsonArray::new("f".into(), reader, ReadOptions { max_line: 100, lossy: false });
        let mut rows = Vec::new();
        while let Some(row) = array.next_row()? {
            rows.push((row.line, row.value));
        }
        Ok(rows)
    }

    #[test]
    fn elements_are_found_at_every_buffer_size() {
        let text = "\u{feff} [\n  {\"a\": \"],}\\\"\\\\\", \"b\": [1, {\"c\": []}]} ,\n\n {\n\"a\": 2\n}, [], \"x\", 7 ] \n";
        for chunk in 3..40 {
            let rows = read(text, chunk).unwrap();
            let values: Vec<_> = rows.into_iter().map(|(line, v)| (line, v.unwrap())).collect();
            let expected = [
                (2, json!({"a": "],}\"\\", "b": [1, {"c": []}]})),
                (4, json!({"a": 2})),
                (6, json!([])),
                (6, json!("x")),
                (6, json!(7)),
            ];
            assert_eq!(values, expected);
        }
        assert!(read(" [ ] ", 2).unwrap().is_empty());
        assert!(read("", 2).unwrap().is_empty());
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
    fn a_broken_array_ends_the_stream() {
        for (text, expected) in [
            ("[1, 2", "f:1:6: unexpected end in the element that begins on line 1"),
            ("[1, ", "f:1:5: unexpected end: the array is not closed"),
            ("[1,]", "f:1:4: a comma with nothing after it"),
            ("[,1]", "f:1:2: a comma with nothing after it"),
            ("[1]\n[2]", "f:2:1: more text after the end of the array"),
            ("{}", "f:1:1: expected a JSON array"),
            ("[{\"a\": \"b}, {\"c\": 1}]", "f:1:15: expected `,` or `}`"),
            (&format!("[\n\"{}\"]", "x".repeat(200)), "f:2: array element longer than 100 bytes"),
        ] {
            assert_eq!(read(text, 7).unwrap_err().to_string(), expected, "{text}");
        }
    }
}
