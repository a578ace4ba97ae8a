//! Values of every type, and files cut at every place.

use super::*;
use arrow_array::{
    Array, ArrayRef, BooleanArray, DictionaryArray, Float32Array, Int64Array, ListArray, StringArray,
    StructArray,
    types::{Int8Type, Int32Type},
};
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::{DataType, Field};
use parquet::arrow::ArrowWriter;
use serde_json::{Value, json};
use std::io::Write;

fn batch() -> RecordBatch {
    let role: ArrayRef = Arc::new(StringArray::from(vec!["user", "assistant", "user"]));
    let content: ArrayRef = Arc::new(StringArray::from(vec![Some("é"), None, Some("")]));
    let item = StructArray::from(vec![
        (Arc::new(Field::new("role", DataType::Utf8, true)), role),
        (Arc::new(Field::new("content", DataType::Utf8, true)), content),
    ]);
    let field = Arc::new(Field::new("item", item.data_type().clone(), true));
    let offsets = arrow_buffer::OffsetBuffer::new(vec![0, 2, 2, 3].into());
    let lists = ListArray::new(field, offsets, Arc::new(item), None);
    let words: DictionaryArray<Int8Type> = vec![Some("a"), None, Some("a")].into_iter().collect();
    let numbers = ListArray::from_iter_primitive::<Int32Type, _, _>(vec![
        Some(vec![Some(1), None]),
        None,
        Some(Vec::new()),
    ]);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("m", Arc::new(lists)),
        ("b", Arc::new(BooleanArray::from(vec![Some(true), Some(false), None]))),
        ("i", Arc::new(Int64Array::from(vec![i64::MIN, 0, i64::MAX]))),
        ("f", Arc::new(Float32Array::from(vec![0.1, f32::NAN, 2.0]))),
        ("d", Arc::new(words)),
        ("n", Arc::new(numbers)),
    ];
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap()
}

fn expected() -> Vec<(u64, Value)> {
    vec![
        (
            1,
            json!({"m": [{"role": "user", "content": "é"}, {"role": "assistant"}], "b": true, "i": i64::MIN, "f": 0.1, "d": "a",
                   "n": [1, null]}),
        ),
        (2, json!({"m": [], "b": false, "i": 0, "f": null, "d": null, "n": null})),
        (
            3,
            json!({"m": [{"role": "user", "content": ""}], "b": null, "i": i64::MAX, "f": 2.0, "d": "a", "n": []}),
        ),
    ]
}

fn stream(rows: &RecordBatch) -> Vec<u8> {
    let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema()).unwrap();
    writer.write(rows).unwrap();
    writer.into_inner().unwrap()
}

fn file(rows: &RecordBatch) -> Vec<u8> {
    let mut writer = FileWriter::try_new(Vec::new(), &rows.schema()).unwrap();
    writer.write(rows).unwrap();
    writer.into_inner().unwrap()
}

fn parquet(rows: &RecordBatch) -> Vec<u8> {
    let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), None).unwrap();
    writer.write(rows).unwrap();
    writer.into_inner().unwrap()
}

fn read(mut source: impl Source) -> Result<Vec<(u64, Value)>> {
    let mut rows = Vec::new();
    while let Some(chunk) = source.next_chunk()? {
        chunk.rows(|row, _| {
            rows.push((row.line, row.value?));
            Ok(())
        })?;
    }
    Ok(rows)
}

fn read_ipc(bytes: &[u8], file: bool) -> Result<Vec<(u64, Value)>> {
    read(ArrowStream::open("f".into(), bytes, file)?)
}

fn read_parquet(bytes: &[u8]) -> Result<Vec<(u64, Value)>> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    read(ParquetFile::new("f".into(), file)?)
}

#[test]
fn every_form_gives_the_same_rows() {
    let rows = batch();
    assert_eq!(read_ipc(&stream(&rows), false).unwrap(), expected());
    assert_eq!(read_ipc(&file(&rows), true).unwrap(), expected());
    assert_eq!(read_parquet(&parquet(&rows)).unwrap(), expected());
}

#[test]
fn a_cut_file_is_bad_data_wherever_it_is_cut() {
    let rows = batch();
    for (bytes, form) in [(stream(&rows), 0), (file(&rows), 1), (parquet(&rows), 2)] {
        for cut in (1..bytes.len()).step_by(7) {
            let error = match form {
                2 => read_parquet(&bytes[..cut]),
                form => read_ipc(&bytes[..cut], form == 1),
            };
            let error = error.expect_err(&format!("form {form} cut at {cut}"));
            assert_eq!(error.kind(), kto_cli::Kind::Data, "{error}");
            assert!(error.to_string().starts_with("f: "), "{error}");
        }
    }
}

#[test]
fn damage_is_bad_data_or_other_data_but_never_a_panic() {
    let rows = batch();
    for (bytes, form) in [(stream(&rows), 0), (file(&rows), 1), (parquet(&rows), 2)] {
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            let result = match form {
                2 => read_parquet(&damaged),
                form => read_ipc(&damaged, form == 1),
            };
            if let Err(error) = result {
                assert_eq!(error.kind(), kto_cli::Kind::Data, "form {form}, byte {at}: {error}");
            }
        }
    }
}
