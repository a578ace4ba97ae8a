//! What a GPU does for the engine: memory, copies, launches and matrix products.
//!
//! Implemented by `cuda` for NVIDIA GPUs and by `kto-kernel-checks` for the emulator. Work is queued on two streams and goes on
//! while the host does something else; what one stream writes and the other reads is ordered by [`Mark`]s alone.
//! Invariant: addresses come from [`Machine::allocate`] and are valid until [`Machine::free`].

use super::Grid;
use crate::Dense;
use candle_core::{Error, Result};
use std::any::Any;

/// A queue of work. Work of one queue is done in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Kernels, products and small copies.
    Compute,
    /// Copies of weights and activations beside the computation.
    Copy,
}

/// A point in a stream.
pub type Mark = Box<dyn Any + Send>;

/// What a device is.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// As its vendor names it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Memory in bytes: all of it, and what is free now.
    pub memory: (u64, u64),
    /// Version of the driver and of the library for products, for people.
    pub versions: String,
}

/// One side of a matrix product: a row-major matrix, or many at equal distances.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// Of the first element.
    pub address: u64,
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Whether the product reads the stored matrix transposed.
    pub transposed: bool,
    /// Elements from one matrix of the batch to the next; 0 uses one matrix for all.
    pub batch: usize,
}

/// `C = alpha · A · B + beta · C` for a batch of matrices. Sums are in f32. Shapes: A (m, k), B (k, n), C (m, n).
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// First factor.
    pub a: Side,
    /// Second factor.
    pub b: Side,
    /// Result; never transposed.
    pub c: Side,
    /// Element type of A and B.
    pub factors: Dense,
    /// Element type of C: that of the factors, or f32.
    pub result: Dense,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what C held; with 0 it is not read.
    pub beta: f32,
    /// Number of matrices.
    pub batch: usize,
}

/// Bytes of the device that cuBLAS works in: what NVIDIA recommends for its largest cards.
pub const PRODUCTS: usize = 32 << 20;

/// A GPU, or what stands for one.
pub trait Machine: Send + Sync + std::fmt::Debug {
    /// Returns the bytes of the device that it holds itself, for as long as it lives.
    fn held(&self) -> usize {
        0
    }
    /// Returns what the device is.
    fn info(&self) -> Result<DeviceInfo>;
    /// Returns the address of new memory, aligned to 256 bytes. Its content is arbitrary.
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// Gives memory back, after all work queued so far.
    fn free(&self, address: u64);
    /// Returns the address of page-locked host memory, aligned to 256 bytes and cleared.
    fn pin(&self, bytes: usize) -> Result<usize>;
    /// Gives page-locked memory back, after all work queued so far.
    fn unpin(&self, address: usize);
    /// Queues a copy to the device on [`Stream::Compute`]; `from` is free when this returns.
    fn upload(&self, to: u64, from: &[u8]) -> Result<()>;
    /// Copies to the host after all work queued on [`Stream::Compute`].
    fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Queues a copy from page-locked memory on [`Stream::Copy`].
    fn upload_pinned(&self, to: u64, from: usize, bytes: usize) -> Result<()>;
    /// Queues a copy to page-locked memory on [`Stream::Copy`].
    fn download_pinned(&self, from: u64, to: usize, bytes: usize) -> Result<()>;
    /// Queues zeros on [`Stream::Compute`].
    fn clear(&self, at: u64, bytes: usize) -> Result<()>;
    /// Queues a copy within the device on [`Stream::Compute`].
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;
    /// Queues a kernel on [`Stream::Compute`]. `pointers` are its buffers in order, `params` its last argument.
    fn launch(&self, kernel: &str, element: Dense, grid: Grid, pointers: &[u64], params: &[u8])
    -> Result<()>;
    /// Queues matrix products on [`Stream::Compute`].
    fn gemm(&self, gemm: &Gemm) -> Result<()>;
    /// Returns the point that a stream's queue ends at now.
    fn mark(&self, stream: Stream) -> Result<Mark>;
    /// Lets everything queued on `stream` from now on wait for `mark`.
    fn follow(&self, stream: Stream, mark: &Mark) -> Result<()>;
    /// Waits until the work before `mark` is done.
    fn wait(&self, mark: &Mark) -> Result<()>;
}

/// Why a device does not do what it is asked for.
#[derive(Clone, Debug)]
pub enum Failure {
    /// Memory beyond the limit, or beyond what there is. In bytes: asked for, in use, the limit.
    OutOfMemory {
        /// Asked for.
        needed: usize,
        /// In use before.
        used: usize,
        /// Most that may be used.
        limit: usize,
    },
    /// What the driver or a library says.
    Driver(String),
    /// No driver, library or device that fits; the second text says what to do.
    Missing(String, String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: &usize| bytes.div_ceil(1 << 20);
        match self {
            Self::OutOfMemory { needed, used, limit } => write!(
                f,
                "device memory: {} MiB more than the {} MiB in use are over the limit of {} MiB",
                mib(needed),
                mib(used),
                mib(limit)
            ),
            Self::Driver(text) => write!(f, "device: {text}"),
            Self::Missing(text, _) => write!(f, "{text}"),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Cuda(Box::new(failure))
    }
}
