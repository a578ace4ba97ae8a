//! The bad inputs of the project's table of faults, rows 1 to 50: each as a file and as standard input, with its exit code and
//! what the one line must say. No output appears, but for rows that are accepted.

use super::{TOOL, code, run, testdata, text, tool};
use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const ROW: &str = "{\"prompt\": \"p\", \"completion\": \" c\", \"label\": true}\n";

struct Fault {
    /// Number in the table.
    row: u32,
    /// What a file of it is called; the end tells a table.
    file: &'static str,
    args: &'static [&'static str],
    input: Vec<u8>,
    exit: i32,
    /// Part of the message; of the output when the exit code is 0.
    says: &'static str,
}

fn fault(row: u32, input: impl Into<Vec<u8>>, exit: i32, says: &'static str) -> Fault {
    Fault { row, file: "in.jsonl", args: &[], input: input.into(), exit, says }
}

impl Fault {
    fn args(self, args: &'static [&'static str]) -> Self {
        Self { args, ..self }
    }
    fn named(self, file: &'static str) -> Self {
        Self { file, ..self }
    }
}

fn csv(row: u32, input: impl Into<Vec<u8>>, exit: i32, says: &'static str) -> Fault {
    fault(row, input, exit, says).named("in.csv")
}

fn labelled(label: &str) -> String {
    format!("{{\"prompt\": \"p\", \"completion\": \"c\", \"label\": {label}}}\n")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child =
        Command::new("gzip").arg("-nc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let out = child.wait_with_output().unwrap().stdout;
    writer.join().unwrap();
    out
}

fn container(name: &str) -> Vec<u8> {
    fs::read(testdata("containers").join(name)).unwrap()
}

fn damaged(mut bytes: Vec<u8>, at: usize, len: usize) -> Vec<u8> {
    bytes[at..at + len].fill(0xee);
    bytes
}

fn cat(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// Texts of JSON Lines.
fn lines() -> Vec<Fault> {
    let r = ROW;
    let deep = format!("{{\"a\": {}\n", "[".repeat(100_000));
    let wide: String = (0..100_000).map(|i| format!("\"k{i}\": 0, ")).collect();
    let utf16: Vec<u8> = std::iter::once(0xfeff).chain(r.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    let chat = |messages: &str| format!("{{\"messages\": {messages}, \"label\": true}}\n");
    vec![
        fault(1, format!("{r}{{\"prompt\": "), 65, ":2:10: unexpected end of the JSON text"),
        fault(2, r.trim_end(), 0, "\"completion\": \" c\""),
        fault(3, "", 65, "no rows"),
        fault(3, "\n\n", 65, "no rows"),
        fault(3, "\n", 0, "").args(&["--allow-empty"]),
        fault(4, r.replace('\n', "\r\n"), 0, "\"completion\": \" c\""),
        fault(5, r.replace('\n', "\r").repeat(2), 65, "lines end in CR only"),
        fault(6, format!("\u{feff}{r}"), 0, "\"completion\": \" c\""),
        fault(6, format!("{r}\u{feff}{r}"), 65, ":2:1: "),
        fault(7, utf16, 65, "looks like UTF-16"),
        fault(8, cat(&[r.as_bytes(), b"{\"prompt\": \"\xff\"}\n"]), 65, ":2:13: invalid UTF-8 (byte 0xff)"),
        fault(8, b"{\"prompt\": \"\xc0\xaf\"}\n", 65, ":1:13: invalid UTF-8 (byte 0xc0)"),
        fault(8, b"{\"prompt\": \"\xed\xa0\xbd\xed\xb8\x80\"}\n", 65, ":1:13: invalid UTF-8"),
        fault(8, b"{\"prompt\": \"caf\xe9\"}\n", 65, ":1:16: invalid UTF-8"),
        fault(9, b"{\"prompt\": \"\xc3", 65, ":1:13: invalid UTF-8"),
        fault(
            10,
            "{\"prompt\": \"\\ud83e\", \"completion\": \"c\", \"label\": true}\n",
            65,
            "lone surrogate",
        ),
        fault(10, "{\"prompt\": \"\\ud83e\", \"completion\": \"c\", \"label\": true}\n", 0, "\u{fffd}")
            .args(&["--lossy"]),
        fault(11, cat(&[r.as_bytes(), b"\0\0\0\0"]), 65, ":2: NUL bytes at offset 51"),
        fault(11, cat(&[r.as_bytes(), &[0; 16], r.as_bytes()]), 65, ":2: NUL bytes at offset 51"),
        fault(12, "{\"prompt\": \"a\\u0000b\", \"completion\": \"c\", \"label\": true}\n", 0, "a\\u0000b"),
        fault(13, "{\"prompt\": \"a\u{1}b\"}\n", 65, "raw control character"),
        fault(
            14,
            "{\"prompt\": \"a\u{2028}b\u{85}c\", \"completion\": \"c\", \"label\": true}\n",
            0,
            "a\u{2028}b\u{85}c",
        ),
        fault(15, deep, 65, "nesting deeper than 128"),
        fault(15, "{\"a\":".repeat(100_000), 65, "nesting deeper than 128"),
        fault(
            16,
            format!("{{{wide}\"prompt\": \"p\", \"completion\": \"c\", \"label\": true}}\n"),
            0,
            "\"k99999\": 0",
        ),
        fault(17, format!("{r}{}\n", "a".repeat(3 << 20)), 65, ":2: line longer than 1 MiB")
            .args(&["--max-line", "1MiB"]),
        fault(
            18,
            "{\"prompt\": \"p\", \"completion\": \"c\", \"label\": true, \"label\": false}\n",
            65,
            "key \"label\" appears twice",
        ),
        fault(19, labelled("\"true\""), 65, "must be true or false, found \"true\""),
        fault(19, labelled("\"False\""), 65, "must be true or false, found \"False\""),
        fault(19, labelled("1"), 65, "must be true or false, found 1"),
        fault(19, labelled("0"), 65, "must be true or false, found 0"),
        fault(19, labelled("1"), 0, "\"label\": true").args(&["--label-map", "1=true,0=false"]),
        fault(20, labelled("2"), 65, "found 2"),
        fault(20, labelled("-1"), 65, "found -1"),
        fault(20, labelled("0.5"), 65, "found 0.5"),
        fault(20, labelled("null"), 65, "found null"),
        fault(20, labelled("[true]"), 65, "found a list"),
        fault(20, "{\"prompt\": \"p\", \"completion\": \"c\"}\n", 65, "field \"label\" is missing"),
        fault(21, labelled("NaN"), 65, "unexpected 'N' in JSON"),
        fault(21, labelled("1e400"), 65, "a number too large"),
        fault(
            22,
            "{\"id\": 1180591620717411303424, \"prompt\": \"p\", \"completion\": \"c\", \"label\": true}\n",
            0,
            "1180591620717411303424",
        ),
        fault(23, "{\"prompt\": \"p\", \"completion\": \" \\n\", \"label\": true}\n", 65, "empty completion"),
        fault(23, format!("{{\"prompt\": \"p\", \"completion\": \"\", \"label\": true}}\n{r}"), 0, "\" c\"")
            .args(&["--skip-empty"]),
        fault(
            24,
            "{\"prompt\": null, \"completion\": \"c\", \"label\": true}\n",
            65,
            "\"prompt\" must be text or a message list, found null",
        ),
        fault(24, "{\"prompt\": 7, \"completion\": \"c\", \"label\": true}\n", 65, "found 7"),
        fault(25, "{\"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"c\"}\n", 0, "\"label\": false"),
        fault(26, "{\"prompt\": \"p\", \"chosen\": \"c\"}\n", 65, "field \"rejected\" is missing"),
        fault(
            27,
            "{\"chosen\": \"\\n\\nHuman: a\\n\\nAssistant: b\", \"rejected\": \"\\n\\nHuman: x\\n\\nAssistant: b\"}\n",
            65,
            "have different prompts",
        ),
        fault(28, chat("[{\"role\": \"narrator\", \"content\": \"a\"}]"), 65, "unknown role \"narrator\""),
        fault(
            28,
            chat("[{\"role\": \"user\", \"content\": null}]"),
            65,
            "\"content\" must be text, found null",
        ),
        fault(28, chat("[]"), 65, "the message list is empty"),
        fault(29, format!("[{},\n{}]", r.trim_end(), r.trim_end()), 0, "\" c\"")
            .args(&["--in-format", "json"]),
        fault(29, format!("[{},\n{}]", r.trim_end(), r.trim_end()), 65, "").args(&["--in-format", "jsonl"]),
        fault(30, format!("{}{r}", r.trim_end()), 65, ":1:51: more text after the end"),
        fault(30, "{\"prompt\": \"p\",}\n", 65, "a comma with nothing after it"),
        fault(30, "{'prompt': 'p', 'label': True}\n", 65, "a Python literal"),
        fault(31, "<!DOCTYPE html><html></html>\n", 65, "HTML"),
        fault(
            31,
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            65,
            "Git LFS pointer",
        ),
        fault(32, r.repeat(3), 0, "\"label\": true"),
    ]
}

/// Tables of text.
fn tables() -> Vec<Fault> {
    let head = "prompt,completion,label\n";
    let wrong = |body: &str| format!("{head}{body}");
    vec![
        csv(33, wrong("a,b\n"), 65, ":2: 2 fields, the header has 3"),
        csv(33, wrong("a,b,true,x\n"), 65, ":2: 4 fields, the header has 3"),
        csv(
            34,
            wrong("a,b,true\nc,d,\"true\ne,f,false\n"),
            65,
            ":3: the quote opened on this line is never closed",
        ),
        csv(35, wrong("\"a\"x,b,true\n"), 65, ":2: text after the closing quote"),
        csv(35, wrong("a \"q\" b,c,true\n"), 65, ":2: a quote inside a field"),
        csv(36, "prompt,label,completion,label\na,b,c,d\n", 65, "column \"label\" appears twice"),
        csv(36, "prompt,answer_text,label\na,b,true\n", 65, "\"answer_text\""),
        csv(36, "a,b,true\nc,d,false\n", 65, "no known shape (found \"a\", \"b\", \"true\")"),
        csv(37, "prompt;completion;label\na;b;true\n", 65, "--delimiter ';'"),
        csv(37, "prompt\tcompletion\tlabel\na\tb\ttrue\n", 65, "--delimiter tab"),
        csv(37, "sep=;\nprompt;completion;label\na;b;true\n", 65, "--delimiter ';'"),
        csv(38, wrong("a\0,b,true\n"), 65, ":2: NUL bytes"),
        csv(38, cat(&[head.as_bytes(), b"caf\xe9,b,true\n"]), 65, ":2:4: invalid UTF-8"),
        csv(38, wrong("a,b,true\n").replace('\n', "\r"), 65, "CR without LF"),
        csv(38, format!("\u{feff}{head}\r\n\r\na,b,true\r\n"), 0, "\"prompt\": \"a\""),
        csv(39, head, 65, "no rows"),
    ]
}

/// Containers.
fn containers() -> Vec<Fault> {
    let gz = gzip(ROW.repeat(50).as_bytes());
    let mut bad_sum = gz.clone();
    let at = bad_sum.len() - 6;
    bad_sum[at] ^= 1;
    let two = cat(&[&gzip(ROW.as_bytes()), &gzip(ROW.replace(" c", " second").as_bytes())]);
    let (parquet, stream, file) =
        (container("snappy.parquet"), container("stream.arrow"), container("file.feather"));
    let nested = container("label_list.parquet");
    vec![
        fault(40, &gz[..gz.len() / 2], 65, "gzip stream ends early at byte"),
        fault(40, &gz[..gz.len() - 8], 65, "gzip stream ends early at byte"),
        fault(40, bad_sum, 65, "corrupt gzip stream"),
        fault(40, cat(&[&gz, b"garbage"]), 65, "gzip"),
        fault(41, two, 0, " second"),
        fault(42, ROW, 0, "\" c\"").named("in.jsonl.gz"),
        fault(42, gzip(ROW.as_bytes()), 0, "\" c\""),
        fault(43, gzip(&vec![b'a'; 100 << 20]), 65, ":1: line longer than 64 MiB"),
        fault(44, "PK\x03\x04....", 65, "zip archive"),
        fault(44, b"\xfd7zXZ\0..", 65, "xz data"),
        fault(44, container("lines.jsonl.zst"), 0, "\"label\": true"),
        fault(44, &container("lines.jsonl.zst")[..100], 65, "Zstandard stream ends early"),
        fault(45, damaged(parquet.clone(), 20, 200), 65, "corrupt Parquet file"),
        fault(45, damaged(parquet.clone(), 4, 12), 65, "corrupt Parquet file"),
        fault(46, &parquet[..parquet.len() / 2], 65, "corrupt Parquet file"),
        fault(46, damaged(parquet.clone(), parquet.len() - 8, 4), 65, "corrupt Parquet file"),
        fault(46, container("no_rows.parquet"), 65, "no rows"),
        fault(47, nested, 65, "field \"label\" must be true or false, found a list"),
        fault(47, container("interval.arrow"), 65, "column \"label\" has type Interval"),
        fault(48, &stream[..stream.len() - 700], 65, "cut at byte"),
        fault(48, &file[..file.len() - 20], 65, "cut"),
        fault(48, damaged(stream, 700, 64), 65, ""),
    ]
}

fn check(fault: &Fault, way: &str, output: &std::process::Output) -> Result<(), String> {
    let err = text(&output.stderr);
    let place = format!("row {} {way} ({})", fault.row, fault.says);
    if code(output) != fault.exit {
        return Err(format!("{place}: exit {}\n{err}", code(output)));
    }
    if fault.exit == 0 {
        let out = text(&output.stdout);
        return if out.contains(fault.says) { Ok(()) } else { Err(format!("{place}: {out}")) };
    }
    let first = err.lines().next().unwrap_or_default();
    if !err.contains(fault.says)
        || !first.starts_with("kto-convert: ")
        || err.lines().count() > 2
        || err.len() > 500
    {
        return Err(format!("{place}: {err}"));
    }
    // What was good before the fault may be on its way; then the stream says that it is not whole.
    let out = text(&output.stdout);
    if !out.is_empty() && !out.lines().last().is_some_and(|line| line.starts_with("{\"kto_error\":")) {
        return Err(format!("{place}: the output ends as if it were whole"));
    }
    Ok(())
}

#[test]
fn rows_1_to_48_as_file_and_as_stdin() {
    let faults: Vec<Fault> = lines().into_iter().chain(tables()).chain(containers()).collect();
    let mut failed = Vec::new();
    for fault in &faults {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(fault.file), &fault.input).unwrap();
        let start = Instant::now();
        let named =
            tool().current_dir(dir.path()).args(["-q"]).args(fault.args).arg(fault.file).output().unwrap();
        let mut args: Vec<&str> = vec!["-q"];
        args.extend(fault.args);
        if fault.file == "in.csv" {
            args.extend(["--in-format", "csv"]);
        }
        let piped = run(&args, &fault.input);
        failed.extend(check(fault, "as a file", &named).err());
        failed.extend(check(fault, "as standard input", &piped).err());
        // A hang is a fault too; the bound is far from what any of them takes.
        assert!(start.elapsed() < Duration::from_secs(60), "row {}", fault.row);
    }
    assert!(failed.is_empty(), "{} failed\n{}", failed.len(), failed.join("\n"));
    let mut rows: Vec<u32> = faults.iter().map(|f| f.row).collect();
    rows.dedup();
    assert_eq!(rows, (1..=48).collect::<Vec<_>>(), "every row has a case");
}

#[test]
fn row_49_no_input_to_read() {
    let shell = |line: &str| Command::new("bash").args(["-c", line]).env("T", TOOL).output().unwrap();
    let closed = shell("$T <&-");
    assert_eq!(code(&closed), 66, "{}", text(&closed.stderr));
    let dir = tempfile::tempdir().unwrap();
    let folder = tool().arg(dir.path()).output().unwrap();
    assert_eq!(code(&folder), 66);
    assert!(text(&folder.stderr).contains("a directory without data files"), "{}", text(&folder.stderr));
    let redirected = shell(&format!("$T < {}", dir.path().display()));
    assert_eq!(code(&redirected), 66, "{}", text(&redirected.stderr));
}

#[test]
fn row_50_a_writer_that_dies_in_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "mkfifo p; (printf '%s\\n%s' '{}' '{{\"prompt\": \"p' > p) & $T -q p; echo $?; \
         printf '%s\\n%s' '{}' '{{\"prompt\": \"p' | $T -q; echo $?",
        ROW.trim_end(),
        ROW.trim_end()
    );
    let output =
        Command::new("bash").args(["-c", &script]).current_dir(dir.path()).env("T", TOOL).output().unwrap();
    let codes: Vec<String> =
        text(&output.stdout).lines().filter(|l| l.len() < 4).map(str::to_owned).collect();
    assert_eq!(codes, ["65", "65"], "{}", text(&output.stderr));
    let err = text(&output.stderr);
    assert!(err.contains("p:2:13: unexpected end") && err.contains("<stdin>:2:13: unexpected end"), "{err}");
}
