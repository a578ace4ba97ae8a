//! The messages of an Arrow IPC stream, decoded one at a time.
//!
//! Called by [`crate::tokens`] and [`crate::columnar`]. The framing is ours: lengths are capped before anything is allocated, and a
//! missing end marker is noticed. The content of each message is decoded by arrow behind a guard, because it is known to
//! panic on some damaged streams.

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::{Endianness, convert::try_fb_to_schema, reader::StreamDecoder, root_as_message};
use arrow_schema::{ArrowError, Schema};
use kto_cli::{Error, Kind, Result, escape, guard};
use std::io::{self, Read};

/// Bytes of a message's header, at most.
const HEADER_CAP: u64 = 16 << 20;
/// Bytes of a message's body, at most. Ours are below 200 MiB.
const BODY_CAP: u64 = 4 << 30;
/// What an Arrow file begins and ends with.
const MAGIC: &[u8] = b"ARROW1";

/// What the bytes should be.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Form {
    /// A token file of ours.
    Tokens,
    /// A stream of somebody else.
    Stream,
    /// An Arrow file: the stream's messages between two marks, with a footer that is not needed.
    File,
}

/// A stream of messages.
pub(crate) struct Frames<R> {
    reader: R,
    form: Form,
    position: u64,
    decoder: StreamDecoder,
}

/// One message.
pub(crate) struct Frame {
    /// Marker, length, header and body.
    bytes: Vec<u8>,
    /// Bytes of the header, which begins at 8.
    header: usize,
}

impl<R: Read> Frames<R> {
    pub fn new(reader: R, form: Form) -> Self {
        Self { reader, form, position: 0, decoder: StreamDecoder::new() }
    }

    /// Reads the first message, which must be the schema.
    pub fn schema(&mut self) -> Result<Schema> {
        if self.form == Form::File {
            let mut magic = Vec::new();
            self.take(&mut magic, 8, "the file ends in its first mark")?;
        }
        let first = self.next()?.ok_or_else(|| Error::data("an Arrow stream without a schema"))?;
        let message = root_as_message(&first.bytes[8..8 + first.header]);
        let Some(schema) = message.ok().and_then(|m| m.header_as_schema()) else {
            return Err(Error::data("an Arrow stream that does not begin with a schema"));
        };
        if schema.endianness() != Endianness::Little {
            return Err(Error::data("a big-endian Arrow stream, only little-endian ones are read"));
        }
        let schema = guard::catch("Arrow schema", || try_fb_to_schema(schema))?.map_err(damaged)?;
        self.decode(first, |_| Ok(()))?;
        Ok(schema)
    }

    /// Gives the next message's batch, if it has one, to `each`; false at the end-of-stream marker.
    pub fn batches(&mut self, each: impl FnMut(RecordBatch) -> Result<()>) -> Result<bool> {
        match self.next()? {
            Some(frame) => self.decode(frame, each).map(|()| true),
            None => self.end().map(|()| false),
        }
    }

    fn decode(&mut self, frame: Frame, mut each: impl FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        let mut buffer = Buffer::from_vec(frame.bytes);
        // A batch without a body is handed out when the next message comes, hence the loop.
        while !buffer.is_empty() {
            let decoded = guard::catch("Arrow message", || self.decoder.decode(&mut buffer))?;
            if let Some(batch) = decoded.map_err(damaged)? {
                guard::catch("Arrow batch", || each(batch))??;
            }
        }
        Ok(())
    }

    /// Returns the next message, or None at the end-of-stream marker.
    fn next(&mut self) -> Result<Option<Frame>> {
        let start = self.position;
        let mut bytes = Vec::new();
        self.take(&mut bytes, 8, "the end-of-stream marker is missing")?;
        // Some writers fill up the space behind a file's first mark.
        while self.form == Form::File && bytes == [0; 8] && self.position <= 64 {
            bytes.clear();
            self.take(&mut bytes, 8, "the file ends behind its first mark")?;
        }
        if bytes[..4] != [0xff; 4] {
            return Err(self.not_ours(start, &bytes));
        }
        let header = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        if header == 0 {
            return Ok(None);
        }
        if u64::from(header) > HEADER_CAP {
            return Err(Error::data(format!("byte {start}: a message header of {header} bytes")));
        }
        self.take(&mut bytes, u64::from(header), "the stream ends inside a message")?;
        let body = match root_as_message(&bytes[8..]) {
            Ok(message) => message.bodyLength(),
            Err(_) => return Err(Error::data(format!("byte {start}: a damaged Arrow message"))),
        };
        let body = u64::try_from(body).ok().filter(|length| *length <= BODY_CAP);
        let body =
            body.ok_or_else(|| Error::data(format!("byte {start}: an Arrow message of impossible length")))?;
        self.take(&mut bytes, body, "the stream ends inside a batch")?;
        Ok(Some(Frame { bytes, header: header as usize }))
    }

    /// Appends `count` bytes. Memory grows with what arrives, not with what a length field claims.
    fn take(&mut self, bytes: &mut Vec<u8>, count: u64, missing: &str) -> Result<()> {
        let got = self.reader.by_ref().take(count).read_to_end(bytes).map_err(|e| self.failed(&e))? as u64;
        self.position += got;
        if got == count {
            return Ok(());
        }
        let text = match (self.position, self.form) {
            (0, Form::Tokens) => "empty, not a token file".to_string(),
            (position, _) => format!("cut at byte {position}: {missing}"),
        };
        Err(match self.form {
            Form::Tokens => Error::data(text)
                .with_hint("the program that wrote it did not finish; run kto-tokenize again"),
            Form::Stream | Form::File => Error::data(text),
        })
    }

    /// Checks what follows the end-of-stream marker: nothing, or a file's footer.
    fn end(&mut self) -> Result<()> {
        if self.form == Form::File {
            let mut footer = Vec::new();
            let cap = self.reader.by_ref().take(HEADER_CAP);
            { cap }.read_to_end(&mut footer).map_err(|e| self.failed(&e))?;
            return match footer.ends_with(MAGIC) {
                true => Ok(()),
                false => Err(Error::data("cut: the Arrow file's footer is not complete")),
            };
        }
        let mut byte = Vec::new();
        self.reader.by_ref().take(1).read_to_end(&mut byte).map_err(|e| self.failed(&e))?;
        match byte.is_empty() {
            true => Ok(()),
            false => Err(Error::data(format!(
                "byte {}: more bytes behind the end-of-stream marker",
                self.position
            ))),
        }
    }

    fn not_ours(&self, start: u64, bytes: &[u8]) -> Error {
        if start > 0 {
            return Error::data(format!("byte {start}: damaged, no Arrow message begins here"));
        }
        if self.form != Form::Tokens {
            return Error::data("not an Arrow stream");
        }
        let what = match bytes {
            [b'{' | b'[', ..] => "JSON, not a token file",
            [b'A', b'R', b'R', b'O', b'W', b'1', ..] => "an Arrow file, not an Arrow stream",
            [b'P', b'A', b'R', b'1', ..] => "Parquet, not a token file",
            [0x1f, 0x8b, ..] => "gzip, not a token file",
            _ => "not a token file",
        };
        Error::data(what).with_hint("kto-tokenize --model DIR RECORDS.jsonl -o TOKENS.kto.arrow makes one")
    }

    /// The error of the reader: 65 when the bytes it decodes are wrong, else 74.
    fn failed(&self, error: &io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::InvalidData => Error::data(error.to_string()),
            _ => Error::new(Kind::Io, format!("reading at byte {}: {error}", self.position)),
        }
    }
}

pub(crate) fn damaged(error: ArrowError) -> Error {
    Error::data(format!("damaged Arrow message: {}", escape(&error.to_string())))
}
