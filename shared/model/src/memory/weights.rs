//! Bytes of the frozen weights as their files hold them, and of the adapter, from headers and settings alone.

use crate::architecture::{Architecture, Module};
use kto_formats::{adapter::Adapter, model_dir::ModelDir};
use kto_kernels::adamw8::moment_bytes;
use std::collections::BTreeSet;

/// The linear layers and ends of a model as stored, in bytes of mapped file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightSize {
    /// All blocks.
    pub blocks: u64,
    /// The largest block.
    pub block: u64,
    /// The embedding.
    pub embedding: u64,
    /// The pages of the embedding that the run's tokens touch: all of them when it is the head too.
    pub embedding_touched: u64,
    /// The head; 0 when it is the embedding.
    pub head: u64,
}

/// Bytes that the system maps around a page that is touched (Linux: fault_around_bytes).
const FAULT_AROUND: usize = 64 << 10;

impl WeightSize {
    /// Adds up the tensors of a model. `ids` are the tokens of the run.
    pub fn of(architecture: &Architecture, model: &ModelDir, ids: impl Iterator<Item = u32>) -> Self {
        let mut blocks = vec![0u64; architecture.layers];
        let mut this = Self::default();
        let ids: BTreeSet<u32> = ids.collect();
        for view in model.tensors.views() {
            let bytes = view.data.len() as u64;
            let block = view.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
            if let Some(block) = block.and_then(|n| blocks.get_mut(n.parse::<usize>().ok()?)) {
                *block += bytes;
            } else if view.name.starts_with("model.embed_tokens.") {
                this.embedding += bytes;
                this.embedding_touched += touched(view.data.len(), architecture.vocab_size, &ids);
            } else if view.name.starts_with("lm_head.") && !architecture.tied {
                this.head += bytes;
            }
        }
        if architecture.tied {
            this.embedding_touched = this.embedding;
        }
        this.blocks = blocks.iter().sum();
        this.block = blocks.into_iter().max().unwrap_or(0);
        this
    }

    /// Returns what is resident at the peak: all blocks, the head and the touched part of the embedding; with streaming the
    /// largest of what takes turns, one block, the head, that part.
    pub fn resident(&self, stream: bool) -> u64 {
        if stream {
            self.block.max(self.head).max(self.embedding_touched)
        } else {
            self.blocks + self.embedding_touched + self.head
        }
    }
}

/// Returns the bytes that reading the rows `ids` of a table of `bytes` brings into memory.
fn touched(bytes: usize, rows: usize, ids: &BTreeSet<u32>) -> u64 {
    let width = bytes / rows.max(1);
    let windows = |id: &u32| {
        let start = *id as usize * width;
        start / FAULT_AROUND..=(start + width.max(1) - 1) / FAULT_AROUND
    };
    let count = ids.iter().flat_map(windows).collect::<BTreeSet<_>>().len();
    (count * FAULT_AROUND).min(bytes) as u64
}

/// The adapter's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdapterSize {
    /// Trained numbers.
    pub parameters: u64,
    /// Bytes of AdamW's moments when those of large tensors are in 8 bits.
    pub moments8: u64,
    /// Largest rank by [`Module`]; 0 where there is none.
    pub ranks: [usize; 7],
    /// The lowest adapted block.
    pub first: usize,
}

impl AdapterSize {
    /// Returns the size of a fresh adapter on `modules` of every block, which are some of [`Architecture::modules`].
    pub fn fresh(architecture: &Architecture, rank: usize, modules: &[Module]) -> Self {
        let sides = |m: &Module| {
            let (out, input) = architecture.weight_shape(*m);
            [out, input].map(|side| side as u64 * rank as u64)
        };
        let of_all = |f: fn(u64) -> u64| -> u64 {
            let block: u64 = modules.iter().flat_map(sides).map(f).sum();
            block.saturating_mul(architecture.layers as u64)
        };
        let adapted = |m: Module| modules.contains(&architecture.matrix_of(m));
        let ranks = Module::ALL.map(|m| if adapted(m) { rank } else { 0 });
        Self { parameters: of_all(|n| n), moments8: of_all(moment_bytes), ranks, first: 0 }
    }

    /// Returns the size of a given adapter.
    pub fn given(architecture: &Architecture, adapter: &Adapter) -> Self {
        let mut this = Self { ranks: [0; 7], first: architecture.layers, ..Self::default() };
        let modules = architecture.modules();
        for (layer, module) in (0..architecture.layers).flat_map(|l| modules.iter().map(move |m| (l, *m))) {
            let Some(pair) = adapter.tensors.get(&module.path(layer)) else { continue };
            for factor in [&pair.a, &pair.b] {
                this.parameters += factor.len() as u64;
                this.moments8 += moment_bytes(factor.len() as u64);
            }
            this.first = this.first.min(layer);
            for (part, _) in architecture.parts().of(module) {
                let rank = &mut this.ranks[part as usize];
                *rank = pair.r.max(*rank);
            }
        }
        this
    }

    /// Returns the number of blocks through which gradients go.
    pub fn blocks(&self, architecture: &Architecture) -> usize {
        architecture.layers.saturating_sub(self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_a_row_brings_its_surroundings() {
        let set = |ids: &[u32]| ids.iter().copied().collect::<BTreeSet<u32>>();
        // Rows of 4 KiB: 16 of them in a window.
        assert_eq!(touched(1 << 20, 256, &set(&[0, 15, 16, 40])), 3 << 16);
        // Rows of 48 KiB may lie in two windows.
        assert_eq!(touched(48 << 10 << 4, 16, &set(&[1])), 2 << 16);
        assert_eq!(touched(1000, 10, &set(&[1, 9])), 1000);
    }
}
