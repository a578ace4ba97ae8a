//! A GPU that is none: the engine's whole GPU form runs on the CPU, kernels by the emulator and products by plain loops.
//!
//! Its two streams are real queues. One of them is lazy: its work is done as late as the marks allow, while the other's is done at
//! once. A mark that is missing thus shows in the results. Memory is poisoned when it is taken, and its bounds are checked by every
//! copy.

use crate::emulator::emulate;
use candle_core::{Result, bail};
use half::{bf16, f16};
use kto_kernels::{
    Dense,
    gpu::{DeviceInfo, Failure, Gemm, Grid, Machine, Mark, Side, Stream, type_name},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The emulated device.
pub struct EmulatedGpu {
    lazy: Stream,
    memory: usize,
    state: Mutex<State>,
}

impl std::fmt::Debug for EmulatedGpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EmulatedGpu({:?} is lazy)", self.lazy)
    }
}

#[derive(Default)]
struct State {
    /// By address.
    device: BTreeMap<u64, Vec<u128>>,
    host: BTreeMap<usize, Vec<u128>>,
    used: usize,
    /// What the lazy stream has to do, and the number of what it did.
    queue: VecDeque<Work>,
    done: u64,
    launches: u64,
}

/// Work of the lazy stream.
enum Work {
    Launch {
        kernel: String,
        grid: Grid,
        pointers: Vec<u64>,
        params: Vec<u8>,
    },
    Gemm(Gemm),
    /// Bytes that the host has given.
    Write {
        to: u64,
        bytes: Vec<u8>,
    },
    Clear {
        at: u64,
        bytes: usize,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
    Free(u64),
    Unpin(usize),
}

/// A point in one of the streams: its number in the lazy one, nothing in the other, whose work is done.
struct Point(Option<u64>);

impl EmulatedGpu {
    /// Returns a device with so much memory, one of whose streams is lazy.
    pub fn new(memory: usize, lazy: Stream) -> Self {
        Self { lazy, memory, state: Mutex::default() }
    }

    /// Returns how many kernels were launched.
    pub fn launches(&self) -> u64 {
        self.state().launches
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self, stream: Stream, work: Work) -> Result<()> {
        let mut state = self.state();
        if stream == self.lazy {
            state.queue.push_back(work);
            return Ok(());
        }
        state.run(work)
    }

    fn catch_up(&self, state: &mut State, mark: &Mark) -> Result<()> {
        let Some(Point(point)) = mark.downcast_ref() else { bail!("a mark of another device") };
        while point.is_some_and(|p| state.done < p) {
            let Some(work) = state.queue.pop_front() else { break };
            state.done += 1;
            state.run(work)?;
        }
        Ok(())
    }
}

impl State {
    fn run(&mut self, work: Work) -> Result<()> {
        match work {
            Work::Launch { kernel, grid, pointers, params } => {
                self.launches += 1;
                emulate(&kernel, grid, &pointers, &params)
            }
            Work::Gemm(gemm) => {
                product(&gemm);
                Ok(())
            }
            Work::Write { to, bytes } => self.copy(bytes.as_ptr() as u64, to, bytes.len(), false, true),
            Work::Clear { at, bytes } => {
                self.inside(at, bytes)?;
                // SAFETY: inside memory of this device.
                unsafe { std::slice::from_raw_parts_mut(at as *mut u8, bytes) }.fill(0);
                Ok(())
            }
            Work::Copy { from, to, bytes } => {
                let (a, b) = (self.inside(from, bytes).is_ok(), self.inside(to, bytes).is_ok());
                self.copy(from, to, bytes, a, b)
            }
            Work::Free(address) => {
                let Some(memory) = self.device.remove(&address) else { bail!("free of {address:#x}") };
                self.used -= 16 * memory.len();
                Ok(())
            }
            Work::Unpin(address) => match self.host.remove(&address) {
                Some(_) => Ok(()),
                None => bail!("unpin of {address:#x}"),
            },
        }
    }

    /// Fails unless so many bytes from `at` on lie in one allocation of the device.
    fn inside(&self, at: u64, bytes: usize) -> Result<()> {
        match self.device.range(..=at).next_back() {
            Some((start, memory)) if at + bytes as u64 <= start + 16 * memory.len() as u64 => Ok(()),
            _ => bail!("{bytes} bytes at {at:#x} are not in the device's memory"),
        }
    }

    fn pinned(&self, at: usize, bytes: usize) -> Result<()> {
        match self.host.range(..=at).next_back() {
            Some((start, memory)) if at + bytes <= start + 16 * memory.len() => Ok(()),
            _ => bail!("{bytes} bytes at {at:#x} are not page-locked"),
        }
    }

    fn copy(&self, from: u64, to: u64, bytes: usize, from_device: bool, to_device: bool) -> Result<()> {
        if from_device {
            self.inside(from, bytes)?;
        }
        if to_device {
            self.inside(to, bytes)?;
        }
        // SAFETY: inside memory of the device or of the host, which the callers own or have checked.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }
}

/// Memory that is all ones: NaN in every float type. Aligned as devices align it.
fn poisoned(bytes: usize) -> Vec<u128> {
    vec![u128::MAX; bytes.div_ceil(16)]
}

impl Machine for EmulatedGpu {
    fn info(&self) -> Result<DeviceInfo> {
        let free = self.memory - self.state().used;
        Ok(DeviceInfo {
            name: "emulated".into(),
            capability: (8, 0),
            memory: (self.memory as u64, free as u64),
            versions: String::new(),
        })
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        if state.used + bytes > self.memory {
            return Err(Failure::OutOfMemory { needed: bytes, used: state.used, limit: self.memory }.into());
        }
        let memory = poisoned(bytes);
        let address = memory.as_ptr() as u64;
        state.used += 16 * memory.len();
        state.device.insert(address, memory);
        Ok(address)
    }

    fn free(&self, address: u64) {
        if self.queue(Stream::Compute, Work::Free(address)).is_err() {
            debug_assert!(false, "free of {address:#x}");
        }
    }

    fn pin(&self, bytes: usize) -> Result<usize> {
        let memory = vec![0u128; bytes.div_ceil(16)];
        let address = memory.as_ptr() as usize;
        self.state().host.insert(address, memory);
        Ok(address)
    }

    fn unpin(&self, address: usize) {
        if self.queue(Stream::Copy, Work::Unpin(address)).is_err() {
            debug_assert!(false, "unpin of {address:#x}");
        }
    }

    fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.state().inside(to, from.len())?;
        self.queue(Stream::Compute, Work::Write { to, bytes: from.to_vec() })
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let mark = self.mark(Stream::Compute)?;
        let mut state = self.state();
        self.catch_up(&mut state, &mark)?;
        state.copy(from, to.as_mut_ptr() as u64, to.len(), true, false)
    }

    fn upload_pinned(&self, to: u64, from: usize, bytes: usize) -> Result<()> {
        self.state().pinned(from, bytes)?;
        self.state().inside(to, bytes)?;
        self.queue(Stream::Copy, Work::Copy { from: from as u64, to, bytes })
    }

    fn download_pinned(&self, from: u64, to: usize, bytes: usize) -> Result<()> {
        self.state().pinned(to, bytes)?;
        self.state().inside(from, bytes)?;
        self.queue(Stream::Copy, Work::Copy { from, to: to as u64, bytes })
    }

    fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        self.queue(Stream::Compute, Work::Clear { at, bytes })
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.state().inside(from, bytes)?;
        self.state().inside(to, bytes)?;
        self.queue(Stream::Compute, Work::Copy { from, to, bytes })
    }

    fn launch(
        &self,
        kernel: &str,
        element: Dense,
        grid: Grid,
        pointers: &[u64],
        params: &[u8],
    ) -> Result<()> {
        let kernel = format!("{kernel}_{}", type_name(element));
        let work = Work::Launch { kernel, grid, pointers: pointers.to_vec(), params: params.to_vec() };
        self.queue(Stream::Compute, work)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        for (side, (rows, columns), element) in [
            (gemm.a, (gemm.m, gemm.k), gemm.factors),
            (gemm.b, (gemm.k, gemm.n), gemm.factors),
            (gemm.c, (gemm.m, gemm.n), gemm.result),
        ] {
            let (rows, columns) = if side.transposed { (columns, rows) } else { (rows, columns) };
            let last = (gemm.batch - 1) * side.batch + (rows - 1) * side.stride + columns;
            if side.stride < columns {
                bail!("gemm: rows of {columns} at a distance of {}", side.stride);
            }
            self.state().inside(side.address, last * element.size())?;
        }
        self.queue(Stream::Compute, Work::Gemm(*gemm))
    }

    fn mark(&self, stream: Stream) -> Result<Mark> {
        let state = self.state();
        let point = (stream == self.lazy).then_some(state.done + state.queue.len() as u64);
        Ok(Box::new(Point(point)))
    }

    fn follow(&self, stream: Stream, mark: &Mark) -> Result<()> {
        // The lazy stream comes after everything that is done at once.
        if stream == self.lazy { Ok(()) } else { self.catch_up(&mut self.state(), mark) }
    }

    fn wait(&self, mark: &Mark) -> Result<()> {
        self.catch_up(&mut self.state(), mark)
    }
}

/// An element of a matrix in emulated memory.
fn at(side: &Side, element: Dense, matrix: usize, row: usize, column: usize) -> *mut u8 {
    let (row, column) = if side.transposed { (column, row) } else { (row, column) };
    let index = matrix * side.batch + row * side.stride + column;
    (side.address as usize + index * element.size()) as *mut u8
}

fn load(element: Dense, from: *const u8) -> f32 {
    // SAFETY: inside memory that `gemm` has checked, aligned to the element.
    unsafe {
        match element {
            Dense::F32 => *from.cast::<f32>(),
            Dense::Bf16 => (*from.cast::<bf16>()).to_f32(),
            Dense::F16 => (*from.cast::<f16>()).to_f32(),
        }
    }
}

fn product(g: &Gemm) {
    for matrix in 0..g.batch {
        for i in 0..g.m {
            for j in 0..g.n {
                let term = |l| {
                    let a = load(g.factors, at(&g.a, g.factors, matrix, i, l));
                    f64::from(a) * f64::from(load(g.factors, at(&g.b, g.factors, matrix, l, j)))
                };
                let sum = (0..g.k).map(term).sum::<f64>() * f64::from(g.alpha);
                let to = at(&g.c, g.result, matrix, i, j);
                let before = if g.beta == 0.0 { 0.0 } else { f64::from(g.beta * load(g.result, to)) };
                let value = (sum + before) as f32;
                // SAFETY: as in `load`.
                unsafe {
                    match g.result {
                        Dense::F32 => *to.cast() = value,
                        Dense::Bf16 => *to.cast() = bf16::from_f32(value),
                        Dense::F16 => *to.cast() = f16::from_f32(value),
                    }
                }
            }
        }
    }
}
