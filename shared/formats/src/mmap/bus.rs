//! SIGBUS in a mapped file: somebody cut the file, or its disk failed, while it was in use.
//!
//! Called by [`super::Map`], which enters every mapped range here with the line that tells of its loss. The handler
//! only reads atomics, writes that line and ends the process with 74: all that a signal handler may do. What a tool
//! has not made final by then leaves temporary names, which the next start sweeps away.
#![allow(unsafe_code)]

use std::{
    collections::HashSet,
    path::Path,
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering},
    },
};

/// `kto_cli::Kind::Io` as a number that a signal handler can use.
const IO_ERROR: i32 = 74;

/// What is written when no map of ours was touched.
const UNKNOWN: &[u8] =
    b"kto: bus error: a file that is mapped into memory was cut, or its disk failed, while it was in use\n";

/// Maps that are entered at a time; of more than that the file is not named.
const SLOTS: usize = 512;

/// A mapped range and its line. `start` is 0 in a slot that is free.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    line: AtomicPtr<u8>,
    length: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        line: AtomicPtr::new(std::ptr::null_mut()),
        length: AtomicUsize::new(0),
    }
}; SLOTS];

/// The lines, one for each path: a handler may read them at any time, so they are never freed.
static LINES: Mutex<Option<HashSet<&'static [u8]>>> = Mutex::new(None);

/// The entry of a map; taken back when dropped, which must be before the range is unmapped.
pub(super) struct Entry(Option<&'static Slot>);

impl Entry {
    /// Enters the range of a map of `path`, and takes over SIGBUS the first time.
    pub(super) fn new(path: &Path, range: &[u8]) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let (start, end) = (range.as_ptr() as usize, range.as_ptr() as usize + range.len());
        if range.is_empty() {
            return Self(None);
        }
        let line = line(path);
        let free =
            |slot: &&Slot| slot.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let slot = TABLE.iter().find(free);
        if let Some(slot) = slot {
            slot.line.store(line.as_ptr().cast_mut(), Ordering::Relaxed);
            slot.length.store(line.len(), Ordering::Relaxed);
            // Last: until then the range of the slot is empty.
            slot.end.store(end, Ordering::Release);
        }
        Self(slot)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.end.store(0, Ordering::Release);
            slot.start.store(0, Ordering::Release);
        }
    }
}

/// Returns the line for `path`, the same one for the same path.
fn line(path: &Path) -> &'static [u8] {
    let (tool, shown) = (kto_cli::tool::name(), super::shown(path));
    let text = format!("{tool}: {shown}: the file was cut, or its disk failed, while it was in use\n");
    let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    let lines = lines.get_or_insert_default();
    match lines.get(text.as_bytes()) {
        Some(line) => line,
        None => {
            let line: &'static [u8] = Box::leak(text.into_bytes().into_boxed_slice());
            lines.insert(line);
            line
        }
    }
}

/// Returns the line of the map that holds `address`.
fn line_at(address: usize) -> &'static [u8] {
    for slot in &TABLE {
        let end = slot.end.load(Ordering::Acquire);
        // The last page of a map is longer than the file, so an address may lie behind the range.
        if (slot.start.load(Ordering::Acquire)..end.next_multiple_of(4096)).contains(&address) && end > 0 {
            let (line, length) = (slot.line.load(Ordering::Relaxed), slot.length.load(Ordering::Relaxed));
            // SAFETY: a slot whose end is set has a line of `length` bytes from `LINES`, which are never freed.
            return unsafe { std::slice::from_raw_parts(line, length) };
        }
    }
    UNKNOWN
}

fn install() {
    // SAFETY: `action` is zeroed and then filled as sigaction(2) asks; `handle` has the signature that SA_SIGINFO needs
    // and does only what a signal handler may. A failure leaves the system's default.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

extern "C" fn handle(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    // SAFETY: the kernel passes a valid siginfo_t to a handler with SA_SIGINFO; a null is answered too. write, pause and _exit
    // are async-signal-safe.
    unsafe {
        // Threads that meet the hole together: the first one tells and ends the process.
        while TOLD.swap(true, Ordering::Relaxed) {
            libc::pause();
        }
        let address = if info.is_null() { 0 } else { (*info).si_addr() as usize };
        let line = line_at(address);
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::_exit(IO_ERROR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_leads_to_its_file_while_it_is_mapped() {
        let bytes = vec![1u8; 10_000];
        let at = bytes.as_ptr() as usize;
        let entry = Entry::new(Path::new("a\nb.safetensors"), &bytes);
        for address in [at, at + 9_999] {
            let line = String::from_utf8(line_at(address).to_vec()).unwrap();
            assert!(line.contains("a\\nb.safetensors: the file was cut") && line.ends_with('\n'), "{line}");
            assert_eq!(line.lines().count(), 1);
        }
        drop(entry);
        assert_eq!(line_at(at), UNKNOWN);
    }

    #[test]
    fn paths_are_kept_once() {
        let (a, b) = (line(Path::new("x")), line(Path::new("x")));
        assert!(std::ptr::eq(a, b));
    }

    #[test]
    fn the_code_is_that_of_an_io_error() {
        assert_eq!(IO_ERROR, i32::from(kto_cli::Kind::Io.code()));
    }
}
