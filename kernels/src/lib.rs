//! Numeric operations of the KTO engine on candle tensors, and the quantization codecs.
//!
//! Called by `kto-model` (operations) and by the tools that read or write quantized weights (codecs).
//! Invariants: every operation takes two-dimensional row-major tensors, works in f32 and f64 (f64 is the test oracle of f32),
//! and gives the same bits on any number of threads, because every output element is computed by one thread in one order.
//! Deliberately absent: autograd. Backward passes are explicit functions beside their forward.

mod adamw;
pub mod adamw8;
mod attention;
mod column_sums;
pub mod device;
mod dropout;
mod elementwise;
mod exp;
mod gated;
mod gemm;
pub mod gpu;
mod lanes;
mod layer_norm;
mod logprob;
mod low_rank;
mod matmul;
mod parallel;
pub mod quant;
pub mod random;
mod real;
mod rms_norm;
mod rope;
mod rows;
mod simd;
mod stored;
mod tensor;
mod weight;

pub use adamw::{AdamW, adamw_step};
pub use attention::{
    ATTENTION_PARTS, AttentionGradients, AttentionInputs, AttentionLayout, AttentionOutputs, HeadShape,
    ScoreRule, Segment, attention, attention_backward, attention_scratch,
};
pub use column_sums::{add_column_sums, add_norm_gradient};
pub use dropout::{DropoutKey, dropout};
pub use elementwise::{
    add, add_bias, add_column_dots, first_non_finite, scale_columns, scale_in_place, soft_cap,
    soft_cap_backward, sum_of_squares,
};
pub use gated::{geglu, geglu_backward, swiglu, swiglu_backward};
pub use layer_norm::{layer_norm, layer_norm_backward};
pub use logprob::{LogprobStats, logprob_stats, logprob_unit_gradient};
pub use low_rank::add_low_rank;
pub use matmul::{Factor, Onto, Product, matmul, multiply};
pub use parallel::with_team;
pub use real::Real;
pub use rms_norm::{rms_norm, rms_norm_backward};
pub use rope::{RopeTable, rope};
pub use rows::{clear, gather_rows, gather_rows_into, scale_rows, scatter_add_rows};
pub use stored::{AffineParts, Bytes, Dense, MicroFloat, Nf4Parts, Nf4Scales, Stored};
pub use weight::Weight;
