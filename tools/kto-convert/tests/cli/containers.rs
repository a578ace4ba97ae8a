//! The same preferences in every container: as a file, redirected, through a pipe, and from a directory.

use super::{code, run, testdata, text, tool};
use std::fs;

/// (file, what standard input must be told)
const FILES: [(&str, &[&str]); 16] = [
    ("lines.jsonl", &[]),
    ("lines.jsonl.gz", &[]),
    ("lines.jsonl.zst", &[]),
    ("array.json", &[]),
    ("array.json.gz", &[]),
    ("values.json", &[]),
    ("table.csv", &["--in-format", "csv"]),
    ("table.tsv", &["--in-format", "tsv"]),
    ("snappy.parquet", &[]),
    ("zstd.parquet", &[]),
    ("gzip.parquet", &[]),
    ("none.parquet", &[]),
    ("snappy.parquet.gz", &[]),
    ("stream.arrow", &[]),
    ("stream.arrow.gz", &[]),
    ("file.feather", &[]),
];

fn expected() -> String {
    fs::read_to_string(testdata("containers/expected.jsonl")).unwrap()
}

#[test]
fn every_container_gives_the_same_records() {
    let expected = expected();
    assert_eq!(expected.lines().count(), 10);
    for (file, told) in FILES {
        let path = testdata("containers").join(file);
        let named = tool().args(["-q", "--drop-extra"]).arg(&path).output().unwrap();
        let args: Vec<&str> = ["-q", "--drop-extra"].iter().chain(told).copied().collect();
        let piped = run(&args, &fs::read(&path).unwrap());
        for (way, output) in [("named", named), ("piped", piped)] {
            assert_eq!((code(&output), text(&output.stderr).as_str()), (0, ""), "{file} {way}");
            assert_eq!(text(&output.stdout), expected, "{file} {way}");
        }
    }
}

#[test]
fn a_directory_stands_for_its_data_files() {
    let saved = tool().args(["-q", "--drop-extra"]).arg(testdata("containers/saved")).output().unwrap();
    assert_eq!((code(&saved), text(&saved.stderr).as_str()), (0, ""));
    assert_eq!(text(&saved.stdout), expected());
    // All files of the folder in the order of their names, the folder below among them.
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("b")).unwrap();
    for (file, copy) in [("lines.jsonl", "a.jsonl"), ("zstd.parquet", "b/x.parquet"), ("table.csv", "c.csv")]
    {
        fs::copy(testdata("containers").join(file), dir.path().join(copy)).unwrap();
    }
    fs::write(dir.path().join("README.md"), "no data").unwrap();
    let all = tool().args(["-q", "--drop-extra", "--no-duplicate-check"]).arg(dir.path()).output().unwrap();
    assert_eq!(text(&all.stdout), expected().repeat(3));
}

#[test]
fn parquet_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("kto.parquet");
    let rows = testdata("containers/lines.jsonl");
    let written = tool().arg("-q").arg(&rows).arg("-o").arg(&target).output().unwrap();
    assert_eq!((code(&written), text(&written.stderr).as_str()), (0, ""));
    assert!(fs::read(&target).unwrap().starts_with(b"PAR1"));
    let back = tool().arg("-q").arg(&target).output().unwrap();
    let plain = tool().arg("-q").arg(&rows).output().unwrap();
    assert_eq!(text(&back.stdout), text(&plain.stdout));
}
