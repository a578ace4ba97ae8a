//! What must not depend on threads, memory or parts: the bytes. And what a split promises.

use super::{code, text, tool};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Pairs with repeated, nearly repeated and contradictory records, larger than several chunks.
fn rows(count: u64) -> String {
    let word = |n: u64| format!("w{}", n.wrapping_mul(2_654_435_761) % 997);
    let text = |seed: u64, n: u64| (0..n).map(|i| word(seed * 31 + i)).collect::<Vec<_>>().join(" ");
    let row = |i: u64| {
        let (prompt, chosen) = (text(i % 700, 20), text(i % 900 + 5000, 60));
        let rejected = if i.is_multiple_of(50) { chosen.clone() } else { text(i + 9000, 40 + i % 30) };
        let chosen = if i.is_multiple_of(7) { format!("{chosen} é\u{1f914}") } else { chosen };
        format!("{}\n", json!({"id": i, "prompt": prompt, "chosen": chosen, "rejected": rejected}))
    };
    (0..count).map(row).collect()
}

fn convert(dir: &Path, args: &[&str]) -> (String, String) {
    let output = tool().current_dir(dir).arg("--progress=never").args(args).output().unwrap();
    assert_eq!(code(&output), 0, "{args:?} {}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_bytes_depend_on_neither_threads_nor_memory() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in.jsonl"), rows(6000)).unwrap();
    for flags in [
        &[][..],
        &["--order", "trl"],
        &["--order", "shuffle", "--seed", "3"],
        &["--dedup", "near", "--balance", "down", "--order", "shuffle"],
        &["--dedup", "exact", "--conflicts", "drop", "--balance", "up"],
        &["--pii", "redact", "--provenance", "--chat"],
        &["--to", "paired", "--dedup", "exact"],
    ] {
        let run = |threads: &str, memory: &str| {
            let mut args = flags.to_vec();
            args.extend(["in.jsonl", "--threads", threads, "--memory", memory]);
            convert(dir.path(), &args)
        };
        let first = run("1", "1GiB");
        assert!(first.0.len() > 1 << 20, "several chunks: {flags:?}");
        for (threads, memory) in [("2", "1GiB"), ("7", "8MiB"), ("2", "1MiB")] {
            assert!(run(threads, memory) == first, "{flags:?} {threads} threads, {memory}");
        }
    }
}

#[test]
fn parts_one_behind_the_other_are_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let all = rows(400);
    let third = all.len() / 3;
    let cut = third + all[third..].find('\n').unwrap() + 1;
    fs::write(dir.path().join("a.jsonl"), &all[..cut]).unwrap();
    fs::write(dir.path().join("b.json"), format!("[{}]", all[cut..cut + 2000].lines().next().unwrap()))
        .unwrap();
    fs::write(dir.path().join("c.jsonl"), all[cut..].trim_end()).unwrap();
    fs::write(dir.path().join("d.jsonl"), "").unwrap();
    let files = ["a.jsonl", "b.json", "c.jsonl", "d.jsonl"];
    let convert = |more: &[&str]| {
        let mut args = vec!["-q", "--no-duplicate-check", "--allow-empty"];
        args.extend(more);
        args.extend(files);
        super::text(&tool().current_dir(dir.path()).args(&args).output().unwrap().stdout)
    };
    for flags in [&[][..], &["--provenance"]] {
        let whole = convert(flags);
        assert_eq!(whole.lines().count(), 802);
        for parts in [1, 2, 3, 7, 401, 5000] {
            // Of many parts, some: the sum must still be there, so take all of the smaller numbers only.
            if parts > 10 && !flags.is_empty() {
                continue;
            }
            let take = if parts == 5000 { 40 } else { parts };
            let joined: String = (1..=take)
                .map(|i| convert(&[flags, &["--shard", &format!("{i}/{parts}")]].concat()))
                .collect();
            if take == parts {
                assert!(joined == whole, "{parts} parts {flags:?}");
            } else {
                assert!(whole.starts_with(&joined), "the first {take} of {parts} parts");
            }
        }
    }
}

#[test]
fn a_split_puts_a_prompt_into_one_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in.jsonl"), rows(3000)).unwrap();
    let args = ["--split", "train=0.8,valid=0.1,test=0.1", "-o", "out", "in.jsonl", "--report", "r.json"];
    let (out, _) = convert(dir.path(), &args);
    assert_eq!(out, "out\n");
    let mut seen: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    let mut counts = BTreeMap::new();
    for name in ["train", "valid", "test"] {
        let file = fs::read_to_string(dir.path().join("out").join(format!("{name}.jsonl"))).unwrap();
        counts.insert(name, file.lines().count() as u64);
        for line in file.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            seen.entry(row["prompt"].as_str().unwrap().to_owned()).or_default().insert(name);
        }
    }
    assert_eq!(seen.len(), 700);
    assert!(seen.values().all(|files| files.len() == 1), "a prompt is in two files");
    let report: Value = serde_json::from_slice(&fs::read(dir.path().join("r.json")).unwrap()).unwrap();
    assert_eq!(report["splits"], json!(counts));
    assert_eq!(counts.values().sum::<u64>(), 6000);
    // 700 prompts: 0.8 of them within four standard deviations.
    let train = seen.values().filter(|files| files.contains("train")).count();
    assert!((517..=603).contains(&train), "{train} of 700 prompts to train");
    assert!(dir.path().join("out/manifest.json").exists());
}

#[test]
fn mlx_gets_its_three_files() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in.jsonl"), rows(300)).unwrap();
    convert(dir.path(), &["--to", "mlx", "--chat", "-o", "mlx", "in.jsonl"]);
    let mut total = 0;
    for name in ["train", "valid", "test"] {
        let file = fs::read_to_string(dir.path().join("mlx").join(format!("{name}.jsonl"))).unwrap();
        total += file.lines().count();
        for line in file.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            assert_eq!(row.as_object().unwrap().keys().collect::<Vec<_>>(), ["messages"]);
            assert_eq!(row["messages"][1]["role"], "assistant");
        }
    }
    assert_eq!(total, 300, "the desirable ones");
    let again =
        tool().current_dir(dir.path()).args(["--to", "mlx", "-o", "mlx", "in.jsonl"]).output().unwrap();
    assert_eq!(code(&again), 73, "an existing directory stays");
}

#[test]
fn balance_makes_the_labels_equally_frequent() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: u32| {
        format!(
            "{}\n",
            json!({"id": i, "prompt": format!("p{i}"), "completion": format!("c{i}"), "label": i % 5 < 3})
        )
    };
    fs::write(dir.path().join("in.jsonl"), (0..1003).map(row).collect::<String>()).unwrap();
    let count = |out: &str, label: bool| out.matches(&format!("\"label\": {label}")).count();
    let (down, _) = convert(dir.path(), &["-q", "--balance", "down", "in.jsonl"]);
    assert_eq!((count(&down, true), count(&down, false)), (400, 400));
    let (up, _) = convert(dir.path(), &["-q", "--balance", "up", "in.jsonl"]);
    assert_eq!((count(&up, true), count(&up, false)), (603, 603));
    let distinct: BTreeSet<&str> = up.lines().collect();
    assert_eq!(distinct.len(), 1003, "every record is there");
}

#[test]
fn bad_rows_go_to_the_quarantine_with_their_reason() {
    let dir = tempfile::tempdir().unwrap();
    let input = "{\"prompt\": \"p\", \"completion\": \"c\", \"label\": true}\n{\"prompt\": \n{\"x\": 1}\n";
    fs::write(dir.path().join("in.jsonl"), input).unwrap();
    let args = ["--on-error", "quarantine=bad.jsonl", "-o", "out.jsonl", "--report", "r.json", "in.jsonl"];
    let (_, err) = convert(dir.path(), &args);
    assert!(err.contains("row skipped: in.jsonl:2:10: unexpected end"), "{err}");
    let bad: Vec<Value> = fs::read_to_string(dir.path().join("bad.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(bad.len(), 2);
    assert_eq!((&bad[0]["row"], &bad[0]["place"]), (&json!("{\"prompt\":"), &json!("in.jsonl:2")));
    assert_eq!((&bad[1]["row"], &bad[1]["reason"]), (&json!({"x": 1}), &json!("unknown shape")));
    let report: Value = serde_json::from_slice(&fs::read(dir.path().join("r.json")).unwrap()).unwrap();
    assert_eq!((&report["rows"]["read"], &report["rows"]["skipped"]), (&json!(3), &json!(2)));
}

#[test]
fn what_does_not_go_together_is_a_usage_error() {
    for args in [
        &["--shard", "1/2"][..],
        &["--shard", "1/2", "--dedup", "exact", "x"],
        &["--shard", "3/2", "x"],
        &["--split", "a=1"],
        &["--split", "a=0.5,b=0.4", "-o", "d"],
        &["--from", "nothing"],
        &["--on-error", "ignore"],
        &["--desirable", "4"],
        &["--drop-match", "("],
        &["--drop-role", "narrator"],
        &["--near", "2"],
        &["--to", "mlx"],
    ] {
        let output = tool().args(args).stdin(std::process::Stdio::null()).output().unwrap();
        assert_eq!(code(&output), 2, "{args:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).lines().count() <= 2, "{args:?}: {}", text(&output.stderr));
    }
}
