//! A small tool that does one thing the manners promise something about; `tests/manners.rs` runs it as a process.

use clap::{Parser, ValueEnum};
use kto_cli::{
    Common, Error, Exit, Kind, Record, Result, Ui,
    atomic::{self, AtomicDir, AtomicFile},
    input,
    lock::RunLock,
    number,
    output::Output,
    signal::{self, AtOnce},
};
use std::{
    fs,
    io::{self, BufRead, Read},
    path::{Path, PathBuf},
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
    /// A number above 0
    #[arg(long, value_name = "X", value_parser = number::positive, default_value_t = 0.5, alias = "learning-rate")]
    lr: f64,
    /// A whole number
    #[arg(long, value_name = "N")]
    rank: Option<u32>,
    /// Texts
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    tags: Vec<String>,
    /// A text
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
    /// One of two
    #[arg(long, value_name = "HOW")]
    how: Option<How>,
    /// One of two, unless it is said otherwise
    #[arg(long, value_name = "HOW", default_value = "fast")]
    usual: How,
    /// The same as --usual slow
    #[arg(long, conflicts_with = "usual")]
    slow: bool,
    /// A time, or none
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "ever")]
    again: Option<String>,
    /// A switch
    #[arg(long)]
    keep: bool,
    /// Another one
    #[arg(long, conflicts_with = "keep")]
    drop: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    Fast,
    Slow,
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
    /// Takes over the signals and waits for input
    WaitForInput,
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
    /// Prints what it was told
    Tell,
    /// Writes a directory of two files
    Dir,
    /// Finds that two options contradict each other
    Contradiction,
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
        Job::HalfFile => half_file(out.unwrap_or("half".as_ref()))?,
        Job::HalfDir => half_dir(out.unwrap_or("half".as_ref()))?,
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
        Job::WaitForInput => {
            signal::install();
            let _at_once = AtOnce::begin();
            io::stdin().read_to_end(&mut Vec::new()).map_err(|e| Error::reading("<stdin>".as_ref(), &e))?;
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
        Job::Tell if args.again.is_some() => say(&format!("again={:?}", args.again))?,
        Job::Contradiction => return Err(Error::usage("--rank has a meaning with --keep only")),
        Job::Tell => say(&format!(
            "lr={} rank={:?} tags={:?} note={:?} how={:?} keep={} drop={}",
            args.lr,
            args.rank,
            args.tags,
            args.note,
            if args.slow { Some(How::Slow) } else { args.how },
            args.keep,
            args.drop
        ))?,
        Job::Dir => directory(&args)?,
        Job::BadRow => {
            return Err(Error::data("a.jsonl:7: found \"\x1b[31m\nx\"").with_hint("--on-error skip"));
        }
    }
    Ok(Exit::Ok)
}

fn half_file(out: &Path) -> Result<()> {
    let mut file = AtomicFile::create(out)?;
    file.write(&vec![b'x'; 3 << 20])?;
    ready_and_sleep()?;
    file.commit()
}

fn half_dir(out: &Path) -> Result<()> {
    let dir = AtomicDir::create(out, true)?;
    fs::write(dir.path().join("file"), "new").map_err(|e| Error::writing(dir.path(), &e))?;
    ready_and_sleep()?;
    dir.commit()
}

/// The first input, and its length.
fn directory(args: &Args) -> Result<()> {
    let out = args.out.clone().unwrap_or("made".into());
    let mut record = Record::new(&args.common);
    record.output(Some(&out));
    record.files(&args.files);
    let dir = AtomicDir::create_if_changed(&out, args.keep, args.common.make.if_changed)?;
    let bytes = input::read(&args.files[0], 1 << 20)?;
    atomic::write(&dir.path().join("config.json"), bytes.len().to_string().as_bytes())?;
    atomic::write(&dir.path().join("data"), &bytes)?;
    record.commit(dir, &out)
}

fn copy(args: &Args) -> Result<()> {
    let paths = input::or_stdin(&args.files)?;
    let mut record = Record::new(&args.common);
    record.output(args.out.as_deref());
    record.files(&paths);
    record.check()?;
    let mut output = Output::create(args.out.as_deref())?.if_changed(args.common.make.if_changed);
    for path in paths {
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
    output.finish()?;
    record.finish()
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
