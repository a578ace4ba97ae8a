//! A fence around code that was not written for hostile bytes: third-party parsers that panic or recurse deeply.
//!
//! The panic hook of [`crate::run`] stays silent for a panic that [`catch`] turns into an error. The silence belongs to
//! the calling thread (and to threads of [`on_big_stack`]); a parser that panics on a thread pool still prints a line.

use crate::{Error, Kind, Result, escape};
use std::{
    any::Any,
    cell::Cell,
    fmt::Display,
    panic::{self, AssertUnwindSafe},
    thread,
};

/// Stack of [`on_big_stack`]: enough for 256 KiB of nested template source.
const BIG_STACK: usize = 256 << 20;

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body`; a panic inside becomes a bad-input error (65) that begins with `what`.
/// When `body` itself returns a `Result`, the call reads `catch("…", || …)??`.
pub fn catch<T>(what: impl Display, body: impl FnOnce() -> T) -> Result<T> {
    let before = SILENT.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(body));
    SILENT.set(before);
    outcome.map_err(|payload| match payload.downcast::<Error>() {
        Ok(error) => *error,
        Err(payload) => Error::data(format!("{what}: malformed ({})", panic_text(payload.as_ref()))),
    })
}

/// Runs `body` on a thread with a stack of 256 MiB and returns what it returns. Panics go on in the caller.
pub fn on_big_stack<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let silent = is_silent();
    let work = move || {
        SILENT.set(silent);
        body()
    };
    let joined = thread::scope(|scope| {
        let builder = thread::Builder::new().name("big-stack".into()).stack_size(BIG_STACK);
        match builder.spawn_scoped(scope, work) {
            Ok(handle) => handle.join(),
            Err(e) => Err(no_thread(&e)),
        }
    });
    match joined {
        Ok(value) => value,
        Err(payload) => panic::resume_unwind(payload),
    }
}

/// An error as a panic payload: [`crate::run`] and [`catch`] unpack it, and no hook runs for it.
fn no_thread(error: &std::io::Error) -> Box<dyn Any + Send> {
    Box::new(Error::new(Kind::OutOfMemory, format!("no thread with a stack of 256 MiB: {error}")))
}

/// Whether a panic of this thread will become an error.
pub(crate) fn is_silent() -> bool {
    SILENT.get()
}

/// The words of a panic on one line.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    escape(text.unwrap_or("no message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_bad_data() {
        let error = catch::<()>("x.arrow", || panic!("index {} out of range", 7)).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::Data, "x.arrow: malformed (index 7 out of range)")
        );
        assert_eq!(catch("fine", || 3).unwrap(), 3);
    }

    #[test]
    fn the_big_stack_is_big_and_lets_panics_through() {
        fn depth(n: u32) -> u32 {
            let filler = std::hint::black_box([n; 1024]);
            if n == 0 { filler[0] } else { 1 + depth(n - 1) }
        }
        assert_eq!(on_big_stack(|| depth(20_000)), 20_000);
        assert!(catch::<()>("template", || on_big_stack(|| panic!("inside"))).is_err());
    }
}
