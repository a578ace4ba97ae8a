//! What launches kernels, and the guarded memory that it works on.

use candle_core::{Result, bail};
use kto_kernels::gpu::{Grid, Params};

/// One launch of a kernel.
pub struct Call<'a> {
    /// The kernel's name with its type.
    pub kernel: &'a str,
    /// Blocks and threads.
    pub grid: Grid,
    /// For every argument the number of its buffer.
    pub places: Vec<usize>,
    /// The last argument.
    pub params: &'a [u8],
}

/// Something that launches kernels: the emulator, or a device.
pub trait Machine {
    /// Runs a kernel on the buffers' contents.
    /// A device copies [`Buffer::whole`] there and back and passes pointers [`Buffer::OFFSET`] bytes into it.
    fn run(&self, call: &Call, buffers: &mut [Buffer]) -> Result<()>;
}

/// Bytes with guards on both sides, aligned to 16 bytes. The guards are all ones: NaN in every float type, far away as an index.
#[derive(Clone)]
pub struct Buffer {
    memory: Vec<u128>,
    bytes: usize,
}

/// Words of a guard.
const GUARD: usize = 4;

impl Buffer {
    /// Bytes from the beginning of the memory to the content.
    pub const OFFSET: usize = 16 * GUARD;

    /// Wraps a content.
    pub fn new(content: &[u8]) -> Self {
        let mut new = Self::poisoned(content.len());
        new.whole_mut()[Self::OFFSET..][..content.len()].copy_from_slice(content);
        new
    }

    /// Returns a buffer whose content is like its guards.
    pub fn poisoned(bytes: usize) -> Self {
        Self { memory: vec![u128::MAX; bytes.div_ceil(16) + 2 * GUARD], bytes }
    }

    /// Returns the content.
    pub fn content(&self) -> &[u8] {
        &self.whole()[Self::OFFSET..][..self.bytes]
    }

    /// Returns the content with its guards.
    pub fn whole(&self) -> &[u8] {
        // SAFETY: any byte of an integer may be read; length and lifetime are the vector's.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), 16 * self.memory.len()) }
    }

    /// Returns the content with its guards.
    pub fn whole_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and any bytes make integers.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), 16 * self.memory.len()) }
    }

    fn is_guarded(&self) -> bool {
        let (before, after) = (&self.whole()[..Self::OFFSET], &self.whole()[Self::OFFSET + self.bytes..]);
        before.iter().chain(after).all(|b| *b == 0xff)
    }
}

/// A buffer as a kernel uses it.
pub enum Arg<'a> {
    /// Only read.
    In(&'a Buffer),
    /// Written, or read and written.
    Out(&'a mut Buffer),
    /// The same memory as this earlier argument.
    Again(usize),
}

/// Runs a kernel and proves that it changed its results alone.
pub fn launch(
    m: &dyn Machine,
    kernel: &str,
    grid: Grid,
    args: &mut [Arg],
    params: &impl Params,
) -> Result<()> {
    let (mut buffers, mut places) = (Vec::with_capacity(args.len()), Vec::with_capacity(args.len()));
    for arg in &*args {
        places.push(match arg {
            Arg::Again(earlier) => places[*earlier],
            _ => buffers.len(),
        });
        match arg {
            Arg::In(buffer) => buffers.push((*buffer).clone()),
            Arg::Out(buffer) => buffers.push((**buffer).clone()),
            Arg::Again(_) => {}
        }
    }
    let call = Call { kernel, grid, places, params: params.bytes() };
    m.run(&call, &mut buffers)?;
    for ((i, arg), place) in args.iter_mut().enumerate().zip(call.places) {
        let after = &buffers[place];
        if !after.is_guarded() {
            bail!("{kernel}: wrote outside of argument {i} ({grid:?})");
        }
        match arg {
            Arg::In(before) if before.content() != after.content() => {
                bail!("{kernel}: changed argument {i}, which it only reads");
            }
            Arg::Out(buffer) => buffer.clone_from(after),
            Arg::In(_) | Arg::Again(_) => {}
        }
    }
    Ok(())
}
