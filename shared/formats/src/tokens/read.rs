//! The reading half. The framing is ours (lengths are capped before anything is allocated, a missing end marker is
//! noticed); the content of each message is decoded by arrow behind a guard, because it is known to panic on some
//! damaged streams.

use super::{FORMAT_VERSION, TokenMeta, TokenSet};
use arrow_array::{Array, BooleanArray, ListArray, RecordBatch, UInt32Array, UInt64Array};
use arrow_buffer::Buffer;
use arrow_ipc::{Endianness, convert::try_fb_to_schema, reader::StreamDecoder, root_as_message};
use arrow_schema::{ArrowError, DataType, Schema};
use kto_cli::{Context, Error, Result, escape, guard};
use std::io::{self, Read};

/// Bytes of a message's header, at most.
const HEADER_CAP: u64 = 16 << 20;
/// Bytes of a message's body, at most. Ours are below 200 MiB.
const BODY_CAP: u64 = 4 << 30;

impl TokenSet {
    /// Reads a whole stream. `name` is what messages call it.
    /// Errors: 65 for anything that is not a complete, consistent token file of a known version; 74 when `reader`
    /// fails.
    pub fn read(name: &str, reader: impl Read) -> Result<TokenSet> {
        let name = escape(name);
        let mut frames = Frames { reader, position: 0 };
        read_stream(&mut frames).at(name)
    }
}

fn read_stream(frames: &mut Frames<impl Read>) -> Result<TokenSet> {
    let mut decoder = StreamDecoder::new();
    let first = frames.next()?.ok_or_else(|| Error::data("an Arrow stream without a schema"))?;
    let schema = schema(&first)?;
    let meta = Metadata(&schema);
    meta.check_version()?;
    check_columns(&schema)?;
    let mut set = TokenSet::new(meta.token_meta()?);
    decode(&mut decoder, first.bytes, &mut set)?;
    while let Some(frame) = frames.next()? {
        decode(&mut decoder, frame.bytes, &mut set)?;
    }
    frames.expect_end()?;
    meta.check_content(&set)?;
    Ok(set)
}

/// The messages of a stream, each with its frame, as they are read.
struct Frames<R> {
    reader: R,
    position: u64,
}

struct Frame {
    /// Marker, length, header and body.
    bytes: Vec<u8>,
    /// Bytes of the header, which begins at 8.
    header: usize,
}

impl<R: Read> Frames<R> {
    /// Returns the next message, or None at the end-of-stream marker.
    fn next(&mut self) -> Result<Option<Frame>> {
        let start = self.position;
        let mut bytes = Vec::new();
        self.take(&mut bytes, 8, "the end-of-stream marker is missing")?;
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
        let text = match self.position {
            0 => "empty, not a token file".to_string(),
            position => format!("cut at byte {position}: {missing}"),
        };
        Err(Error::data(text).with_hint("the program that wrote it did not finish; run kto-tokenize again"))
    }

    fn expect_end(&mut self) -> Result<()> {
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
        let what = match bytes {
            [b'{' | b'[', ..] => "JSON, not a token file",
            [b'A', b'R', b'R', b'O', b'W', b'1', ..] => "an Arrow file, not an Arrow stream",
            [b'P', b'A', b'R', b'1', ..] => "Parquet, not a token file",
            [0x1f, 0x8b, ..] => "gzip, not a token file",
            _ => "not a token file",
        };
        Error::data(what).with_hint("kto-tokenize --model DIR RECORDS.jsonl -o TOKENS.kto.arrow makes one")
    }

    fn failed(&self, error: &io::Error) -> Error {
        Error::new(kto_cli::Kind::Io, format!("reading at byte {}: {error}", self.position))
    }
}

fn schema(frame: &Frame) -> Result<Schema> {
    let message = root_as_message(&frame.bytes[8..8 + frame.header]);
    let Some(schema) = message.ok().and_then(|m| m.header_as_schema()) else {
        return Err(Error::data("an Arrow stream that does not begin with a schema"));
    };
    if schema.endianness() != Endianness::Little {
        return Err(Error::data("a big-endian Arrow stream, only little-endian ones are read"));
    }
    guard::catch("Arrow schema", || try_fb_to_schema(schema))?.map_err(damaged)
}

/// Appends the rows of one message, if it is a batch. Behind the guard: arrow is known to panic on damaged streams.
fn decode(decoder: &mut StreamDecoder, bytes: Vec<u8>, set: &mut TokenSet) -> Result<()> {
    let mut buffer = Buffer::from_vec(bytes);
    // A batch without a body is handed out when the next message comes, hence the loop.
    while !buffer.is_empty() {
        if let Some(batch) =
            guard::catch("Arrow message", || decoder.decode(&mut buffer))?.map_err(damaged)?
        {
            let before = set.len();
            guard::catch("Arrow batch", || set.append(&batch))??;
            (before..set.len()).try_for_each(|i| set.check(i))?;
        }
    }
    Ok(())
}

fn damaged(error: ArrowError) -> Error {
    Error::data(format!("damaged Arrow message: {}", escape(&error.to_string())))
}

fn check_columns(schema: &Schema) -> Result<()> {
    for (name, wanted) in [
        ("prompt_ids", "list<uint32>"),
        ("completion_ids", "list<uint32>"),
        ("label", "bool"),
        ("prompt_hash", "uint64"),
    ] {
        let Some((_, field)) = schema.column_with_name(name) else {
            return Err(Error::data(format!("not a token file: column \"{name}\" is missing")));
        };
        let fits = match (wanted, field.data_type()) {
            ("list<uint32>", DataType::List(item)) => *item.data_type() == DataType::UInt32,
            ("bool", DataType::Boolean) | ("uint64", DataType::UInt64) => true,
            _ => false,
        };
        if !fits {
            let found = escape(&field.data_type().to_string());
            return Err(Error::data(format!("column \"{name}\" must be {wanted}, found {found}")));
        }
    }
    Ok(())
}

/// The schema's key-value pairs.
struct Metadata<'a>(&'a Schema);

impl Metadata<'_> {
    fn text(&self, key: &str) -> Result<&str> {
        let value = self.0.metadata().get(key);
        value
            .map(String::as_str)
            .ok_or_else(|| Error::data(format!("not a token file: metadata \"{key}\" is missing")))
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        let text = self.text(key)?;
        text.parse().map_err(|_| {
            Error::data(format!("metadata \"{key}\" must be a number, found \"{}\"", escape(text)))
        })
    }

    fn check_version(&self) -> Result<()> {
        match self.text("kto.format_version")? {
            FORMAT_VERSION => Ok(()),
            other => Err(Error::data(format!(
                "token file version {}, this build reads version {FORMAT_VERSION}",
                escape(other)
            ))
            .with_hint("run kto-tokenize of the same release again")),
        }
    }

    fn token_meta(&self) -> Result<TokenMeta> {
        Ok(TokenMeta {
            tokenizer: self.text("kto.tokenizer")?.into(),
            template: self.text("kto.template")?.into(),
            vocab_size: self.number("kto.vocab_size")?,
            max_length: self.number("kto.max_length")?,
            truncated: self.number("kto.truncated")?,
            dropped: self.number("kto.dropped")?,
        })
    }

    fn check_content(&self, set: &TokenSet) -> Result<()> {
        let rows: usize = self.number("kto.rows")?;
        if rows != set.len() {
            return Err(Error::data(format!("{} rows, metadata \"kto.rows\" says {rows}", set.len())));
        }
        if self.text("kto.fingerprint")? != set.fingerprint() {
            return Err(Error::data("the rows do not match metadata \"kto.fingerprint\": damaged or edited"));
        }
        Ok(())
    }
}

impl TokenSet {
    fn append(&mut self, batch: &RecordBatch) -> Result<()> {
        let labels = column::<BooleanArray>(batch, "label")?;
        let hashes = column::<UInt64Array>(batch, "prompt_hash")?;
        append_list(batch, "prompt_ids", &mut self.prompt_offsets, &mut self.prompts)?;
        append_list(batch, "completion_ids", &mut self.completion_offsets, &mut self.completions)?;
        self.labels.extend((0..labels.len()).map(|i| labels.value(i)));
        self.hashes.extend_from_slice(hashes.values());
        Ok(())
    }
}

fn append_list(
    batch: &RecordBatch,
    name: &str,
    offsets: &mut Vec<usize>,
    values: &mut Vec<u32>,
) -> Result<()> {
    let lists = column::<ListArray>(batch, name)?;
    let ids = lists.values().as_any().downcast_ref::<UInt32Array>();
    let ids = ids.filter(|a| a.null_count() == 0).ok_or_else(|| null(name))?;
    for window in lists.value_offsets().windows(2) {
        let range = usize::try_from(window[0]).ok().zip(usize::try_from(window[1]).ok());
        let slice = range.and_then(|(start, end)| ids.values().get(start..end));
        values.extend_from_slice(
            slice.ok_or_else(|| Error::data(format!("column \"{name}\": offsets are damaged")))?,
        );
        offsets.push(values.len());
    }
    Ok(())
}

fn column<'a, A: Array + 'static>(batch: &'a RecordBatch, name: &str) -> Result<&'a A> {
    let array = batch.column_by_name(name).and_then(|a| a.as_any().downcast_ref::<A>());
    array.filter(|a| a.null_count() == 0).ok_or_else(|| null(name))
}

fn null(name: &str) -> Error {
    Error::data(format!("column \"{name}\" holds a null"))
}
