//! Orders across files and blocks, the report, and TRL's own order on the golden pairs.

use super::{code, run, testdata, text, tool};
use std::fs;

fn ids(jsonl: &str) -> Vec<String> {
    let id = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].to_string().replace('"', "")
    };
    jsonl.lines().map(id).collect()
}

#[test]
fn trl_order_is_trls_on_the_golden_pairs() {
    let golden = fs::read_to_string(testdata("trl/llama_paired/tokenized.jsonl")).unwrap();
    let data = testdata("trl/llama_paired/data.jsonl");
    let output = tool().args(["-q", "--order", "trl"]).arg(data).output().unwrap();
    assert_eq!(ids(&text(&output.stdout)), ids(&golden));
    assert_eq!(ids(&golden).len(), 12);
}

#[test]
fn trl_order_ends_a_block_after_1000_rows() {
    let row =
        |i: u32| format!("{{\"id\": {i}, \"prompt\": \"p{i}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n");
    let input: String = (0..1500).map(row).collect();
    let output = run(&["-q", "--order", "trl"], input.as_bytes());
    let expected: Vec<String> =
        [0..1000, 0..1000, 1000..1500, 1000..1500].into_iter().flatten().map(|i| i.to_string()).collect();
    let out = text(&output.stdout);
    assert_eq!(ids(&out), expected);
    let labels: Vec<bool> = out.lines().map(|l| l.contains("\"label\": true")).collect();
    let runs: Vec<usize> = labels.chunk_by(|a, b| a == b).map(<[bool]>::len).collect();
    assert_eq!(runs, [1000, 1000, 500, 500], "as measured with TRL 1.16");
}

#[test]
fn a_shuffle_is_the_same_rows_and_the_same_every_time() {
    let row = |i: u32| {
        format!(
            "{{\"id\": {i}, \"prompt\": \"p{i}\", \"completion\": \"c\", \"label\": {}}}\n",
            i.is_multiple_of(2)
        )
    };
    let input: String = (0..500).map(row).collect();
    let shuffled =
        |seed: &str| text(&run(&["-q", "--order", "shuffle", "--seed", seed], input.as_bytes()).stdout);
    let (a, b) = (shuffled("1"), shuffled("2"));
    assert_eq!(a, shuffled("1"));
    assert_ne!(a, b);
    assert_ne!(a, input);
    let sorted = |text: &str| {
        let mut ids = ids(text);
        ids.sort();
        ids
    };
    assert!(sorted(&a) == sorted(&input) && sorted(&b) == sorted(&input), "every row once");
}

#[test]
fn the_report_adds_up() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two, report) =
        (dir.path().join("one.jsonl"), dir.path().join("two.csv"), dir.path().join("r.json"));
    let rows = concat!(
        "{\"prompt\": \"p\", \"chosen\": \"\", \"rejected\": \"r\"}\n",
        "{\"prompt\": \"p\", \"chosen\": \"t\", \"rejected\": \"t\"}\n",
        "{\"bad\": 1}\n{\n",
        "{\"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"}\n"
    );
    fs::write(&one, rows).unwrap();
    fs::write(&two, "prompt,completion,label\np,x,true\np,y\n").unwrap();
    let output = tool()
        .args(["-q", "--on-error", "skip", "--skip-empty", "--ties", "skip", "--report"])
        .args([&report, &one, &two])
        .output()
        .unwrap();
    assert_eq!((code(&output), text(&output.stderr).as_str()), (0, ""), "-q says nothing");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let count = |pointer: &str| report.pointer(pointer).unwrap().as_u64().unwrap();
    assert_eq!(count("/rows/read"), 7);
    assert_eq!(count("/rows/converted") + count("/rows/skipped"), count("/rows/read"));
    assert_eq!(text(&output.stdout).lines().count() as u64, count("/records/written"));
    // Three pairs and one single record.
    assert_eq!(count("/records/written") + count("/records/skipped"), 3 * 2 + 1);
    assert_eq!(count("/records/skipped_by_reason/tie/count"), 2);
    assert_eq!(count("/records/skipped_by_reason/empty completion/count"), 1);
    assert_eq!(count("/rows/skipped_by_reason/unreadable/count"), 2);
    assert_eq!(count("/written_but_odd/duplicates/count"), 1);
    let place = report.pointer("/rows/skipped_by_reason/unknown shape/first/0").unwrap().as_str().unwrap();
    assert!(place.ends_with("one.jsonl:3"), "{place}");
}
