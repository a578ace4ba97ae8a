//! Matrix products by cuBLAS, in its own fixed work space, so that memory is known beforehand and results repeat.

use super::driver;
use crate::{
    Dense,
    gpu::machine::{Failure, Gemm, PRODUCTS, Side},
};
use candle_core::Result;
use cudarc::{
    cublas::{
        result::{self as cu, CublasError},
        sys,
    },
    driver::{result as memory, sys as driver_sys},
};
use std::ffi::{c_int, c_longlong, c_void};

/// A handle bound to one stream.
pub struct Blas {
    handle: sys::cublasHandle_t,
    workspace: u64,
}

fn check<T>(answer: std::result::Result<T, CublasError>, what: &str) -> Result<T> {
    answer.map_err(|e| Failure::Driver(format!("cuBLAS: {what}: {:?}", e.0)).into())
}

/// Fails unless cuBLAS is there.
pub fn present() -> Result<()> {
    // SAFETY: loads a library, whose initialisers run.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(Failure::Missing(
        "cuBLAS was not found (libcublas.so, .so.13 or .so.12)".into(),
        "install CUDA's libraries, or pip install nvidia-cublas and add its lib folder to LD_LIBRARY_PATH"
            .into(),
    )
    .into())
}

impl Blas {
    /// Creates a handle that queues on `stream`.
    pub fn new(stream: driver_sys::CUstream) -> Result<Self> {
        let handle = check(cu::create_handle(), "creating a handle")?;
        // SAFETY: memory without content, given back by `close`.
        let workspace = driver::check(unsafe { memory::malloc_sync(PRODUCTS) }, "allocating the work space")?;
        // SAFETY: handle, stream and memory of this context. The stream first: it would reset the work space.
        unsafe {
            check(cu::set_stream(handle, stream.cast()), "setting the stream")?;
            let set = sys::cublasSetWorkspace_v2(handle, workspace as *mut c_void, PRODUCTS);
            check(set.result(), "setting the work space")?;
            // Partial sums of a 16-bit result stay in f32 too.
            let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            check(sys::cublasSetMathMode(handle, mode).result(), "setting the sums' precision")?;
        }
        Ok(Self { handle, workspace })
    }

    /// Returns cuBLAS' version.
    pub fn version(&self) -> Result<String> {
        let mut version = 0;
        // SAFETY: writes the integer.
        let asked = unsafe { sys::cublasGetVersion_v2(self.handle, &mut version) };
        check(asked.result(), "asking for the version")?;
        Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
    }

    /// Queues products. cuBLAS takes matrices column by column, which are our rows: Cᵀ = Bᵀ · Aᵀ.
    pub fn gemm(&self, g: &Gemm) -> Result<()> {
        let (alpha, beta) = (g.alpha, g.beta);
        let operation = |side: &Side| match side.transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let narrow = |n: usize| c_int::try_from(n).map_err(candle_core::Error::wrap);
        let step = |side: &Side| side.batch as c_longlong;
        // Sums in f32, and of f32 factors without TF32.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: sides that the caller has checked, in memory of this context; the factors are read before the call returns.
        let done = unsafe {
            cu::gemm_strided_batched_ex(
                self.handle,
                operation(&g.b),
                operation(&g.a),
                narrow(g.n)?,
                narrow(g.m)?,
                narrow(g.k)?,
                std::ptr::from_ref(&alpha).cast(),
                g.b.address as *const c_void,
                kind(g.factors),
                narrow(g.b.stride)?,
                step(&g.b),
                g.a.address as *const c_void,
                kind(g.factors),
                narrow(g.a.stride)?,
                step(&g.a),
                std::ptr::from_ref(&beta).cast(),
                g.c.address as *mut c_void,
                kind(g.result),
                narrow(g.c.stride)?,
                step(&g.c),
                narrow(g.batch)?,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        check(done, &format!("product of {} × {} × {}", g.m, g.k, g.n))
    }

    /// Gives everything back. Nothing is queued any more.
    pub fn close(&mut self) {
        // SAFETY: created by `new`; not used afterwards.
        unsafe {
            let _ = cu::destroy_handle(self.handle);
            let _ = memory::free_sync(self.workspace);
        }
    }
}

fn kind(element: Dense) -> sys::cudaDataType {
    match element {
        Dense::F32 => sys::cudaDataType::CUDA_R_32F,
        Dense::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Dense::F16 => sys::cudaDataType::CUDA_R_16F,
    }
}
