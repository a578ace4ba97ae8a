//! A frozen matrix taken apart for a device: the runs of bytes that it consists of, and how they are widened there.

use super::{Dense, Form, Stored};
use crate::gpu::{DequantizeAffine, DequantizeInt8, DequantizeNf4};

/// How a device widens a matrix from its parts, which are in this order.
pub(crate) enum Widening {
    /// The floats.
    Dense(Dense),
    /// Codes, scales, the map and the scales of double quantization.
    Nf4(DequantizeNf4),
    /// Codes, scales.
    Int8(DequantizeInt8),
    /// Codes, scales, biases.
    Affine(DequantizeAffine),
    /// Codes, scales; for the host only.
    Micro,
}

impl Stored {
    /// Returns the parts of the matrix, some of them empty.
    pub(crate) fn parts(&self) -> (Widening, Vec<&[u8]>) {
        match &self.form {
            Form::Dense(dtype, bytes) => (Widening::Dense(*dtype), vec![bytes]),
            Form::Nf4(form) => form.parts(),
            Form::Int8(form) => form.parts(self.rows),
            Form::Affine(form) => form.parts(self.rows * self.columns),
            Form::Micro(form) => (Widening::Micro, form.parts()),
        }
    }
}

/// Returns floats as they lie in memory, which is how a device reads them.
pub(super) fn bytes_of(floats: &[f32]) -> &[u8] {
    // SAFETY: any byte of a float may be read; size and lifetime are the slice's.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(floats)) }
}
