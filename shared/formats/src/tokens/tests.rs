//! Round trips, every cut of a small stream, and streams that lie.

use super::*;
use arrow_array::{Int64Array, RecordBatch};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema};
use kto_cli::Kind;
use std::sync::Arc;

fn meta() -> TokenMeta {
    TokenMeta {
        tokenizer: "a".repeat(64),
        template: String::new(),
        vocab_size: 100,
        max_length: 8,
        truncated: 1,
        dropped: 2,
    }
}

fn push(set: &mut TokenSet, prompt_ids: &[u32], completion_ids: &[u32], label: bool) {
    set.push(TokenRow { prompt_ids, completion_ids, label, prompt_hash: prompt_hash(prompt_ids) });
}

fn sample() -> TokenSet {
    let mut set = TokenSet::new(meta());
    push(&mut set, &[1, 2, 3], &[4], true);
    push(&mut set, &[1], &[5, 6, 7, 8, 9, 10, 11, 12], false);
    push(&mut set, &[99], &[0, 0], true);
    set
}

fn bytes(set: &TokenSet) -> Vec<u8> {
    let mut out = Vec::new();
    set.write(&mut out).unwrap();
    out
}

fn refused(bytes: &[u8]) -> String {
    let error = TokenSet::read("t.kto.arrow", bytes).unwrap_err();
    assert_eq!(error.kind(), Kind::Data, "{error}");
    error.to_string()
}

#[test]
fn comes_back_as_written() {
    let set = sample();
    let first = bytes(&set);
    assert_eq!(TokenSet::read("t", &first[..]).unwrap(), set);
    assert_eq!(bytes(&set), first);
    let empty = TokenSet::new(meta());
    assert_eq!(TokenSet::read("t", &bytes(&empty)[..]).unwrap(), empty);
}

#[test]
fn a_spool_writes_the_same_bytes() {
    for rows in [0, 1, 4095, 4096, 4097, 9000_u32] {
        let mut set = TokenSet::new(meta());
        // The counts are known at the end only.
        let mut spool = TokenSpool::new(TokenMeta::default()).unwrap();
        for i in 0..rows {
            let (prompt, completion) = ([i % 100, 1], vec![i % 7; i as usize % 5 + 1]);
            push(&mut set, &prompt, &completion, i % 3 == 0);
            spool.push(set.row(i as usize)).unwrap();
        }
        spool.meta = meta();
        assert_eq!(spool.is_empty(), rows == 0);
        let mut out = Vec::new();
        spool.write(&mut out).unwrap();
        assert!(out == bytes(&set), "{rows} rows");
    }
}

#[test]
fn many_rows_make_several_batches() {
    let mut set = TokenSet::new(meta());
    for i in 0..10_000u32 {
        push(&mut set, &[i % 100, 1], &[2, i % 7], i % 2 == 0);
    }
    let back = TokenSet::read("t", &bytes(&set)[..]).unwrap();
    assert_eq!(back, set);
    assert_eq!(back.row(9_999).prompt_ids, &[99, 1]);
    assert_eq!(back.rows().len(), 10_000);
}

#[test]
fn every_cut_is_refused() {
    let whole = bytes(&sample());
    for length in 0..whole.len() {
        let text = refused(&whole[..length]);
        assert!(text.contains("cut at byte") || text.contains("empty"), "{length}: {text}");
    }
}

#[test]
fn every_changed_byte_is_refused_or_harmless() {
    let set = sample();
    let whole = bytes(&set);
    for position in 0..whole.len() {
        for mask in [0xff, 0x01, 0x80] {
            let mut damaged = whole.clone();
            damaged[position] ^= mask;
            match TokenSet::read("t", &damaged[..]) {
                // Padding and unused table fields may change; rows may not.
                Ok(read) => assert_eq!(read.fingerprint(), set.fingerprint(), "byte {position}"),
                Err(error) => assert_eq!(error.kind(), Kind::Data, "byte {position}: {error}"),
            }
        }
    }
}

#[test]
fn bytes_behind_the_end_are_refused() {
    let mut twice = bytes(&sample());
    twice.extend(bytes(&sample()));
    assert!(refused(&twice).contains("behind the end-of-stream marker"));
}

#[test]
fn other_files_are_named() {
    assert!(refused(b"{\"prompt\": \"a\"}\n").contains("JSON"));
    assert!(refused(b"PAR1\0\0\0\0\0\0\0").contains("Parquet"));
    assert!(refused(b"ARROW1\0\0\xff\xff\xff\xff").contains("not an Arrow stream"));
}

fn stream(schema: Schema, columns: Vec<arrow_array::ArrayRef>) -> Vec<u8> {
    let schema = Arc::new(schema);
    let mut out = Vec::new();
    let mut writer = StreamWriter::try_new(&mut out, &schema).unwrap();
    if !columns.is_empty() {
        writer.write(&RecordBatch::try_new(schema.clone(), columns).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    drop(writer);
    out
}

#[test]
fn wrong_schemas_are_refused() {
    let label = Field::new("label", DataType::Int64, false);
    let column: arrow_array::ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let plain = stream(Schema::new(vec![label.clone()]), vec![column.clone()]);
    assert!(refused(&plain).contains("kto.format_version"));
    let version = |v: &str| Schema::new_with_metadata(vec![label.clone()], [("kto.format_version", v)]);
    assert!(refused(&stream(version("2"), vec![column.clone()])).contains("token file version 2"));
    assert!(refused(&stream(version("1"), vec![column])).contains("column \"prompt_ids\" is missing"));
}

#[test]
fn rows_against_the_rules_are_refused() {
    let with = |prompt: &[u32], completion: &[u32]| {
        let mut set = sample();
        push(&mut set, prompt, completion, true);
        refused(&bytes(&set))
    };
    assert!(with(&[1], &[100]).contains("row 4: token id 100, vocab_size is 100"));
    assert!(with(&[], &[1]).contains("row 4: prompt_ids is empty"));
    assert!(with(&[1], &[]).contains("row 4: completion_ids is empty"));
    assert!(with(&[1; 8], &[1]).contains("row 4: a prompt of 8 tokens"));
    assert!(with(&[1], &[1; 9]).contains("row 4: a completion of 9 tokens"));
    let mut set = sample();
    set.hashes[1] ^= 1;
    assert!(refused(&bytes(&set)).contains("row 2: prompt_hash"));
}

#[test]
fn the_hash_is_the_one_the_format_page_states() {
    // hashlib.sha256(struct.pack("<3I", 1, 2, 3)).digest()[:8], little-endian
    assert_eq!(prompt_hash(&[1, 2, 3]), 16835613460176385606);
    assert_ne!(prompt_hash(&[1, 2]), prompt_hash(&[1, 2, 3]));
}
