//! NVIDIA GPUs: the driver and cuBLAS, both loaded at run time, so that a program with this in it starts without them.
//!
//! The kernels' modules are PTX for compute capability 7.5 (`build.rs`); the driver compiles one for its card when a kernel of it
//! is first used. Not run on a GPU yet: no machine at hand had one.

mod blas;
mod driver;
mod ring;

use super::{
    DeviceInfo, Failure, Gemm, Grid,
    machine::{Machine, Mark, PRODUCTS, Stream},
    type_name,
};
use crate::Dense;
use blas::Blas;
use candle_core::Result;
use cudarc::driver::{result as cu, sys};
use driver::{Event, Module, check};
use ring::Ring;
use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Oldest compute capability that the modules run on.
pub const OLDEST: (u32, u32) = (7, 5);
/// First compute capability with bf16.
pub const BF16: (u32, u32) = (8, 0);

/// Returns the PTX of all kernels for one type.
pub fn ptx(element: Dense) -> &'static str {
    match element {
        Dense::F32 => include_str!(concat!(env!("OUT_DIR"), "/f32.ptx")),
        Dense::Bf16 => include_str!(concat!(env!("OUT_DIR"), "/bf16.ptx")),
        Dense::F16 => include_str!(concat!(env!("OUT_DIR"), "/f16.ptx")),
    }
}

/// Returns the number of NVIDIA GPUs. Error: [`Failure::Missing`] names what is not there.
pub fn count() -> Result<usize> {
    driver::present()?;
    Ok(check(cu::device::get_count(), "counting devices")? as usize)
}

/// One NVIDIA GPU.
pub struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    compute: sys::CUstream,
    copy: sys::CUstream,
    blas: Blas,
    state: Mutex<State>,
}

struct State {
    modules: BTreeMap<&'static str, Module>,
    ring: Ring,
}

// SAFETY: handles of the driver may be used from any thread; the context is made current before every use.
unsafe impl Send for Cuda {}
// SAFETY: as above; what is not safe to share is behind the mutex.
unsafe impl Sync for Cuda {}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({:?})", self.device)
    }
}

impl Cuda {
    /// Opens GPU number `ordinal`. Errors: [`Failure::Missing`] for a driver, library or device that is not there or is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let there = count()?;
        if ordinal >= there {
            let text = format!("there is no CUDA device {ordinal}: {there} found");
            return Err(Failure::Missing(text, "kto-train --check-device lists them".into()).into());
        }
        let device = check(cu::device::get(ordinal as i32), "opening the device")?;
        let capability = driver::capability(device)?;
        if capability < OLDEST {
            let (major, minor) = capability;
            return Err(Failure::Missing(
                format!("CUDA device {ordinal} has compute capability {major}.{minor}, 7.5 is needed"),
                "--device cpu".into(),
            )
            .into());
        }
        blas::present()?;
        // SAFETY: the device exists; the context is released when this value is dropped.
        let context = check(unsafe { cu::primary_ctx::retain(device) }, "creating a context")?;
        // SAFETY: a context just retained.
        check(unsafe { cu::ctx::set_current(context) }, "using the context")?;
        let stream = || check(cu::stream::create(cu::stream::StreamKind::NonBlocking), "creating a stream");
        let (compute, copy) = (stream()?, stream()?);
        let blas = Blas::new(compute)?;
        let state = Mutex::new(State { modules: BTreeMap::new(), ring: Ring::new()? });
        Ok(Arc::new(Self { device, context, compute, copy, blas, state }))
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: retained as long as this value lives.
        check(unsafe { cu::ctx::set_current(self.context) }, "using the context")
    }

    fn stream(&self, stream: Stream) -> sys::CUstream {
        match stream {
            Stream::Compute => self.compute,
            Stream::Copy => self.copy,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn synchronize(&self) -> Result<()> {
        for stream in [self.compute, self.copy] {
            // SAFETY: a stream of this context.
            check(unsafe { cu::stream::synchronize(stream) }, "waiting for the device")?;
        }
        Ok(())
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        let _ = self.synchronize();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.modules.clear();
        state.ring.close();
        self.blas.close();
        // SAFETY: nothing is queued on the streams, and nothing uses them or the context afterwards.
        unsafe {
            let _ = cu::stream::destroy(self.compute);
            let _ = cu::stream::destroy(self.copy);
            let _ = cu::primary_ctx::release(self.device);
        }
    }
}

impl Machine for Cuda {
    fn held(&self) -> usize {
        PRODUCTS
    }

    fn info(&self) -> Result<DeviceInfo> {
        self.enter()?;
        let (free, all) = check(cu::mem_get_info(), "asking for free memory")?;
        Ok(DeviceInfo {
            name: check(cu::device::get_name(self.device), "asking for the device's name")?,
            capability: driver::capability(self.device)?,
            memory: (all as u64, free as u64),
            versions: format!("driver for CUDA {}, cuBLAS {}", driver::version()?, self.blas.version()?),
        })
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: memory without content; it is the caller's to free.
        match unsafe { cu::malloc_sync(bytes) } {
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, all) = check(cu::mem_get_info(), "asking for free memory")?;
                Err(Failure::OutOfMemory { needed: bytes, used: all - free, limit: all }.into())
            }
            other => check(other, "allocating memory"),
        }
    }

    fn free(&self, address: u64) {
        if self.enter().is_ok() && self.synchronize().is_ok() {
            // SAFETY: an address of `allocate`; nothing that is queued uses it.
            let _ = unsafe { cu::free_sync(address) };
        }
    }

    fn pin(&self, bytes: usize) -> Result<usize> {
        self.enter()?;
        // SAFETY: memory that is the caller's to free.
        let at = check(unsafe { cu::malloc_host(bytes, 0) }, "allocating page-locked memory")?;
        // SAFETY: so many bytes were just allocated.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(at as usize)
    }

    fn unpin(&self, address: usize) {
        if self.enter().is_ok() && self.synchronize().is_ok() {
            // SAFETY: an address of `pin`; nothing that is queued uses it.
            let _ = unsafe { cu::free_host(address as *mut c_void) };
        }
    }

    fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.enter()?;
        self.state().ring.upload(to, from, self.compute)
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: a stream of this context; then a copy that ends before the call returns, of memory that the caller owns.
        unsafe {
            check(cu::stream::synchronize(self.compute), "waiting for the device")?;
            check(cu::memcpy_dtoh_sync(to, from), "copying from the device")
        }
    }

    fn upload_pinned(&self, to: u64, from: usize, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: page-locked memory that its owner does not write or free before the copy is done.
        let from = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
        // SAFETY: as above.
        check(unsafe { cu::memcpy_htod_async(to, from, self.copy) }, "copying to the device")
    }

    fn download_pinned(&self, from: u64, to: usize, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: page-locked memory that its owner does not read or free before the copy is done.
        let to = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
        // SAFETY: as above.
        check(unsafe { cu::memcpy_dtoh_async(to, from, self.copy) }, "copying from the device")
    }

    fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: memory of this device that the caller owns.
        check(unsafe { cu::memset_d8_async(at, 0, bytes, self.compute) }, "clearing memory")
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: as above.
        check(unsafe { cu::memcpy_dtod_async(to, from, bytes, self.compute) }, "copying on the device")
    }

    fn launch(
        &self,
        kernel: &str,
        element: Dense,
        grid: Grid,
        pointers: &[u64],
        params: &[u8],
    ) -> Result<()> {
        self.enter()?;
        let mut state = self.state();
        let name = type_name(element);
        let module = match state.modules.entry(name) {
            std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::btree_map::Entry::Vacant(e) => e.insert(Module::load(ptx(element))?),
        };
        let function = module.function(&format!("{kernel}_{name}"))?;
        // Parameters are numbers of at most eight bytes; the driver copies as many bytes as the kernel takes.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        for (word, bytes) in aligned.iter_mut().zip(params.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(whole);
        }
        let mut pointers = pointers.to_vec();
        let mut arguments: Vec<*mut c_void> =
            pointers.iter_mut().map(|p| std::ptr::from_mut(p).cast()).collect();
        arguments.push(aligned.as_mut_ptr().cast());
        let (blocks, threads) = ((grid.blocks, 1, 1), (grid.threads, 1, 1));
        // SAFETY: as many arguments as the kernel has, of its sizes: the emulator compares both for the same calls. Kernels stay
        // inside their buffers for any grid, as it shows.
        let done = unsafe { cu::launch_kernel(function, blocks, threads, 0, self.compute, &mut arguments) };
        check(done, kernel)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.enter()?;
        self.blas.gemm(gemm)
    }

    fn mark(&self, stream: Stream) -> Result<Mark> {
        self.enter()?;
        Ok(Box::new(Event::record(self.stream(stream))?))
    }

    fn follow(&self, stream: Stream, mark: &Mark) -> Result<()> {
        self.enter()?;
        Event::of(mark)?.follow(self.stream(stream))
    }

    fn wait(&self, mark: &Mark) -> Result<()> {
        self.enter()?;
        Event::of(mark)?.wait()
    }
}
