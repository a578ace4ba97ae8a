//! Frozen matrices kept as their file holds them, and widened to f32 piece by piece on use.
//!
//! Called by the loader (`kto-model`), which wraps memory-mapped tensors, and by the matrix product, which widens the panel
//! that it is about to multiply. Invariants: nothing is copied from the file's bytes, no alignment of them is asked for,
//! lengths are checked once in the constructors, and the portable and the SIMD form of [`Stored::widen`] give the same bits.
//! Deliberately absent: files and names (`kto-formats`), and quantizing (see [`crate::quant`]).

mod affine;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod bytes;
mod dense;
mod int8;
mod micro;
mod nf4;
mod parts;
#[cfg(test)]
mod tests;

pub use affine::AffineParts;
pub use bytes::Bytes;
pub use dense::Dense;
pub use micro::MicroFloat;
pub use nf4::{Nf4Parts, Nf4Scales};
pub(crate) use parts::Widening;

use candle_core::{Result, bail};
use rayon::prelude::*;

/// A frozen (rows, columns) matrix kept as its file holds it, row-major. Cheap to clone.
#[derive(Clone)]
pub struct Stored {
    rows: usize,
    columns: usize,
    form: Form,
    /// Elements of the form before the first one of this matrix.
    start: usize,
    /// Whether [`Stored::widen`] may use AVX2 and F16C.
    wide: bool,
}

#[derive(Clone)]
enum Form {
    Dense(Dense, Bytes),
    Nf4(nf4::Nf4),
    Int8(int8::Int8),
    Affine(affine::Affine),
    Micro(micro::Micro),
}

/// A form whose slices are at hand.
#[derive(Clone, Copy)]
enum View<'a> {
    Dense(Dense, &'a [u8]),
    Nf4(nf4::View<'a>),
    Int8(int8::View<'a>),
    Affine(affine::View<'a>),
    Micro(micro::View<'a>),
}

impl Form {
    #[inline(always)]
    fn view(&self) -> View<'_> {
        match self {
            Self::Dense(dtype, bytes) => View::Dense(*dtype, bytes),
            Self::Nf4(form) => View::Nf4(form.view()),
            Self::Int8(form) => View::Int8(form.view()),
            Self::Affine(form) => View::Affine(form.view()),
            Self::Micro(form) => View::Micro(form.view()),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn pieces_avx2(view: View, start: usize, step: usize, length: usize, out: &mut [f32]) {
    let pieces = out.chunks_mut(length.max(1)).enumerate().map(|(i, piece)| (start + i * step, piece));
    match view {
        View::Dense(dtype, bytes) => {
            for (at, piece) in pieces {
                dense::widen_avx2(dtype, bytes, at, piece);
            }
        }
        View::Nf4(view) => {
            for (at, piece) in pieces {
                view.widen_avx2(at, piece);
            }
        }
        View::Int8(view) => {
            for (at, piece) in pieces {
                view.widen_avx2(at, piece);
            }
        }
        View::Affine(view) => {
            for (at, piece) in pieces {
                view.widen_avx2(at, piece);
            }
        }
        View::Micro(view) => {
            for (at, piece) in pieces {
                view.widen_avx2(at, piece);
            }
        }
    }
}

impl Stored {
    /// Wraps a matrix of floats. Fails unless `bytes` holds exactly rows · columns of them.
    pub fn dense(dtype: Dense, bytes: Bytes, rows: usize, columns: usize) -> Result<Self> {
        expect("bytes", bytes.len(), elements(rows, columns)?.checked_mul(dtype.size()))?;
        Ok(Self::new(Form::Dense(dtype, bytes), rows, columns))
    }

    /// Wraps an NF4 matrix of bitsandbytes. Fails unless codes and scales are as many as rows · columns needs.
    pub fn nf4(parts: Nf4Parts, rows: usize, columns: usize) -> Result<Self> {
        let form = nf4::Nf4::new(parts, elements(rows, columns)?)?;
        Ok(Self::new(Form::Nf4(form), rows, columns))
    }

    /// Wraps an 8-bit matrix of bitsandbytes: int8 codes, and one scale a row whose 127th is the step.
    /// Fails unless codes and scales are as many as the shape needs.
    pub fn int8(codes: Bytes, dtype: Dense, scales: Bytes, rows: usize, columns: usize) -> Result<Self> {
        let form = int8::Int8::new(codes, dtype, scales, rows, columns)?;
        Ok(Self::new(Form::Int8(form), rows, columns))
    }

    /// Wraps a matrix in affine quantization of MLX. Fails unless the parts fit each other and the shape.
    pub fn affine(parts: AffineParts, rows: usize, columns: usize) -> Result<Self> {
        let form = affine::Affine::new(parts, rows, columns)?;
        Ok(Self::new(Form::Affine(form), rows, columns))
    }

    /// Wraps a matrix of small floats of MLX. Fails unless codes and scales are as many as the shape needs.
    pub fn micro(
        kind: MicroFloat,
        packed: Bytes,
        scales: Bytes,
        rows: usize,
        columns: usize,
    ) -> Result<Self> {
        let form = micro::Micro::new(kind, packed, scales, rows, columns)?;
        Ok(Self::new(Form::Micro(form), rows, columns))
    }

    /// Returns the kind of small floats that the matrix consists of, if it does: a GPU does not widen them.
    pub fn micro_float(&self) -> Option<MicroFloat> {
        match &self.form {
            Form::Micro(form) => Some(form.kind()),
            _ => None,
        }
    }

    fn new(form: Form, rows: usize, columns: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        let wide = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
        #[cfg(not(target_arch = "x86_64"))]
        let wide = false;
        Self { rows, columns, form, start: 0, wide }
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the bytes that the matrix takes as stored, scales included; of a window those of the quantized matrix that it is in.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::Dense(_, bytes) => bytes.len(),
            Form::Nf4(form) => form.bytes(),
            Form::Int8(form) => form.bytes(),
            Form::Affine(form) => form.bytes(),
            Form::Micro(form) => form.bytes(),
        }
    }

    /// Returns some rows of a matrix of floats; nothing of a quantized one, whose scales may go across rows.
    pub fn rows_of(&self, rows: std::ops::Range<usize>) -> Option<Self> {
        let Form::Dense(dtype, bytes) = &self.form else { return None };
        let (row, n) = (self.columns * dtype.size(), rows.len());
        let part = bytes.part(rows.start * row..rows.end * row)?;
        Self::dense(*dtype, part, n, self.columns).ok()
    }

    /// Returns some rows as a matrix of their own that shares the bytes; nothing when there are fewer. Of a quantized matrix it is for
    /// the processor: a device takes the whole one and then a part of what is widened.
    pub fn window(&self, rows: std::ops::Range<usize>) -> Option<Self> {
        if rows.start > rows.end || rows.end > self.rows {
            return None;
        }
        let start = self.start + rows.start * self.columns;
        let quantized = || Self { rows: rows.len(), start, ..self.clone() };
        if let Form::Dense(..) = self.form { self.rows_of(rows) } else { Some(quantized()) }
    }

    /// Returns all elements, if their bytes are f32 of this machine as they lie: most files align them.
    pub(crate) fn floats(&self) -> Option<&[f32]> {
        let Form::Dense(Dense::F32, bytes) = &self.form else { return None };
        // SAFETY: any four bytes are an f32; what is not aligned stays outside the middle.
        match unsafe { bytes.align_to::<f32>() } {
            // Asked once more, since unsafe code reads rows · columns of them: an owner might have shrunk.
            ([], floats, [])
                if cfg!(target_endian = "little") && floats.len() == self.rows * self.columns =>
            {
                Some(floats)
            }
            _ => None,
        }
    }

    /// Writes the f32 values of `out.len()` consecutive elements of row `row` from column `column` on.
    /// They must lie inside the row; what lies outside the matrix is not written.
    #[inline]
    pub fn widen(&self, row: usize, column: usize, out: &mut [f32]) {
        debug_assert!(row < self.rows && column + out.len() <= self.columns);
        self.widen_flat(row * self.columns + column, out);
    }

    /// As [`Stored::widen`], from the flat row-major index `start` on and across rows.
    pub fn widen_flat(&self, start: usize, out: &mut [f32]) {
        self.pieces(start, 0, out.len(), out);
    }

    /// Widens `columns` elements from column `column` on of as many rows as `out` holds, from `row` on: `out` is
    /// (rows, columns), row-major. For narrow panels this is several times faster than a call a row.
    pub fn widen_rows(&self, row: usize, column: usize, columns: usize, out: &mut [f32]) {
        debug_assert!(column + columns <= self.columns && out.len().is_multiple_of(columns.max(1)));
        debug_assert!(row + out.len() / columns.max(1) <= self.rows);
        self.pieces(row * self.columns + column, self.columns, columns, out);
    }

    /// Fills `out` in chunks of `length` with the elements from `start`, `start + step`, … on.
    fn pieces(&self, start: usize, step: usize, length: usize, out: &mut [f32]) {
        let (view, start) = (self.form.view(), start + self.start);
        if self.wide {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `wide` says that the processor has AVX2 and F16C.
            return unsafe { pieces_avx2(view, start, step, length, out) };
        }
        for (i, piece) in out.chunks_mut(length.max(1)).enumerate() {
            match view {
                View::Dense(dtype, bytes) => dense::widen(dtype, bytes, start + i * step, piece),
                View::Nf4(view) => view.widen(start + i * step, piece),
                View::Int8(view) => view.widen(start + i * step, piece),
                View::Affine(view) => view.widen(start + i * step, piece),
                View::Micro(view) => view.widen(start + i * step, piece),
            }
        }
    }

    /// Returns the flat index and the value of the first element that is not finite. Of quantized forms only the scales are
    /// read, unless one of them makes such a value possible.
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        let pieces = (self.rows * self.columns).div_ceil(SCAN);
        (0..pieces).into_par_iter().find_map_first(|piece| {
            let start = piece * SCAN;
            let end = (start + SCAN).min(self.rows * self.columns);
            let range = self.start + start..self.start + end;
            let sound = match self.form.view() {
                View::Dense(dtype, bytes) => dense::all_finite(dtype, bytes, range),
                View::Nf4(view) => view.all_finite(range),
                View::Int8(view) => view.all_finite(range),
                View::Affine(view) => view.all_finite(range),
                View::Micro(view) => view.all_finite(range),
            };
            if sound {
                return None;
            }
            let mut values = vec![0.0; end - start];
            self.widen_flat(start, &mut values);
            values.iter().position(|v| !v.is_finite()).map(|i| (start + i, values[i]))
        })
    }

    /// The portable form, for tests.
    #[cfg(test)]
    fn portable(mut self) -> Self {
        self.wide = false;
        self
    }
}

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let form = match &self.form {
            Form::Dense(dtype, _) => format!("{dtype:?}"),
            Form::Nf4(_) => "Nf4".into(),
            Form::Int8(_) => "Int8".into(),
            Form::Affine(form) => format!("Affine{}", form.bits()),
            Form::Micro(form) => format!("{:?}", form.kind()),
        };
        write!(f, "Stored({form}, {} × {}, {} bytes)", self.rows, self.columns, self.bytes())
    }
}

/// Elements that one task scans for non-finite values.
const SCAN: usize = 1 << 16;

fn elements(rows: usize, columns: usize) -> Result<usize> {
    match rows.checked_mul(columns).filter(|n| *n <= isize::MAX as usize / 4) {
        Some(n) => Ok(n),
        None => bail!("a matrix of {rows} × {columns} is too large"),
    }
}

fn expect(what: &str, found: usize, expected: Option<usize>) -> Result<()> {
    match expected {
        Some(expected) if expected == found => Ok(()),
        Some(expected) => bail!("{found} {what}, expected {expected}"),
        None => bail!("{found} {what}, expected more than there can be"),
    }
}
