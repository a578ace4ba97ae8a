//! The operations of the engine wherever its tensors are: each calls its form for the host or for a GPU.
//!
//! Called by `kto-model`. Invariant: the operands of one call are all in one place; another place is an error, never a copy.
//! What an operation computes, its shapes and its errors stand with the form for the host, in the root of this crate.

mod attention;
mod operations;
mod products;
mod self_test;
mod tensor;

pub use attention::{AttentionGradients, AttentionInputs, AttentionOutputs, attention, attention_backward};
pub use operations::{
    Gate, Rotation, add, add_bias, add_column_dots, clear, dropout, gated, gated_backward, gather_rows,
    gather_rows_into, layer_norm, layer_norm_backward, logprobs, logprobs_in_tiles, rms_norm,
    rms_norm_backward, rope, scale_columns, scale_in_place, scale_rows, scatter_add_rows, soft_cap,
};
pub use products::{Factor, Onto, Product, matmul, multiply};
pub use self_test::self_test;
pub use tensor::{Device, FrozenWeight, Tensor};

use candle_core::{Result, bail};

/// Fails because the operands of a call are in different places.
fn apart<T>(what: &str) -> Result<T> {
    bail!("{what}: operands on the host and on a GPU")
}
