//! Bytes of the frozen weights as their files hold them, and of the adapter, from headers and settings alone.

use crate::{
    architecture::{Architecture, Module},
    lora::{LoraLayout, Place},
    weights::EMBEDDING,
    whole,
};
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
    /// Numbers that are trained whole, which are among the parameters; 0 where there are none.
    pub whole: u64,
    /// Those of them that are the embedding's.
    pub whole_embedding: u64,
    /// Magnitudes of DoRA, which are among the parameters; 0 where there is none.
    pub magnitudes: u64,
}

impl AdapterSize {
    /// Returns the size of a fresh adapter.
    pub fn fresh(architecture: &Architecture, layout: &LoraLayout) -> Self {
        let of = |(layer, module, place): (usize, Module, Place)| (layer, module, place.rank, layout.dora);
        Self::of(architecture, layout.places().map(of))
            .with_whole(layout.whole.iter().map(|(name, shape)| (name, &shape[..])))
    }

    /// Returns the size of a given adapter.
    pub fn given(architecture: &Architecture, adapter: &Adapter) -> Self {
        let modules = architecture.modules();
        let all = (0..architecture.layers).flat_map(|l| modules.iter().map(move |m| (l, *m)));
        let of = all.filter_map(|(l, m)| {
            adapter.tensors.get(&m.path(l)).map(|own| (l, m, own.r, own.magnitude.is_some()))
        });
        let saved = adapter.saved.iter().map(|(name, saved)| (name, &saved.shape[..]));
        Self::of(architecture, of).with_whole(saved)
    }

    /// Adds what is trained whole.
    fn with_whole<'a>(mut self, all: impl Iterator<Item = (&'a String, &'a [usize])> + Clone) -> Self {
        for (name, shape) in all.clone() {
            let n = shape.iter().fold(1u64, |n, side| n.saturating_mul(*side as u64));
            self.whole = self.whole.saturating_add(n);
            self.whole_embedding += if name == EMBEDDING { n } else { 0 };
            self.parameters = self.parameters.saturating_add(n);
            self.moments8 = self.moments8.saturating_add(moment_bytes(n));
        }
        self.first = whole::first_layer(all.map(|(name, _)| name), self.first);
        self
    }

    /// Adds up adapted matrices: (block, matrix, rank, whether DoRA).
    fn of(architecture: &Architecture, all: impl Iterator<Item = (usize, Module, usize, bool)>) -> Self {
        let mut this = Self { first: architecture.layers, ..Self::default() };
        for (layer, module, r, dora) in all {
            let (out, input) = architecture.weight_shape(module);
            let magnitudes = if dora { out as u64 } else { 0 };
            for n in [(input * r) as u64, (out * r) as u64, magnitudes] {
                this.parameters = this.parameters.saturating_add(n);
                this.moments8 = this.moments8.saturating_add(moment_bytes(n));
            }
            this.magnitudes += magnitudes;
            this.first = this.first.min(layer);
            for (part, _) in architecture.parts().of(module) {
                let rank = &mut this.ranks[part as usize];
                *rank = r.max(*rank);
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
