//! SIGINT, SIGTERM and SIGHUP as a question that long work asks between two steps.
//!
//! A tool that never calls [`install`] dies at once, the default of the system. After [`install`] the first signal is
//! only noted, so that the step can be finished and saved; a second one ends the process immediately (130, 143, 129).
//! A signal that whoever started the process lets it ignore, as `nohup` does, stays ignored.

use crate::{Error, Kind, Result};
use signal_hook::{
    consts::{SIGABRT, SIGHUP, SIGINT, SIGTERM},
    flag,
    iterator::Signals,
    low_level,
};
use std::{
    fs,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicI32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// `timeout` and a terminal that closes send a signal to the process and to its group: what comes again within this time
/// is the same one. A person's second Ctrl-C takes longer.
const ECHO: Duration = Duration::from_millis(300);

/// The first signal, or 0.
static FIRST: AtomicI32 = AtomicI32::new(0);

/// Whether the first one already ends the process.
static AT_ONCE: AtomicBool = AtomicBool::new(false);

/// Takes over SIGINT, SIGTERM and SIGHUP. Calling it again does nothing. Where no thread can be started the system's default stays.
pub fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let (ready, listens) = mpsc::channel();
        let heard: Vec<i32> = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|s| !is_ignored(*s)).collect();
        let listen = move || {
            let signals = Signals::new(heard);
            let _ = ready.send(());
            signals.into_iter().for_each(listen);
        };
        if thread::Builder::new().name("signals".into()).spawn(listen).is_ok() {
            let _ = listens.recv();
        }
    });
}

fn listen(mut signals: Signals) {
    let mut first: Option<(i32, Instant)> = None;
    for signal in signals.forever() {
        let echo = first.is_some_and(|(earlier, at)| earlier == signal && at.elapsed() < ECHO);
        if AT_ONCE.load(Ordering::Relaxed) || first.is_some() && !echo {
            low_level::exit(kind(signal).code().into());
        }
        first = first.or(Some((signal, Instant::now())));
        let _ = FIRST.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Whether the process was started with this signal ignored. Known on Linux.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

fn kind(signal: i32) -> Kind {
    match signal {
        SIGTERM => Kind::Terminated,
        SIGHUP => Kind::HungUp,
        _ => Kind::Interrupted,
    }
}

/// Returns [`Kind::Interrupted`], [`Kind::Terminated`] or [`Kind::HungUp`] once a signal has come.
pub fn pending() -> Option<Kind> {
    match FIRST.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(kind(signal)),
    }
}

/// Returns the error that ends the tool with 130, 143 or 129 once a signal has come.
pub fn check() -> Result<()> {
    let Some(kind) = pending() else { return Ok(()) };
    let name = match kind {
        Kind::Terminated => "SIGTERM",
        Kind::HungUp => "SIGHUP",
        _ => "SIGINT",
    };
    Err(Error::new(kind, format!("stopped by {name}")))
}

/// Whether an error says that the tool was stopped.
pub fn is_stop(kind: Kind) -> bool {
    matches!(kind, Kind::Interrupted | Kind::Terminated | Kind::HungUp)
}

/// Until this is dropped the first signal ends the process: it waits for somebody, and there is nothing to save.
#[derive(Debug)]
pub struct AtOnce(());

impl AtOnce {
    /// Begins such a time; a signal that has come already ends the process now.
    pub fn begin() -> Self {
        AT_ONCE.store(true, Ordering::Relaxed);
        if let Some(kind) = pending() {
            low_level::exit(kind.code().into());
        }
        Self(())
    }
}

impl Drop for AtOnce {
    fn drop(&mut self) {
        AT_ONCE.store(false, Ordering::Relaxed);
    }
}

/// Makes a write past `ulimit -f` fail with EFBIG (74) instead of killing the process.
pub(crate) fn soften_file_size_limit() {
    // 25 on every Linux and on macOS; signal-hook names it only on some systems.
    let _ = flag::register(25, Arc::default());
}

/// Turns the abort of a failed allocation into exit code 71. The standard library has printed its line by then
/// ("memory allocation of N bytes failed"). The returned flag switches this off: an abort after a panic is not ours.
pub(crate) fn out_of_memory_is_71() -> Arc<AtomicBool> {
    let armed = Arc::new(AtomicBool::new(true));
    let _ = flag::register_conditional_shutdown(SIGABRT, 71, Arc::clone(&armed));
    armed
}
