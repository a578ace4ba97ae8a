//! The inputs of the blocks that a way back will want: all on the device, or, of a sweep on a GPU, in page-locked host memory.
//!
//! Away from the device two buffers take turns. What one of them holds is copied to the host while the next block computes, and
//! comes back before its block is wanted. Every copy follows a mark, so no buffer is overwritten while it is in use.

use crate::{buffers::Buffer, numeric::Numeric};
use kto_cli::{Error, Result};
use kto_kernels::{
    device::{Device, Tensor},
    gpu::{Gpu, Mark, Pinned, Stream},
};
use std::{
    cell::{Cell, RefCell},
    sync::Arc,
};

/// Rows by block from the lowest adapted one up.
pub(crate) enum Inputs {
    Here(Vec<Buffer>),
    Away(Box<Away>),
}

/// Inputs in the host's memory.
pub(crate) struct Away {
    gpu: Arc<Gpu>,
    count: usize,
    width: usize,
    row_bytes: usize,
    buffers: [Buffer; 2],
    /// Rows that there is room for, and those of the sweep.
    rows: Cell<usize>,
    used: Cell<usize>,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    host: Option<Pinned>,
    /// The block whose input each buffer holds, and the end of the copy that last read or wrote it.
    holds: [Option<usize>; 2],
    copied: [Option<Mark>; 2],
}

impl Inputs {
    pub fn new(count: usize, width: usize, device: &Device, away: bool) -> Self {
        match device {
            Device::Gpu(gpu, element) if away => Self::Away(Box::new(Away {
                gpu: gpu.clone(),
                count,
                width,
                row_bytes: width * element.size(),
                buffers: [Buffer::new(width, device), Buffer::new(width, device)],
                rows: Cell::new(0),
                used: Cell::new(0),
                state: RefCell::default(),
            })),
            _ => Self::Here((0..count).map(|_| Buffer::new(width, device)).collect()),
        }
    }

    /// Returns the number of blocks.
    pub fn count(&self) -> usize {
        match self {
            Self::Here(all) => all.len(),
            Self::Away(away) => away.count,
        }
    }

    /// Makes room for `rows` rows, of all blocks if they will be kept.
    pub fn reserve(&self, rows: usize, keep: bool) -> Result<()> {
        match self {
            Self::Here(all) => {
                let wanted = if keep { &all[..] } else { &all[..1] };
                wanted.iter().try_for_each(|b| b.reserve(rows))
            }
            Self::Away(away) => away.reserve(rows, keep),
        }
    }

    /// Returns rows of the input of block `index`.
    pub fn rows(&self, index: usize, start: usize, count: usize) -> Result<Tensor> {
        match self {
            Self::Here(all) => all[index].rows(start, count),
            Self::Away(away) => away.buffers[index % 2].rows(start, count),
        }
    }

    /// Says that the input of block `index` will be written now.
    pub fn begin(&self, index: usize) -> Result<()> {
        match self {
            Self::Here(_) => Ok(()),
            Self::Away(away) => away.begin(index),
        }
    }

    /// Says that all of the input of block `index` has been written.
    pub fn keep(&self, index: usize) -> Result<()> {
        match self {
            Self::Here(_) => Ok(()),
            Self::Away(away) => away.keep(index),
        }
    }

    /// Brings the input of block `index`, and begins to bring the one below.
    pub fn fetch(&self, index: usize) -> Result<()> {
        match self {
            Self::Here(_) => Ok(()),
            Self::Away(away) => {
                away.bring(index)?;
                let state = away.state.borrow();
                if let Some(copied) = &state.copied[index % 2] {
                    away.gpu.machine().follow(Stream::Compute, copied).numeric()?;
                }
                drop(state);
                index.checked_sub(1).map_or(Ok(()), |below| away.bring(below))
            }
        }
    }
}

impl Away {
    fn reserve(&self, rows: usize, keep: bool) -> Result<()> {
        self.buffers.iter().try_for_each(|b| b.reserve(rows))?;
        if !keep {
            return Ok(());
        }
        self.used.set(rows);
        if rows <= self.rows.get() {
            return Ok(());
        }
        let mut state = self.state.borrow_mut();
        state.host = None;
        state.host = Some(self.gpu.pin(self.count * rows * self.row_bytes).numeric()?);
        self.rows.set(rows);
        Ok(())
    }

    fn begin(&self, index: usize) -> Result<()> {
        let mut state = self.state.borrow_mut();
        state.holds[index % 2] = Some(index);
        match &state.copied[index % 2] {
            Some(copied) => self.gpu.machine().follow(Stream::Compute, copied).numeric(),
            None => Ok(()),
        }
    }

    /// Returns the place of a block's input in the host's memory, and its size.
    fn place(&self, index: usize) -> (usize, usize) {
        (index * self.rows.get() * self.row_bytes, self.used.get() * self.row_bytes)
    }

    fn keep(&self, index: usize) -> Result<()> {
        let mut state = self.state.borrow_mut();
        let from = self.address(index)?;
        self.gpu.order(Stream::Compute, Stream::Copy).numeric()?;
        let host = state.host.as_ref().ok_or_else(unreserved)?;
        let (place, bytes) = self.place(index);
        host.download(place, from, bytes).numeric()?;
        state.copied[index % 2] = Some(self.gpu.machine().mark(Stream::Copy).numeric()?);
        Ok(())
    }

    /// Begins to bring an input that its buffer does not hold.
    fn bring(&self, index: usize) -> Result<()> {
        let mut state = self.state.borrow_mut();
        if state.holds[index % 2] == Some(index) {
            return Ok(());
        }
        // What the buffer holds may still be in use.
        self.gpu.order(Stream::Compute, Stream::Copy).numeric()?;
        let host = state.host.as_ref().ok_or_else(unreserved)?;
        let (place, bytes) = self.place(index);
        host.upload(place, self.address(index)?, bytes).numeric()?;
        state.copied[index % 2] = Some(self.gpu.machine().mark(Stream::Copy).numeric()?);
        state.holds[index % 2] = Some(index);
        Ok(())
    }

    /// Returns the address of a block's buffer.
    fn address(&self, index: usize) -> Result<u64> {
        match self.buffers[index % 2].rows(0, self.used.get())? {
            Tensor::Gpu(matrix) => Ok(matrix.address()),
            Tensor::Host(_) => {
                Err(Error::internal(format!("inputs of {} columns are on the host", self.width)))
            }
        }
    }
}

fn unreserved() -> Error {
    Error::internal("inputs are kept before their reservation")
}
