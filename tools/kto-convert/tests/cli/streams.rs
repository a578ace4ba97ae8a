//! Pipes that close, disks that fill, processes that die, inputs of absurd size.

use super::{TOOL, code, run, text, tool};
use std::{
    fs::{self, File},
    io::{Read, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const ROW: &str = "{\"prompt\": \"p\", \"completion\": \" c\", \"label\": true}\n";

#[test]
fn a_reader_that_leaves_ends_the_tool_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    fs::write(&input, ROW.repeat(50_000)).unwrap();
    let mut child = tool().arg(&input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap(); // and the pipe is closed
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), text(&output.stderr).as_str()), (0, ""));
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_io_error() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for rows in [1, 50_000] {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.jsonl");
        fs::write(&input, ROW.repeat(rows)).unwrap();
        let output = tool().arg("-q").arg(&input).stdout(full()).output().unwrap();
        assert_eq!(code(&output), 74);
        assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
    }
}

#[test]
fn kill_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("kto.jsonl");
    fs::write(&target, "old\n").unwrap();
    for pause in [5, 20, 40] {
        let mut child =
            Command::new(TOOL).args(["-q", "-o"]).arg(&target).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let end = Instant::now() + Duration::from_millis(pause);
        while Instant::now() < end {
            stdin.write_all(ROW.repeat(100).as_bytes()).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "old\n");
    }
    // The next run finishes and clears what the killed ones left.
    let output = run(&["-q", "-o", target.to_str().unwrap()], ROW.as_bytes());
    assert_eq!((code(&output), text(&output.stderr).as_str()), (0, ""));
    assert_eq!(fs::read_to_string(&target).unwrap(), ROW);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "the records and their manifest");
}

#[test]
fn a_failed_run_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (target, report) = (dir.path().join("kto.jsonl"), dir.path().join("r.json"));
    let args = ["-o", target.to_str().unwrap(), "--report", report.to_str().unwrap()];
    let output = run(&args, format!("{ROW}{{\n").as_bytes());
    assert_eq!(code(&output), 65);
    assert_eq!(text(&output.stdout), "");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_failed_stream_stops_the_next_tool_too() {
    let first = run(&["-q"], format!("{ROW}{{\n").as_bytes());
    assert_eq!(code(&first), 65);
    let second = run(&["-q", "--on-error", "skip"], &first.stdout);
    assert_eq!(code(&second), 65);
    assert!(
        text(&second.stderr)
            .starts_with("kto-convert: <stdin>:2: the stream ends with an error: <stdin>:2:1: ")
    );
}

#[test]
fn inputs_that_are_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    for (args, exit) in [
        (vec!["/nonexistent/x.jsonl"], 66),
        (vec![folder], 66),
        (vec!["-", "-"], 2),
        (vec!["-o", "/nonexistent/y.jsonl"], 73),
        (vec!["--order", "random"], 2),
        (vec!["--map", "prompt"], 2),
        (vec!["--label-map", "a=b"], 2),
        (vec!["--max-line", "0"], 2),
        (vec!["--empty", "keep", "--skip-empty"], 2),
    ] {
        let output = run(&args, ROW.as_bytes());
        assert_eq!(code(&output), exit, "{args:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{args:?}");
        let lines = text(&output.stderr).lines().count();
        assert!((1..=2).contains(&lines), "{args:?}: {}", text(&output.stderr));
    }
}

#[test]
fn a_device_is_written_to_and_not_replaced() {
    let output = run(&["-q", "-o", "/dev/null"], ROW.as_bytes());
    assert_eq!(code(&output), 0);
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
    assert_eq!(text(&run(&["-q", "-o", "-"], ROW.as_bytes()).stdout), ROW);
}

#[test]
fn a_report_goes_to_standard_output_only_alone() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("kto.jsonl");
    let both = run(&["--report", "-"], ROW.as_bytes());
    assert_eq!((code(&both), text(&both.stdout).as_str()), (2, ""));
    let alone = run(&["-q", "--report", "-", "-o", target.to_str().unwrap()], ROW.as_bytes());
    assert_eq!(code(&alone), 0);
    assert!(text(&alone.stdout).starts_with("{\n") && text(&alone.stdout).contains("\"records\""));
    assert_eq!(fs::read_to_string(&target).unwrap(), ROW);
}

#[test]
fn absurd_sizes_end_in_one_line() {
    let deep = format!("{{\"prompt\": {}", "[".repeat(100_000));
    let deep_object = "{\"a\":".repeat(100_000);
    let long = format!("{{\"prompt\": \"{}\"}}\n", "a".repeat(2 << 20));
    let array = format!("[{long}]");
    let table = format!("prompt,completion,label\n\"{}", "a\n".repeat(1 << 20));
    for (args, input, what) in [
        (vec![], &deep, "nesting deeper than 128"),
        (vec![], &deep_object, "nesting deeper than 128"),
        (vec!["--max-line", "1MiB"], &long, "<stdin>:1: line longer than 1 MiB"),
        (vec!["--max-line", "1MiB"], &array, "<stdin>:1: array element longer than 1 MiB"),
        (vec!["--max-line", "1MiB", "--in-format", "csv"], &table, "<stdin>:2: row longer than 1 MiB"),
    ] {
        let output = run(&args, input.as_bytes());
        assert_eq!(code(&output), 65);
        let err = text(&output.stderr);
        assert!(err.lines().next().unwrap().contains(what), "{err}");
        assert!(err.lines().count() <= 2 && err.len() < 300, "{err}");
    }
}

#[test]
fn a_hundred_thousand_keys_take_no_time() {
    let keys: String = (0..100_000).map(|i| format!("\"k{i}\": {i}, ")).collect();
    let row = format!("{{{keys}\"prompt\": \"p\", \"completion\": \"c\", \"label\": true}}\n");
    let start = Instant::now();
    let output = run(&["-q"], row.as_bytes());
    assert_eq!(code(&output), 0);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(text(&output.stdout).contains("\"k99999\": 99999"));
}

#[test]
fn messages_cannot_drive_the_terminal() {
    let output = run(&[], b"{\"prompt\": \"p\", \"completion\": \"c\", \"label\": \"\\u001b[31m\\u0007\"}\n");
    assert_eq!(code(&output), 65);
    assert!(!output.stderr.contains(&0x1b) && !output.stderr.contains(&7), "{}", text(&output.stderr));
}
