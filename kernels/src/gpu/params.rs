//! Parameters of the kernels as the dialect lays them out: the same fields in the same order, no padding.
//!
//! The constructors do what is done once on the host, in f64, exactly as the CPU operations do it.

use crate::{Dense, DropoutKey, ScoreRule, Segment};

/// A kernel's last argument.
///
/// # Safety
/// The type is `repr(C)`, has no padding and no pointers, and equals its namesake in the kernel's file.
pub unsafe trait Params: Copy {
    /// Returns the bytes that the kernel gets.
    fn bytes(&self) -> &[u8] {
        let at = std::ptr::from_ref(self).cast();
        // SAFETY: by the trait's promise every byte is initialized.
        unsafe { std::slice::from_raw_parts(at, size_of::<Self>()) }
    }
}

/// Defines a parameter structure; its size is the sum of its fields' sizes, so nothing pads it.
macro_rules! params {
    ($(#[$meta:meta])* $name:ident { $($(#[$about:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name {
            $($(#[$about])* pub $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*);
        // SAFETY: numbers only, without padding as asserted; the emulator compares the size with the kernel's.
        unsafe impl Params for $name {}
    };
}

params!(
    /// Of `layer_norm` and `layer_norm_backward`.
    LayerNorm {
        /// Rows of x.
        rows: u64,
        /// Columns of x.
        columns: u32,
        /// Added to the variance.
        eps: f32,
    }
);
params!(
    /// Of `rms_norm` and `rms_norm_backward`.
    RmsNorm {
        /// Rows of x.
        rows: u64,
        /// Columns of x.
        columns: u32,
        /// Added to the mean square.
        eps: f32,
    }
);
params!(
    /// Of `rope`.
    Rope {
        /// Rows of x.
        rows: u64,
        /// Heads in a row.
        heads: u32,
        /// Half a head.
        half_dim: u32,
        /// 1, or −1 for the way back.
        sign: f32,
        /// D, at least twice `half_dim`.
        head_dim: u32,
    }
);
params!(
    /// Of `softmax`, `softmax_backward` and their forms for scores in f32.
    Softmax {
        /// (head, query) pairs.
        rows: u64,
        /// Keys of the segment.
        columns: u32,
        /// Queries of a head.
        queries: u32,
        /// Keys that the first query sees.
        first: u32,
        /// Elements from one row of scores to the next.
        in_stride: u32,
        /// Elements from one row of the result to the next.
        out_stride: u32,
        /// Factor of the scores.
        scale: f32,
        /// Positions that a query sees; 0 for all.
        window: u32,
        /// A score s becomes cap·tanh(s/cap); 0 for none.
        cap: f32,
    }
);
params!(
    /// Of `swiglu`, `geglu` and their ways back.
    Gated {
        /// Elements of each tensor.
        elements: u64,
    }
);
params!(
    /// Of `logprob`, `logprob_gradient` and `logprob_gradient_of_f32`.
    Logprob {
        /// Rows of logits.
        rows: u64,
        /// Columns of logits.
        vocabulary: u32,
        /// Number of the first column in the vocabulary.
        first: u32,
    }
);
params!(
    /// Of `dequantize_nf4`.
    DequantizeNf4 {
        /// Values of the matrix.
        elements: u64,
        /// log₂ of the values that share a scale.
        shift: u32,
        /// log₂ of the scales that share a scale.
        nested_shift: u32,
        /// 1 for double quantization.
        nested: u32,
        /// [`float_code`] of plain scales.
        scale_type: u32,
        /// [`float_code`] of what values are rounded to first.
        round_type: u32,
        /// Added to every scale in double quantization.
        offset: f32,
        /// The 16 values.
        code: [f32; 16],
    }
);
params!(
    /// Of `dequantize_affine`.
    DequantizeAffine {
        /// Values of the matrix.
        elements: u64,
        /// Bits of a code.
        bits: u32,
        /// log₂ of the values in a group.
        shift: u32,
        /// [`float_code`] of scales, biases and values.
        float: u32,
        /// Zero.
        unused: u32,
    }
);
params!(
    /// Of `dequantize_int8`.
    DequantizeInt8 {
        /// Rows of the matrix.
        rows: u64,
        /// Columns of the matrix.
        columns: u32,
        /// [`float_code`] of the scales.
        scale_type: u32,
    }
);
params!(
    /// Of `dropout`.
    Dropout {
        /// Rows of x.
        rows: u64,
        /// An element survives when its 32 random bits lie below it.
        bound: u64,
        /// The application's key.
        key: u64,
        /// Columns of x.
        columns: u32,
        /// 1 − p
        keep: f32,
    }
);
params!(
    /// Of `gather_rows`, `scatter_add_rows`, `scale_rows` and `add_bias`.
    Rows {
        /// Rows of the index, or of x.
        rows: u64,
        /// Columns of each matrix.
        columns: u32,
        /// Zero.
        unused: u32,
    }
);
params!(
    /// Of `scale_columns` and `add_column_dots`.
    Gains {
        /// Rows of x.
        rows: u64,
        /// Columns of x.
        columns: u32,
        /// Zero.
        unused: u32,
    }
);
params!(
    /// Of `add`, `scale`, `cast_to_f32` and `cast_of_f32`.
    Elements {
        /// Elements of each tensor.
        elements: u64,
        /// Of `scale`.
        factor: f32,
        /// Zero.
        unused: u32,
    }
);
/// Returns the number that kernels know a file's float type by.
pub fn float_code(float: Dense) -> u32 {
    match float {
        Dense::F32 => 0,
        Dense::F16 => 1,
        Dense::Bf16 => 2,
    }
}

impl Dropout {
    /// Returns the parameters of a mask over (rows, columns).
    pub fn new(mask: DropoutKey, rows: usize, columns: u32) -> Self {
        let keep = 1.0 - mask.p;
        let bound = (keep * 4_294_967_296.0) as u64;
        Self { rows: rows as u64, bound, key: mask.key, columns, keep: keep as f32 }
    }
}

impl Softmax {
    /// Returns the parameters for the scores of `heads` stacked query heads of a segment against its keys, prefix first.
    pub fn of_segment(segment: &Segment, heads: usize, rule: ScoreRule, strides: (u32, u32)) -> Self {
        Self {
            rows: (heads * segment.queries) as u64,
            columns: (segment.prefix_len + segment.offset + segment.queries) as u32,
            queries: segment.queries as u32,
            first: (segment.prefix_len + segment.offset + 1) as u32,
            in_stride: strides.0,
            out_stride: strides.1,
            scale: rule.scale as f32,
            window: rule.window.map_or(0, |w| u32::try_from(w).unwrap_or(0)),
            cap: rule.cap.map_or(0.0, |cap| cap as f32),
        }
    }
}
