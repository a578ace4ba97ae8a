//! Small copies to the device: through page-locked memory, so that the host need not wait for them.

use super::driver::{Event, check};
use candle_core::Result;
use cudarc::driver::{result as cu, sys};
use std::ffi::c_void;

/// Size of each of the two halves.
const HALF: usize = 4 << 20;

/// Two halves that fill in turn. One is written again when the copies from it are done.
pub struct Ring {
    memory: *mut u8,
    at: usize,
    half: usize,
    left: [Option<Event>; 2],
}

impl Ring {
    pub fn new() -> Result<Self> {
        // SAFETY: given back by `close`.
        let memory = check(unsafe { cu::malloc_host(2 * HALF, 0) }, "allocating page-locked memory")?;
        Ok(Self { memory: memory.cast(), at: 0, half: 0, left: [None, None] })
    }

    /// Queues a copy; `from` is free when this returns.
    pub fn upload(&mut self, to: u64, from: &[u8], stream: sys::CUstream) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            if self.at == HALF {
                self.left[self.half] = Some(Event::record(stream)?);
                self.half = 1 - self.half;
                self.at = 0;
                if let Some(event) = self.left[self.half].take() {
                    event.wait()?;
                }
            }
            let n = (HALF - self.at).min(from.len() - done);
            // SAFETY: inside the half that is being filled; what was copied from this place before is done.
            let place =
                unsafe { std::slice::from_raw_parts_mut(self.memory.add(self.half * HALF + self.at), n) };
            place.copy_from_slice(&from[done..][..n]);
            // SAFETY: memory of the device that the caller owns; the place is not written before the copy is done.
            let copied = unsafe { cu::memcpy_htod_async(to + done as u64, place, stream) };
            check(copied, "copying to the device")?;
            (self.at, done) = (self.at + n, done + n);
        }
        Ok(())
    }

    /// Gives the memory back. Nothing is queued any more.
    pub fn close(&mut self) {
        self.left = [None, None];
        // SAFETY: allocated by `new`; not used afterwards.
        let _ = unsafe { cu::free_host(self.memory.cast::<c_void>()) };
    }
}
