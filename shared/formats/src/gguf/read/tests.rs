//! Files of our writer come back; files that are cut, damaged or made to hurt are refused with one line.

use super::*;
use crate::gguf::{GgufTensor, header};

fn small() -> Vec<u8> {
    let keys = [
        ("general.architecture".to_string(), GgufValue::String("llama".into())),
        ("n".into(), GgufValue::U32(7)),
        ("f".into(), GgufValue::F32(1.5)),
        ("b".into(), GgufValue::Bool(true)),
        ("tokens".into(), GgufValue::Strings(vec!["a".into(), "ü".into()])),
        ("scores".into(), GgufValue::Floats(vec![0.0, -1.0])),
        ("types".into(), GgufValue::Ints(vec![1, -3])),
    ];
    let tensor = |name: &str, shape: &[usize], kind, bytes| GgufTensor {
        name: name.into(),
        shape: shape.into(),
        kind,
        bytes,
    };
    let made = header(&keys, &[tensor("t", &[2, 32], 2, 36), tensor("u", &[3], 0, 12)]);
    let mut bytes = made.bytes;
    bytes.resize(made.size as usize, 9);
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    parse(bytes).unwrap_err().to_string()
}

#[test]
fn what_is_written_is_read() {
    let bytes = small();
    let (keys, tensors, start) = parse(&bytes).unwrap();
    assert_eq!(keys["n"], Some(GgufValue::U32(7)));
    assert_eq!(keys["f"], Some(GgufValue::F32(1.5)));
    assert_eq!(keys["b"], Some(GgufValue::Bool(true)));
    assert_eq!(keys["tokens"], Some(GgufValue::Strings(vec!["a".into(), "ü".into()])));
    assert_eq!(keys["scores"], Some(GgufValue::Floats(vec![0.0, -1.0])));
    assert_eq!(keys["types"], Some(GgufValue::Ints(vec![1, -3])));
    let expected = GgufEntry { shape: vec![2, 32], kind: 2, range: start..start + 36 };
    assert_eq!(tensors["t"], expected);
    assert_eq!(tensors["u"].range, start + 64..start + 76);
}

#[test]
fn a_file_cut_anywhere_is_refused_and_any_byte_may_be_wrong() {
    let bytes = small();
    let needed = parse(&bytes).unwrap().1["u"].range.end;
    for length in 0..needed {
        assert!(parse(&bytes[..length]).is_err(), "{length}");
    }
    assert!(parse(&bytes[..needed]).is_ok());
    for at in 0..needed {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] = value;
            // Whatever it says then, it lies in the file.
            if let Ok((_, tensors, _)) = parse(&bad) {
                assert!(tensors.values().all(|t| t.range.end <= bad.len()));
            }
        }
    }
}

/// A header: version, counts of tensors and keys, then the rest.
fn raw(version: u32, tensors: u64, keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(version.to_le_bytes());
    out.extend(tensors.to_le_bytes());
    out.extend(keys.to_le_bytes());
    rest.iter().for_each(|part| out.extend(*part));
    out
}

fn text(t: &str) -> Vec<u8> {
    [&(t.len() as u64).to_le_bytes()[..], t.as_bytes()].concat()
}

#[test]
fn versions_orders_and_parts_are_refused_by_name() {
    assert!(refusal(b"PK\x03\x04").contains("not a GGUF file"));
    assert!(refusal(&raw(1, 0, 0, &[])).contains("version 1 is not read"));
    assert!(refusal(&raw(4, 0, 0, &[])).contains("version 4 is not read"));
    assert!(refusal(&raw(3u32.swap_bytes(), 0, 0, &[])).contains("big-endian"));
    let count =
        [text("split.count"), [2u32.to_le_bytes(), 2u32.to_le_bytes()].concat()[..6].to_vec()].concat();
    assert!(refusal(&raw(3, 0, 1, &[&count])).contains("one part"));
    assert!(is_part(Path::new("a/m-00001-of-00002.gguf")));
    for whole in ["m.gguf", "m-00001-of-00001.gguf", "m-of-00002.gguf", "m-1-of-2.gguf", "-of-.gguf"] {
        assert!(!is_part(Path::new(whole)), "{whole}");
    }
    assert!(parse(&raw(2, 0, 0, &[])).is_ok());
}

#[test]
fn counts_lengths_and_nesting_cannot_hurt() {
    assert!(refusal(&raw(3, u64::MAX, 0, &[])).contains("tensors, at most"));
    assert!(refusal(&raw(3, 0, 1 << 40, &[])).contains("keys, at most"));
    let key = |kind: u32, value: &[u8]| [text("k"), kind.to_le_bytes().to_vec(), value.to_vec()].concat();
    let long = u64::MAX.to_le_bytes();
    assert!(refusal(&raw(3, 0, 1, &[&long])).contains("name of a key"));
    assert!(refusal(&raw(3, 0, 1, &[&key(8, &long)])).contains("cut short"));
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    assert!(refusal(&raw(3, 0, 1, &[&key(9, &array(8, 1 << 60))])).contains("elements, at most"));
    assert!(refusal(&raw(3, 0, 1, &[&key(9, &array(4, 1 << 23))])).contains("cut short"));
    assert!(refusal(&raw(3, 0, 1, &[&key(9, &array(99, 1))])).contains("kind 99"));
    assert!(refusal(&raw(3, 0, 1, &[&key(13, &[0; 8])])).contains("kind 13"));
    assert!(refusal(&raw(3, 0, 1, &[&key(7, &[2])])).contains("neither true nor false"));
    let deep = [array(9, 1).repeat(40), array(0, 1), vec![0]].concat();
    assert!(refusal(&raw(3, 0, 1, &[&key(9, &deep)])).contains("deep"));
    let twice = [key(7, &[1]), key(7, &[1])].concat();
    assert!(refusal(&raw(3, 0, 2, &[&twice])).contains("key \"k\" is there twice"));
    let odd = [text("general.alignment"), 4u32.to_le_bytes().to_vec(), 48u32.to_le_bytes().to_vec()].concat();
    assert!(refusal(&raw(3, 0, 1, &[&odd])).contains("general.alignment"));
    // Of no use, but nothing wrong.
    let (keys, ..) =
        parse(&raw(3, 0, 1, &[&key(8, &[text("\u{e9}")[..8].to_vec(), vec![0xff, 0xfe]].concat())])).unwrap();
    assert_eq!(keys["k"], None);
}

#[test]
fn tensors_lie_in_the_file_and_apart() {
    let tensor = |name: &str, dims: &[u64], kind: u32, offset: u64| {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|d| d.to_le_bytes()).collect();
        [
            text(name),
            (dims.len() as u32).to_le_bytes().to_vec(),
            dims_bytes,
            kind.to_le_bytes().to_vec(),
            offset.to_le_bytes().to_vec(),
        ]
        .concat()
    };
    let file = |tensors: &[Vec<u8>]| {
        let mut bytes = raw(3, tensors.len() as u64, 0, &[&tensors.concat()]);
        bytes.resize(bytes.len().next_multiple_of(32) + 256, 0);
        bytes
    };
    assert!(parse(&file(&[tensor("t", &[32, 2], 0, 0)])).is_ok());
    for (bad, what) in [
        (tensor("t", &[], 0, 0), "0 dimensions"),
        (tensor("t", &[1; 5], 0, 0), "5 dimensions"),
        (tensor("t", &[0, 4], 0, 0), "dimensions [0, 4]"),
        (tensor("t", &[1 << 40, 1 << 40], 0, 0), "dimensions"),
        (tensor("t", &[u64::MAX], 0, 0), "dimensions"),
        (tensor("t", &[31, 2], 2, 0), "blocks of 32"),
        (tensor("t", &[32], 99, 0), "type 99"),
        (tensor("t", &[32], 0, 8), "no multiple of 32"),
        (tensor("t", &[32, 3], 0, 0), "cut short"),
        (tensor("t", &[32], 0, u64::MAX - 31), "cut short"),
    ] {
        let found = refusal(&file(&[bad]));
        assert!(found.contains("tensor \"t\"") && found.contains(what), "{what}: {found}");
    }
    let two = |a: &str, b: &str, offset| file(&[tensor(a, &[32], 0, 0), tensor(b, &[32], 0, offset)]);
    assert!(parse(&two("a", "b", 128)).is_ok());
    assert!(refusal(&two("a", "b", 96)).contains("share bytes"));
    assert!(refusal(&two("a", "a", 128)).contains("is there twice"));
}
