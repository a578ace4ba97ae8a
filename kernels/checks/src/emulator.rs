//! Kernels on the CPU: compiled as C++ by `build.rs`, threads as fibers (`host/emulator.h`).

use crate::{Buffer, Call, Machine};
use candle_core::{Result, bail};
use kto_kernels::gpu::Grid;
use std::ffi::{CStr, CString, c_char, c_void};

unsafe extern "C" {
    /// Returns null, or what went wrong. `arguments` is how many `args` points to, `params` the size of the last one.
    fn kto_emulate(
        name: *const c_char,
        blocks: u32,
        threads: u32,
        schedule: u32,
        args: *mut *mut c_void,
        arguments: usize,
        params: usize,
    ) -> *const c_char;
}

/// Runs every launch under several schedules of its threads and blocks, whose results must be the same bits.
pub struct Emulator;

/// Ascending, descending, and two others.
const SCHEDULES: u32 = 4;

impl Machine for Emulator {
    fn run(&self, call: &Call, buffers: &mut [Buffer]) -> Result<()> {
        let (kernel, grid) = (call.kernel, call.grid);
        if grid.threads == 0 || grid.threads > Grid::MOST_THREADS {
            bail!("{kernel}: {} threads in a block", grid.threads);
        }
        let before = buffers.to_vec();
        once(call, 0, buffers)?;
        for schedule in 1..SCHEDULES {
            let mut again = before.clone();
            once(call, schedule, &mut again)?;
            if again.iter().zip(&*buffers).any(|(a, b)| a.whole() != b.whole()) {
                bail!("{kernel}: the result depends on the order of threads or blocks ({grid:?})");
            }
        }
        Ok(())
    }
}

fn once(call: &Call, schedule: u32, buffers: &mut [Buffer]) -> Result<()> {
    let pointers: Vec<u64> =
        buffers.iter_mut().map(|b| b.whole_mut()[Buffer::OFFSET..].as_mut_ptr() as u64).collect();
    let pointers: Vec<u64> = call.places.iter().map(|place| pointers[*place]).collect();
    // SAFETY: the buffers outlive the call. That kernels stay inside them is what the checks are for: guards and NaN around every
    // buffer show it.
    unsafe { scheduled(call.kernel, call.grid, schedule, &pointers, call.params) }
}

/// Runs a kernel under one schedule on memory at these addresses.
pub(crate) fn emulate(kernel: &str, grid: Grid, pointers: &[u64], params: &[u8]) -> Result<()> {
    // SAFETY: addresses in the memory of an emulated device, whose operations check what they launch with.
    unsafe { scheduled(kernel, grid, 0, pointers, params) }
}

/// # Safety
/// The kernel stays inside the memory at `pointers`.
unsafe fn scheduled(kernel: &str, grid: Grid, schedule: u32, pointers: &[u64], params: &[u8]) -> Result<()> {
    let name = CString::new(kernel).map_err(candle_core::Error::wrap)?;
    // Parameters are numbers of at most eight bytes, aligned as such.
    let mut aligned = vec![0u64; params.len().div_ceil(8)];
    for (word, bytes) in aligned.iter_mut().zip(params.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(whole);
    }
    let mut pointers = pointers.to_vec();
    let mut args: Vec<*mut c_void> = pointers.iter_mut().map(|p| std::ptr::from_mut(p).cast()).collect();
    args.push(aligned.as_mut_ptr().cast());
    // SAFETY: the callee checks the number of arguments and the size of the parameters; the rest is the caller's promise.
    let fault = unsafe {
        kto_emulate(
            name.as_ptr(),
            grid.blocks,
            grid.threads,
            schedule,
            args.as_mut_ptr(),
            args.len(),
            params.len(),
        )
    };
    if fault.is_null() {
        return Ok(());
    }
    // SAFETY: the callee returns string literals.
    let text = unsafe { CStr::from_ptr(fault) };
    bail!("{kernel}: {} ({grid:?})", text.to_string_lossy())
}
