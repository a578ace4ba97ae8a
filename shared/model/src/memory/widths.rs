//! Elements that a token row takes in the engine's buffers: the one place from which the engine allocates and the plan counts.

use crate::architecture::Architecture;

/// Row widths of a decoder's buffers, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// C, the residual stream.
    pub hidden: usize,
    /// Queries, and what attention returns: heads × size.
    pub query: usize,
    /// Keys, or values: key-value heads × size.
    pub key: usize,
    /// I, gate or up.
    pub intermediate: usize,
}

/// Returns the widths of a decoder.
pub fn widths(architecture: &Architecture) -> Widths {
    let shape = architecture.shape;
    Widths {
        hidden: architecture.hidden,
        query: shape.heads * shape.dim,
        key: shape.kv_heads * shape.dim,
        intermediate: architecture.intermediate,
    }
}

impl Widths {
    /// What a block that keeps its activations holds of a gradient row, beside its input: queries, keys, values, attention's
    /// result, the stream after attention, gate, up, and the LoRA inputs (`lora`: the ranks of its adapted modules together).
    pub fn kept(&self, lora: usize) -> usize {
        2 * self.query + 2 * self.key + self.hidden + 2 * self.intermediate + lora
    }

    /// What the workspace of the block at work holds of a row of the largest pack.
    pub fn workspace(&self) -> usize {
        3 * self.hidden + 2 * self.query + 2 * self.key + 3 * self.intermediate
    }
}
