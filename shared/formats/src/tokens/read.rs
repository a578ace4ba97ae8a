//! The reading half: what must hold of a token file, beyond what [`crate::frames`] checks of every Arrow stream.

use super::{FORMAT_VERSION, TokenMeta, TokenSet};
use crate::frames::{Form, Frames};
use arrow_array::{Array, BooleanArray, ListArray, RecordBatch, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Schema};
use kto_cli::{Context, Error, Result, escape};
use std::io::Read;

impl TokenSet {
    /// Reads a whole stream. `name` is what messages call it.
    /// Errors: 65 for anything that is not a complete, consistent token file of a known version; 74 when `reader`
    /// fails.
    pub fn read(name: &str, reader: impl Read) -> Result<TokenSet> {
        let name = escape(name);
        let mut frames = Frames::new(reader, Form::Tokens);
        read_stream(&mut frames).at(name)
    }
}

fn read_stream(frames: &mut Frames<impl Read>) -> Result<TokenSet> {
    let schema = frames.schema()?;
    let meta = Metadata(&schema);
    meta.check_version()?;
    check_columns(&schema)?;
    let mut set = TokenSet::new(meta.token_meta()?);
    let append = |set: &mut TokenSet, batch: RecordBatch| {
        let before = set.len();
        set.append(&batch)?;
        (before..set.len()).try_for_each(|i| set.check(i))
    };
    while frames.batches(|batch| append(&mut set, batch))? {}
    meta.check_content(&set)?;
    Ok(set)
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
