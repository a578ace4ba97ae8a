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
    /// What a block computes of a row and may keep for the way back: queries, attention's result, the stream after attention, gate,
    /// up, and the inner values of LoRA (`lora`: the ranks of a block's adapted modules together). Keys and values apart.
    pub fn activations(&self, lora: usize) -> usize {
        2 * self.query + self.hidden + 2 * self.intermediate + lora
    }

    /// Keys and values of a row.
    pub fn key_values(&self) -> usize {
        2 * self.key
    }

    /// Work space of a row in a forward pass: the normed row, and gate times up.
    pub fn forward(&self) -> usize {
        self.hidden + self.intermediate
    }

    /// What a backward pass needs of a row on top: gradients that flow in both widths, those of queries, keys, values and LoRA's inner
    /// values. Keys and values count twice: their gradients are summed transposed.
    pub fn backward(&self, lora: usize) -> usize {
        self.hidden + 2 * self.query + 2 * self.key_values() + lora
    }
}
