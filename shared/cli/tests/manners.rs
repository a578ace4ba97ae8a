//! The manners seen from outside: exit codes, streams, signals and files of a real process (`examples/probe.rs`).

#![allow(clippy::unwrap_used)] // a test may

#[path = "manners/configuration.rs"]
mod configuration;
#[path = "manners/make.rs"]
mod make;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::FileTypeExt, fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

fn probe_path() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let path = me.ancestors().nth(2).unwrap().join("examples/probe");
    assert!(path.exists(), "the probe is built by a plain `cargo test --release -p kto-cli`");
    path
}

fn probe(arguments: &[&str]) -> Command {
    let mut command = Command::new(probe_path());
    command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a line of bash in which `$P` is the probe; returns what it printed.
fn bash(dir: &Path, script: &str) -> Output {
    let mut command = Command::new("bash");
    command.args(["-c", script]).current_dir(dir).env("P", probe_path()).env_remove("NO_COLOR");
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Starts a job and waits until it says that it is half way.
fn start(dir: &Path, arguments: &[&str]) -> Child {
    let mut child = probe(arguments).current_dir(dir).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

fn names(dir: &TempDir) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_reader_that_leaves_ends_us_quietly() {
    let dir = tempfile::tempdir().unwrap();
    for job in ["lines", "--help", "--generate man"] {
        let out = bash(dir.path(), &format!("$P {job} | head -1; echo ${{PIPESTATUS[0]}}"));
        assert!(text(&out.stdout).ends_with("\n0\n"), "{job}: {}", text(&out.stdout));
        assert_eq!(text(&out.stderr), "", "{job}");
    }
}

#[test]
fn a_full_device_is_74_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    for job in ["lines", "--help", "--version", "--generate bash", "copy /etc/passwd", "lines -o /dev/full"] {
        let out = bash(dir.path(), &format!("$P {job} > /dev/full"));
        assert_eq!(out.status.code(), Some(74), "{job}");
        assert_eq!(text(&out.stderr).lines().count(), 1, "{job}: {}", text(&out.stderr));
        assert!(text(&out.stderr).ends_with("no space left on device\n"), "{job}: {}", text(&out.stderr));
    }
}

#[test]
fn a_lost_error_stream_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for lost in ["2>/dev/full", "2>&-"] {
        let out = bash(dir.path(), &format!("$P talk -vv {lost}; $P lines {lost} | wc -l"));
        assert_eq!(text(&out.stdout), "1000000\n");
        for (job, code) in [("panic", 70), ("bad-row", 65), ("--nonsense", 2)] {
            assert_eq!(
                bash(dir.path(), &format!("$P {job} {lost}")).status.code(),
                Some(code),
                "{job} {lost}"
            );
        }
    }
    assert_eq!(bash(dir.path(), "$P lines >&-").status.code(), Some(0));
}

#[test]
fn errors_are_one_line_and_a_hint() {
    let out = probe(&["bad-row"]).output().unwrap();
    assert_eq!(out.status.code(), Some(65));
    assert_eq!(text(&out.stderr), "probe: a.jsonl:7: found \"\\u{1b}[31m\\nx\"\nhint: --on-error skip\n");
    let out = probe(&["lines", "--ouT", "x"]).output().unwrap();
    assert_eq!((out.status.code(), text(&out.stderr).lines().count()), (Some(2), 2));
    assert!(text(&out.stderr).starts_with("probe: unexpected argument '--ouT' found\nhint: "));
    assert_eq!(text(&probe(&[]).output().unwrap().stderr).lines().last(), Some("hint: probe --help"));
    let out = probe(&["copy", "no-such-file"]).output().unwrap();
    assert_eq!(
        (out.status.code(), text(&out.stderr)),
        (Some(66), "probe: no-such-file: no such file or directory\n")
    );
    assert_eq!(probe(&["copy", "/"]).output().unwrap().status.code(), Some(66));
    assert_eq!(probe(&["copy", "-", "-"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn a_panic_is_70_and_one_line() {
    let out = probe(&["panic"]).output().unwrap();
    assert_eq!(out.status.code(), Some(70));
    let line = text(&out.stderr);
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.starts_with("probe: internal error: two\\nlines (cli/examples/probe.rs:"), "{line}");
    assert!(line.ends_with("; please report\n"), "{line}");
}

#[test]
fn no_memory_is_71() {
    let out = probe(&["greedy"]).output().unwrap();
    assert_eq!(out.status.code(), Some(71));
    // The standard library adds a note about backtraces.
    assert!(text(&out.stderr).starts_with("memory allocation of 4611686018427387904 bytes failed\n"));
}

#[test]
fn help_and_version_say_what_every_tool_must_say() {
    let help = probe(&["--help"]).output().unwrap();
    assert_eq!((help.status.code(), text(&help.stderr)), (Some(0), ""));
    assert!(text(&help.stdout).contains("Exit status:\n") && text(&help.stdout).contains("  143  SIGTERM"));
    assert!(!text(&probe(&["-h"]).output().unwrap().stdout).contains("Exit status:"));
    let version = probe(&["--version"]).output().unwrap();
    let lines: Vec<_> = text(&version.stdout).lines().collect();
    assert!(lines[0].starts_with("probe 0.") && lines[0].contains("(git "), "{lines:?}");
    assert!(
        lines.iter().any(|l| l.starts_with("features: cpu")) && lines.iter().any(|l| l.starts_with("simd: "))
    );
    for (kind, word) in
        [("man", ".TH probe"), ("bash", "_probe()"), ("zsh", "#compdef probe"), ("fish", "complete -c probe")]
    {
        let out = probe(&["--generate", kind]).output().unwrap();
        assert!(out.status.success() && text(&out.stdout).contains(word), "{kind}");
        let page = text(&out.stdout);
        assert!(kind != "man" || page.contains("Print every option with its value"), "{page}");
    }
    assert_eq!(probe(&["--generate", "tcsh"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn colour_is_for_terminals_and_for_those_who_ask() {
    let stderr = |arguments: &[&str], name: &str| {
        let out = probe(arguments).env(name, "1").output().unwrap();
        String::from_utf8(out.stderr).unwrap()
    };
    assert!(!stderr(&["talk", "-vv"], "UNUSED").contains('\x1b'));
    assert!(stderr(&["talk"], "CLICOLOR_FORCE").contains("\x1b["));
    assert!(!stderr(&["talk", "--color=never"], "CLICOLOR_FORCE").contains('\x1b'));
    assert!(stderr(&["talk", "--color=always"], "NO_COLOR").contains("\x1b["));
    let help = probe(&["--help", "--color", "always"]).output().unwrap();
    assert!(text(&help.stdout).contains('\x1b'));
}

#[test]
fn the_volume_is_obeyed() {
    let lines =
        |flag: &[&str]| text(&probe(&[&["talk"], flag].concat()).output().unwrap().stderr).lines().count();
    assert_eq!([lines(&["-q"]), lines(&[]), lines(&["-v"]), lines(&["-vv"])], [0, 2, 3, 4]);
    for flag in ["--progress=auto", "--progress=always", "-q"] {
        assert_eq!(
            text(&probe(&["work", flag]).output().unwrap().stderr),
            "",
            "{flag}: no bar without a terminal"
        );
    }
}

#[test]
fn signals_are_told_apart_and_the_second_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:")).unwrap_or("0").trim();
    let ignored = u64::from_str_radix(mask, 16).unwrap();
    for (name, number, code, line) in [
        ("-INT", 2, 130, "probe: stopped by SIGINT\n"),
        ("-TERM", 15, 143, "probe: stopped by SIGTERM\n"),
        ("-HUP", 1, 129, "probe: stopped by SIGHUP\n"),
    ] {
        // Whoever started the tests may have them ignore a signal, and so the tool.
        if ignored >> (number - 1) & 1 == 1 {
            continue;
        }
        let child = start(dir.path(), &["wait"]);
        signal(&child, name);
        let out = child.wait_with_output().unwrap();
        assert_eq!((out.status.code(), text(&out.stderr)), (Some(code), line));
        // Work that does not look: the first signal is only noted, also when it comes twice at once, as from `timeout`; a later one
        // ends it.
        let mut child = start(dir.path(), &["deaf"]);
        signal(&child, name);
        signal(&child, name);
        std::thread::sleep(Duration::from_millis(500));
        assert!(child.try_wait().unwrap().is_none());
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
    // Who waits for input, or was started by nohup.
    let out = bash(
        dir.path(),
        "(sleep 20 & echo $! >sleeper; wait) | $P wait-for-input & sleep 0.5; kill -TERM $!; wait $!; echo $?; kill $(cat sleeper)
         trap '' HUP; $P wait >ready & sleep 0.5; kill -HUP $!; sleep 0.2; kill -TERM $!; wait $!; echo $?",
    );
    assert_eq!(text(&out.stdout), "143\n143\n", "{}", text(&out.stderr));
    // Without a handler the system's default applies. SIGTERM only: a shell may have us ignore SIGINT.
    let mut child = start(dir.path(), &["half-file"]);
    signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}

#[test]
fn fifos_links_and_devices_are_written_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = bash(
        dir.path(),
        "mkfifo in out; ln -s real link; ln -s /dev/null nul
         echo one | gzip > in & cat out > seen & $P copy in -o out && wait && cat seen
         echo two | $P copy -o link && cat real
         $P copy /etc/passwd -o nul && $P copy /etc/passwd -o /dev/null
         echo three | $P copy -o /dev/stdout; echo four >> log; echo five | $P copy -o /dev/stdout >> log; cat log
         echo six | $P copy -o >(cat > sub); sleep 0.2; cat sub",
    );
    assert_eq!(text(&out.stdout), "one\ntwo\nthree\nfour\nfive\nsix\n", "{}", text(&out.stderr));
    assert!(fs::symlink_metadata(dir.path().join("out")).unwrap().file_type().is_fifo());
    assert!(fs::symlink_metadata(dir.path().join("link")).unwrap().is_symlink());
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    assert!(names(&dir).iter().all(|n| !n.ends_with(".kto-tmp")), "{:?}", names(&dir));
}

#[test]
fn what_lies_beside_a_result_overwrites_nothing_of_the_run() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in"), "one\n").unwrap();
    for flags in [
        "-o out --depfile in",
        "-o out --manifest ./in",
        "-o out --manifest out",
        "-o out --depfile $PWD/out",
        "-o out --manifest x --depfile x",
    ] {
        let out = bash(dir.path(), &format!("$P copy in {flags}; echo $?"));
        assert_eq!(text(&out.stdout), "2\n", "{flags}: {}", text(&out.stderr));
        assert!(text(&out.stderr).contains("would overwrite"), "{flags}: {}", text(&out.stderr));
        assert_eq!(names(&dir), ["in"], "{flags}");
    }
    assert_eq!(fs::read_to_string(dir.path().join("in")).unwrap(), "one\n");
}

#[test]
fn the_umask_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    bash(
        dir.path(),
        "umask 027; echo | $P copy -o a; umask 002; echo | $P copy -o b; chmod 600 b; echo | $P copy -o b",
    );
    let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("a"), mode("b")), (0o640, 0o600));
}

#[test]
fn kill_9_leaves_the_old_bytes_and_the_next_start_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("data"), "old").unwrap();
    fs::create_dir(dir.path().join("model")).unwrap();
    fs::write(dir.path().join("model/file"), "old").unwrap();
    for arguments in [["half-file", "-o", "data"], ["half-dir", "-o", "model"], ["half-file", "-o", "fresh"]]
    {
        let mut child = start(dir.path(), &arguments);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let all = names(&dir);
    assert_eq!(
        all.iter().filter(|n| n.ends_with(".kto-tmp")).count(),
        1,
        "each run sweeps what the one before left: {all:?}"
    );
    assert_eq!(fs::read_to_string(dir.path().join("data")).unwrap(), "old");
    assert_eq!(fs::read_to_string(dir.path().join("model/file")).unwrap(), "old");
    assert!(!dir.path().join("fresh").exists());
    // A live neighbour's name stays.
    let mut alive = start(dir.path(), &["half-file", "-o", "slow"]);
    assert_eq!(bash(dir.path(), "echo new | $P copy -o data").status.code(), Some(0));
    let temporary: Vec<_> = names(&dir).into_iter().filter(|n| n.ends_with(".kto-tmp")).collect();
    assert_eq!(temporary, [format!(".slow.{}.kto-tmp", alive.id())]);
    alive.kill().unwrap();
    alive.wait().unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("data")).unwrap(), "new\n");
}

#[test]
fn a_failed_write_keeps_the_old_file_and_leaves_no_other() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("data"), "old").unwrap();
    // A limit on the file size fails a write in the middle, as a full disk does.
    let out = bash(dir.path(), "ulimit -f 100; $P lines -o data");
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(74), "probe: data: file too large\n"));
    assert_eq!(names(&dir), ["data"]);
    assert_eq!(fs::read_to_string(dir.path().join("data")).unwrap(), "old");
}

#[test]
fn a_held_lock_is_75_and_dies_with_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let mut holder = start(dir.path(), &["lock"]);
    let out = probe(&["lock"]).current_dir(dir.path()).output().unwrap();
    assert_eq!(out.status.code(), Some(75));
    assert!(
        text(&out.stderr).contains(&format!("locked by pid {} on ", holder.id())),
        "{}",
        text(&out.stderr)
    );
    holder.kill().unwrap();
    holder.wait().unwrap();
    let mut next = start(dir.path(), &["lock"]);
    next.kill().unwrap();
    next.wait().unwrap();
}

#[test]
fn cut_gzip_is_65_from_files_pipes_and_standard_input() {
    let dir = tempfile::tempdir().unwrap();
    let script = "seq 100000 | gzip > whole.gz; head -c 9999 whole.gz > cut.gz; seq 100000 > plain
         $P copy whole.gz | cmp - plain && $P copy < whole.gz | cmp - plain && cat whole.gz | $P copy - | cmp - plain";
    assert_eq!(bash(dir.path(), script).status.code(), Some(0));
    for form in ["$P copy cut.gz -o x", "$P copy -o x < cut.gz", "cat cut.gz | $P copy -o x"] {
        let out = bash(dir.path(), form);
        assert_eq!(out.status.code(), Some(65), "{form}");
        assert!(
            text(&out.stderr).ends_with(": gzip stream ends early at byte 9999\n"),
            "{}",
            text(&out.stderr)
        );
    }
    assert!(!dir.path().join("x").exists());
}

#[test]
fn a_slow_writer_of_single_bytes_is_waited_for() {
    let mut child = probe(&["copy"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for byte in b"PK slow\n" {
        stdin.write_all(&[*byte]).unwrap();
        stdin.flush().unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(stdin);
    let mut seen = String::new();
    child.stdout.take().unwrap().read_to_string(&mut seen).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(seen, "PK slow\n");
}

#[test]
fn help_is_fast() {
    let mut times: Vec<Duration> = (0..11)
        .map(|_| {
            let start = Instant::now();
            assert!(
                probe(&["--help"]).stdout(File::create("/dev/null").unwrap()).status().unwrap().success()
            );
            start.elapsed()
        })
        .collect();
    times.sort();
    // 10 ms is the promise on a quiet machine; the fastest of eleven says it even on a busy one.
    assert!(times[0] < Duration::from_millis(10), "{times:?}");
}
