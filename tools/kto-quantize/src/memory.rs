//! What kto-train would hold in memory with the result as its base.

use crate::plan::Plan;
use kto_formats::bnb;
use kto_model::{
    architecture::Architecture,
    lora::{LoraLayout, LoraSpec},
    memory::{AdapterSize, BatchShape, Batches, Demand, Moments, WeightSize, plan},
    pack::{BranchSpec, Group},
    rows::Packing,
};
use kto_weights::Form;

/// Tokens of a prompt and of a completion of the run that is thought of.
const TOKENS: usize = 512;
/// Rows of a step.
const ROWS: usize = 16;
/// Rank of the adapter.
const RANK: usize = 16;

/// The memory of a run, smallest and without anything given up, in words; `None` for a decoder that kto-train does not know.
pub fn needed(of: &Plan) -> Option<(u64, u64, String)> {
    let architecture = Architecture::from_config(&of.model.config).ok()?;
    let spec = LoraSpec { rank: RANK, alpha: 1.0, modules: architecture.modules().to_vec() };
    let adapter = AdapterSize::fresh(&architecture, &LoraLayout::uniform(&architecture, &spec));
    let demand = Demand {
        architecture: &architecture,
        weights: weights(of, &architecture),
        adapter,
        moments: Moments::F32,
        adapter_copy: false,
        positions: 2 * TOKENS,
        threads: rayon::current_num_threads(),
        token_bytes: 0,
        pack_rows: None,
        batches: &Rows,
    };
    let least = match plan(&demand, 0) {
        Err(smallest) => smallest.peak,
        Ok(plan) => plan.peak,
    };
    let full = plan(&demand, u64::MAX).ok()?.peak;
    let text = format!("rank {RANK}, steps of {ROWS} rows of {TOKENS} + {TOKENS} tokens, CPU");
    Some((least, full, text))
}

/// The weights as they will be stored.
fn weights(of: &Plan, architecture: &Architecture) -> WeightSize {
    let mut blocks = vec![0u64; architecture.layers];
    let mut size = WeightSize::default();
    for (name, form) in &of.forms {
        let Some(form) = form else { continue };
        let shape = shape_of(of, name);
        let bytes = form.bytes(&shape);
        let block =
            name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        match block.and_then(|b| blocks.get_mut(b)) {
            Some(block) => *block += bytes,
            None if name.starts_with("model.embed_tokens.") => {
                (size.embedding, size.embedding_touched) = (bytes, bytes);
            }
            None if name.starts_with("lm_head.") && !architecture.tied => size.head = bytes,
            None => {}
        }
    }
    size.blocks = blocks.iter().sum();
    size.block = blocks.into_iter().max().unwrap_or(0);
    size
}

fn shape_of(of: &Plan, name: &str) -> Vec<usize> {
    let weight = kto_weights::Weight::find(&of.model, name).ok().flatten();
    weight.map(|w| w.shape).unwrap_or_default()
}

/// Steps of [`ROWS`] rows, each with a prompt of its own and its KL partner.
struct Rows;

impl Batches for Rows {
    fn steps(&self, pack_rows: usize) -> BatchShape {
        let ids = [0u32; TOKENS];
        let branch = |gradient, tag| BranchSpec { ids: &ids, gradient, tag };
        let group = |i| Group {
            prompt: &ids,
            rotary: 0,
            branches: vec![branch(true, 2 * i), branch(false, 2 * i + 1)],
        };
        let groups: Vec<Group> = (0..ROWS).map(group).collect();
        BatchShape::of(&groups, Packing::Shared(pack_rows))
    }
    fn reference(&self, pack_rows: usize, _reference_rows: usize) -> BatchShape {
        self.steps(pack_rows)
    }
}

/// Returns what the weights take now and will take, in bytes.
pub fn sizes(of: &Plan) -> (u64, u64) {
    let before = of.model.tensors.views().map(|v| v.data.len() as u64).sum();
    let after = of.forms.iter().map(|(name, form)| match form {
        Some(form) => {
            form.bytes(&shape_of(of, name)) + if matches!(form, Form::FourBit { .. }) { CONSTANTS } else { 0 }
        }
        None => of.model.tensors.get(name).map_or(0, |v| v.data.len() as u64),
    });
    (before, after.sum())
}

/// Tables and text that every 4-bit weight has beside its codes and scales, about.
const CONSTANTS: u64 = 64 + 1024 + 200 + 4 * bnb::BLOCK as u64 / 64;
