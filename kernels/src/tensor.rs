//! Access to the memory of candle tensors on the CPU.

use crate::real::{Operand, Real};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use std::ops::Deref;

/// Runs `$body` with `$T` bound to the Rust type of a tensor's elements.
macro_rules! with_type {
    ($tensor:expr, $T:ident => $body:expr) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => candle_core::bail!("kernels work in f32 and f64, not {other:?}"),
        }
    };
}
pub(crate) use with_type;

/// A held read lock on a tensor's memory.
pub(crate) struct Reader<'a, G> {
    storage: G,
    layout: &'a Layout,
}

/// Locks a tensor's memory for reading.
pub(crate) fn read(tensor: &Tensor) -> Reader<'_, impl Deref<Target = Storage>> {
    let (storage, layout) = tensor.storage_and_layout();
    Reader { storage, layout }
}

impl<G: Deref<Target = Storage>> Reader<'_, G> {
    fn all<T: Real>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => T::cpu_storage_as_slice(storage),
            _ => bail!("this operation has no form for this device yet"),
        }
    }

    /// Returns the elements of a contiguous tensor.
    pub fn slice<T: Real>(&self) -> Result<&[T]> {
        let Some((start, end)) = self.layout.contiguous_offsets() else {
            bail!(
                "expected a contiguous tensor, found {:?} with strides {:?}",
                self.layout.shape(),
                self.layout.stride()
            )
        };
        Ok(&self.all::<T>()?[start..end])
    }

    /// Returns a two-dimensional tensor of any strides as a matrix operand with its (rows, columns).
    pub fn operand<T: Real>(&self) -> Result<(Operand<T>, usize, usize)> {
        let (rows, columns) = self.layout.shape().dims2()?;
        let all = self.all::<T>()?;
        let (row, column) = (self.layout.stride()[0], self.layout.stride()[1]);
        if rows > 0 && columns > 0 {
            let last = self.layout.start_offset() + (rows - 1) * row + (columns - 1) * column;
            if last >= all.len() {
                bail!("tensor layout reaches past its storage");
            }
        }
        let at = all[self.layout.start_offset().min(all.len())..].as_ptr();
        Ok((Operand { at, row: row as isize, column: column as isize }, rows, columns))
    }
}

/// Runs `f` on the elements of a contiguous tensor, in place. `f` must not read `target` through another tensor: the lock is held.
pub(crate) fn write<T: Real>(target: &Tensor, f: impl Fn(&mut [T]) -> Result<()>) -> Result<()> {
    struct Write<F, T>(F, std::marker::PhantomData<T>);
    impl<T: Real, F: Fn(&mut [T]) -> Result<()>> InplaceOp1 for Write<F, T> {
        fn name(&self) -> &'static str {
            "write"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let Some((start, end)) = layout.contiguous_offsets() else {
                bail!("in-place operations need contiguous tensors")
            };
            match T::slice_mut(storage) {
                Some(all) => self.0(&mut all[start..end]),
                None => bail!("the tensor holds another element type"),
            }
        }
    }
    target.inplace_op1(&Write(f, std::marker::PhantomData))
}

/// Fails when two tensors share memory: the lock to write one would wait for ever for the lock held to read the other.
pub(crate) fn apart(target: &Tensor, operand: &Tensor) -> Result<()> {
    let (a, b) = (target.storage_and_layout().0, operand.storage_and_layout().0);
    if std::ptr::eq(&*a, &*b) {
        bail!("an operation in place would overwrite its operand of shape {:?}", operand.shape());
    }
    Ok(())
}

/// Wraps a freshly computed row-major (rows, columns) matrix.
pub(crate) fn matrix<T: Real>(data: Vec<T>, rows: usize, columns: usize, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(data, (rows, columns), like.device())
}

/// Fails unless both tensors have one element type.
pub(crate) fn same_type(a: &Tensor, b: &Tensor) -> Result<DType> {
    if a.dtype() != b.dtype() {
        bail!("element types differ: {:?} and {:?}", a.dtype(), b.dtype());
    }
    Ok(a.dtype())
}
