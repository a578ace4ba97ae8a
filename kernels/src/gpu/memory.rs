//! Device memory under a limit: every byte that the engine takes is counted here.
//!
//! Lasting buffers are taken and given back as they are asked for. Short-lived ones are kept when they are dropped and used again:
//! all of them are used on one stream, so the next use comes after the last. What is kept goes first when memory is short.

use super::machine::{Failure, Machine, Mark, Stream};
use super::{Grid, Params};
use crate::Dense;
use candle_core::Result;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device and the memory taken of it.
#[derive(Debug)]
pub struct Gpu {
    machine: Arc<dyn Machine>,
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    used: usize,
    peak: usize,
    /// Short-lived buffers that are free: (bytes, address).
    spare: Vec<(usize, u64)>,
}

/// Sizes are rounded up to this: what drivers align to.
const GRAIN: usize = 256;

impl Gpu {
    /// Returns a device of which at most `limit` bytes will be taken; what the machine holds itself is counted.
    pub fn new(machine: Arc<dyn Machine>, limit: usize) -> Arc<Self> {
        let used = machine.held();
        Arc::new(Self { machine, limit, state: Mutex::new(State { used, peak: used, spare: Vec::new() }) })
    }

    /// Returns the device itself.
    pub fn machine(&self) -> &dyn Machine {
        &*self.machine
    }

    /// Returns the bytes taken now, and the most taken at any time.
    pub fn used(&self) -> (usize, usize) {
        let state = self.state();
        (state.used, state.peak)
    }

    /// Takes memory with arbitrary content. Error: [`Failure::OutOfMemory`].
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Memory> {
        self.memory(bytes, false)
    }

    /// Takes memory for a short time: it is kept for the next that asks.
    pub fn borrow(self: &Arc<Self>, bytes: usize) -> Result<Memory> {
        self.memory(bytes, true)
    }

    fn memory(self: &Arc<Self>, bytes: usize, short: bool) -> Result<Memory> {
        let bytes = bytes.next_multiple_of(GRAIN);
        if bytes == 0 {
            return Ok(Memory { gpu: self.clone(), address: 0, bytes, short });
        }
        let mut state = self.state();
        if short {
            // The smallest that is large enough, but not one that is far too large.
            let fits = |(_, (b, _)): &(usize, &(usize, u64))| *b >= bytes && *b / 2 <= bytes;
            let best =
                state.spare.iter().enumerate().filter(fits).min_by_key(|(_, (b, _))| *b).map(|(i, _)| i);
            if let Some(best) = best {
                let (bytes, address) = state.spare.swap_remove(best);
                return Ok(Memory { gpu: self.clone(), address, bytes, short });
            }
        }
        if state.used + bytes > self.limit {
            self.give_back_spare(&mut state);
        }
        if state.used + bytes > self.limit {
            return Err(Failure::OutOfMemory { needed: bytes, used: state.used, limit: self.limit }.into());
        }
        let address = match self.machine.allocate(bytes) {
            Ok(address) => address,
            // Others use the device too.
            Err(_) if !state.spare.is_empty() => {
                self.give_back_spare(&mut state);
                self.machine.allocate(bytes)?
            }
            Err(e) => return Err(e),
        };
        state.used += bytes;
        state.peak = state.peak.max(state.used);
        Ok(Memory { gpu: self.clone(), address, bytes, short })
    }

    fn give_back_spare(&self, state: &mut State) {
        for (bytes, address) in state.spare.drain(..) {
            self.machine.free(address);
            state.used -= bytes;
        }
    }

    /// Returns page-locked host memory, cleared.
    pub fn pin(self: &Arc<Self>, bytes: usize) -> Result<Pinned> {
        let address = if bytes == 0 { 0 } else { self.machine.pin(bytes)? };
        Ok(Pinned { gpu: self.clone(), address, bytes })
    }

    /// Lets what follows on `later` wait for all that is queued on `earlier`.
    pub fn order(&self, earlier: Stream, later: Stream) -> Result<Mark> {
        let mark = self.machine.mark(earlier)?;
        self.machine.follow(later, &mark)?;
        Ok(mark)
    }

    /// Queues the kernel `name` for elements of a type.
    pub(crate) fn launch(
        &self,
        name: &str,
        element: Dense,
        grid: Grid,
        pointers: &[u64],
        params: &impl Params,
    ) -> Result<()> {
        self.machine.launch(name, element, grid, pointers, params.bytes())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.give_back_spare(&mut self.state());
    }
}

/// Memory of a device, given back when it is dropped.
#[derive(Debug)]
pub struct Memory {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
    short: bool,
}

impl Memory {
    /// Returns its device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Returns where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let mut state = self.gpu.state();
        if self.short {
            state.spare.push((self.bytes, self.address));
        } else {
            state.used -= self.bytes;
            drop(state);
            self.gpu.machine.free(self.address);
        }
    }
}

/// Page-locked host memory.
#[derive(Debug)]
pub struct Pinned {
    gpu: Arc<Gpu>,
    address: usize,
    bytes: usize,
}

impl Pinned {
    /// Lets `fill` write the memory. The caller has waited for the copies that read it.
    pub fn write(&mut self, fill: impl FnOnce(&mut [u8])) {
        if self.bytes > 0 {
            // SAFETY: memory of this size that this value owns; `&mut self` excludes other references.
            fill(unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) });
        }
    }

    /// Queues a copy of device memory to its place `offset` on [`Stream::Copy`].
    pub fn download(&self, offset: usize, from: u64, bytes: usize) -> Result<()> {
        debug_assert!(offset + bytes <= self.bytes);
        if bytes == 0 { Ok(()) } else { self.gpu.machine.download_pinned(from, self.address + offset, bytes) }
    }

    /// Queues a copy from its place `offset` to the device on [`Stream::Copy`].
    pub fn upload(&self, offset: usize, to: u64, bytes: usize) -> Result<()> {
        debug_assert!(offset + bytes <= self.bytes);
        if bytes == 0 { Ok(()) } else { self.gpu.machine.upload_pinned(to, self.address + offset, bytes) }
    }

    /// Returns the memory. The caller has waited for the copies that write it.
    pub fn read(&self) -> &[u8] {
        match self.bytes {
            0 => &[],
            // SAFETY: memory of this size that this value owns.
            bytes => unsafe { std::slice::from_raw_parts(self.address as *const u8, bytes) },
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.gpu.machine.unpin(self.address);
        }
    }
}
