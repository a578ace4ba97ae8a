//! A small tool that does one thing the manners promise something about; `tests/manners.rs` runs it as a process.

use clap::{Parser, ValueEnum};
use kto_cli::{
    Common, Error, Exit, Kind, Result, Ui,
    atomic::{AtomicDir, AtomicFile},
    input,
    lock::RunLock,
    output::Output,
    signal,
};
use std::{
    fs,
    io::BufRead,
    path::PathBuf,
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

/// Probes the manners of the tools
#[derive(Parser)]
struct Args {
    /// What to do
    job: Job,
    /// Inputs
    files: Vec<PathBuf>,
    /// Output
    #[arg(short, long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, ValueEnum)]
enum Job {
    /// Copies the inputs
    Copy,
    /// Writes a million lines
    Lines,
    /// Writes half a file, says so and sleeps
    HalfFile,
    /// Writes half a directory, says so and sleeps
    HalfDir,
    /// Panics
    Panic,
    /// Asks for more memory than there is
    Greedy,
    /// Waits for a signal, as a training run does
    Wait,
    /// Takes over the signals and never looks
    Deaf,
    /// Takes a lock, says so and sleeps
    Lock,
    /// Says everything it can say
    Talk,
    /// Works for a second with progress
    Work,
    /// Complains about a row
    BadRow,
}

fn main() -> ExitCode {
    kto_cli::run("probe", |args: &Args| &args.common, run)
}

fn run(args: Args, ui: &Ui) -> Result<Exit> {
    let out = args.out.as_deref();
    match args.job {
        Job::Copy => copy(&args)?,
        Job::Lines => {
            let mut output = Output::create(out)?;
            for n in 0..1_000_000 {
                output.write(format!("{{\"n\": {n}}}\n").as_bytes())?;
            }
            output.finish()?;
        }
        Job::HalfFile => {
            let mut file = AtomicFile::create(out.unwrap_or("half".as_ref()))?;
            file.write(&vec![b'x'; 3 << 20])?;
            ready_and_sleep()?;
            file.commit()?;
        }
        Job::HalfDir => {
            let dir = AtomicDir::create(out.unwrap_or("half".as_ref()), true)?;
            fs::write(dir.path().join("file"), "new").map_err(|e| Error::writing(dir.path(), &e))?;
            ready_and_sleep()?;
            dir.commit()?;
        }
        Job::Panic => {
            let none: Option<u32> = std::hint::black_box(None);
            let _ = none.expect("two\nlines");
        }
        Job::Greedy => {
            let all: Vec<u8> = Vec::with_capacity(std::hint::black_box(1 << 62));
            std::hint::black_box(all);
        }
        Job::Wait => {
            signal::install();
            say("ready")?;
            loop {
                signal::check()?;
                sleep(Duration::from_millis(5));
            }
        }
        Job::Deaf => {
            signal::install();
            ready_and_sleep()?;
        }
        Job::Lock => {
            let _lock = RunLock::acquire(out.unwrap_or(".".as_ref()))?;
            ready_and_sleep()?;
        }
        Job::Talk => {
            ui.note("note");
            ui.warn("careful");
            ui.detail("detail");
            ui.trace("trace");
        }
        Job::Work => {
            let progress = ui.progress(100, "rows");
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(1) {
                sleep(Duration::from_millis(10));
                progress.add(1);
            }
        }
        Job::BadRow => {
            return Err(Error::data("a.jsonl:7: found \"\x1b[31m\nx\"").with_hint("--on-error skip"));
        }
    }
    Ok(Exit::Ok)
}

fn copy(args: &Args) -> Result<()> {
    let mut output = Output::create(args.out.as_deref())?;
    for path in input::or_stdin(&args.files)? {
        let mut input = input::open(&path)?;
        loop {
            let bytes = input.reader.fill_buf().map_err(|e| input::error(&input.name, &e))?;
            let n = bytes.len();
            if n == 0 {
                break;
            }
            output.write(bytes)?;
            input.reader.consume(n);
        }
    }
    output.finish()
}

fn say(word: &str) -> Result<()> {
    let mut output = Output::create(None)?;
    output.write(format!("{word}\n").as_bytes())?;
    output.finish()
}

fn ready_and_sleep() -> Result<()> {
    say("ready")?;
    sleep(Duration::from_secs(60));
    Err(Error::new(Kind::Internal, "nobody came"))
}
