//! SIGINT and SIGTERM as a question that long work asks between two steps.
//!
//! A tool that never calls [`install`] dies at once, the default of the system. After [`install`] the first signal is
//! only noted, so that the step can be finished and saved; the second one ends the process immediately (130 or 143).

use crate::{Error, Kind, Result};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

struct Flags {
    any: Arc<AtomicBool>,
    interrupt: Arc<AtomicBool>,
    terminate: Arc<AtomicBool>,
}

static FLAGS: OnceLock<Flags> = OnceLock::new();

/// Takes over SIGINT and SIGTERM. Calling it again does nothing.
pub fn install() {
    FLAGS.get_or_init(|| {
        let flags = Flags { any: Arc::default(), interrupt: Arc::default(), terminate: Arc::default() };
        for (signal, code, own) in [(SIGINT, 130, &flags.interrupt), (SIGTERM, 143, &flags.terminate)] {
            // Order matters: the exit looks at the flag before this same signal sets it. A failure to register leaves
            // the system's default, which is acceptable.
            let _ = flag::register_conditional_shutdown(signal, code, Arc::clone(&flags.any));
            let _ = flag::register(signal, Arc::clone(own));
            let _ = flag::register(signal, Arc::clone(&flags.any));
        }
        flags
    });
}

/// Returns [`Kind::Interrupted`] or [`Kind::Terminated`] once a signal has come.
pub fn pending() -> Option<Kind> {
    let flags = FLAGS.get()?;
    if flags.terminate.load(Ordering::Relaxed) {
        Some(Kind::Terminated)
    } else if flags.interrupt.load(Ordering::Relaxed) {
        Some(Kind::Interrupted)
    } else {
        None
    }
}

/// Returns the error that ends the tool with 130 or 143 once a signal has come.
pub fn check() -> Result<()> {
    match pending() {
        None => Ok(()),
        Some(Kind::Terminated) => Err(Error::new(Kind::Terminated, "stopped by SIGTERM")),
        Some(kind) => Err(Error::new(kind, "stopped by SIGINT")),
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
    let _ = flag::register_conditional_shutdown(signal_hook::consts::SIGABRT, 71, Arc::clone(&armed));
    armed
}
