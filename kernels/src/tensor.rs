//! Access to the memory of candle tensors on the CPU.

use crate::real::{Operand, Real};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use std::{
    cell::Cell,
    ops::{Deref, Range},
};

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
        let all = self.all::<T>()?;
        Ok(&all[extent(self.layout, all.len())?])
    }

    /// Returns a two-dimensional tensor of any strides as a matrix operand with its (rows, columns).
    pub fn operand<T: Real>(&self) -> Result<(Operand<T>, usize, usize)> {
        let (rows, columns) = self.layout.shape().dims2()?;
        let all = self.all::<T>()?;
        let (row, column) = (self.layout.stride()[0], self.layout.stride()[1]);
        if rows > 0 && columns > 0 {
            // Unsafe code reads by these strides, and a sum that wraps around would pass for a small one.
            let to = |n: usize, stride: usize| (n - 1).checked_mul(stride);
            let last = to(rows, row).zip(to(columns, column)).and_then(|(r, c)| r.checked_add(c));
            let last = last.and_then(|l| l.checked_add(self.layout.start_offset()));
            if last.is_none_or(|last| last >= all.len()) {
                bail!("tensor layout reaches past its storage");
            }
        }
        let at = all[self.layout.start_offset().min(all.len())..].as_ptr();
        Ok((Operand { at, row: row as isize, column: column as isize }, rows, columns))
    }
}

/// Returns where the elements of a contiguous tensor lie in a storage of `stored` elements.
fn extent(layout: &Layout, stored: usize) -> Result<Range<usize>> {
    if !layout.is_contiguous() {
        bail!("expected a contiguous tensor, found {:?} with strides {:?}", layout.shape(), layout.stride());
    }
    // candle's number of elements wraps around; unsafe code relies on rows · columns being what is there.
    let n = layout.dims().iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    match n.and_then(|n| n.checked_add(layout.start_offset())) {
        Some(end) if end <= stored => Ok(layout.start_offset()..end),
        _ => bail!("tensor layout reaches past its storage"),
    }
}

/// Runs `f` on the elements of a contiguous tensor, in place. `f` must not read `target` through another tensor: the lock is held.
pub(crate) fn write<T: Real>(target: &Tensor, f: impl FnOnce(&mut [T]) -> Result<()>) -> Result<()> {
    write_as(target, T::slice_mut, f)
}

/// As [`write`], on the bytes of a U8 tensor.
pub(crate) fn write_bytes(target: &Tensor, f: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
    fn bytes(storage: &mut CpuStorage) -> Option<&mut [u8]> {
        match storage {
            CpuStorage::U8(v) => Some(v),
            _ => None,
        }
    }
    write_as(target, bytes, f)
}

fn write_as<E>(
    target: &Tensor,
    elements: impl for<'a> Fn(&'a mut CpuStorage) -> Option<&'a mut [E]>,
    f: impl FnOnce(&mut [E]) -> Result<()>,
) -> Result<()> {
    /// The operation as candle wants it; it is asked once.
    struct Write<S, F, E>(S, Cell<Option<F>>, std::marker::PhantomData<E>);
    impl<E, S, F> InplaceOp1 for Write<S, F, E>
    where
        S: for<'a> Fn(&'a mut CpuStorage) -> Option<&'a mut [E]>,
        F: FnOnce(&mut [E]) -> Result<()>,
    {
        fn name(&self) -> &'static str {
            "write"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            match (self.0(storage), self.1.take()) {
                (Some(all), Some(f)) => {
                    let range = extent(layout, all.len())?;
                    f(&mut all[range])
                }
                _ => bail!("the tensor holds another element type"),
            }
        }
    }
    // candle gives rows without elements a stride of zero and takes that for repetition.
    if target.dims().contains(&0) {
        return f(&mut []);
    }
    target.inplace_op1(&Write(elements, Cell::new(Some(f)), std::marker::PhantomData))
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
