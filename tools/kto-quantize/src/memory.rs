//! What kto-train would hold in memory with the result as its base.

use crate::plan::Plan;
use kto_cli::{Result, units};
use kto_kernels::Dense;
use kto_model::{
    architecture::Architecture,
    lora::{LoraLayout, LoraSpec},
    memory::{
        AdapterSize, BatchShape, Batches, Demand, GpuDemand, GpuWeights, MemoryPlan, Moments, WeightSize,
        plan, plan_on_gpu,
    },
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

/// The memory of a run: the least, and the most that is of use, in bytes.
struct Needed {
    /// On the processor.
    host: (u64, u64),
    /// On a GPU, of its memory.
    gpu: (u64, u64),
    /// The run, in words.
    run: String,
}

/// Weights as they will be stored: name, shape and form.
pub type Made<'a> = [(&'a str, Vec<usize>, Form)];

/// Returns the weights of a plan's result.
pub fn made(of: &Plan) -> Vec<(&str, Vec<usize>, Form)> {
    let floats = of.forms.iter().filter_map(|(name, form)| Some((name, (*form)?)));
    floats.map(|(name, form)| (name.as_str(), shape_of(of, name), form)).collect()
}

/// Returns the lines of a plan about a run with the result; none where no plan for a GPU comes out.
pub fn lines(architecture: &Architecture, made: &Made) -> String {
    let Some(Needed { host, gpu, run }) = needed(architecture, made) else { return String::new() };
    let range =
        |(least, full)| format!("from {}, with everything kept {}", units::size(least), units::size(full));
    format!(
        "kto-train needs on the CPU {}\nkto-train needs on a GPU, in bf16, {} (planned, not run on one)\nrun {run}\n",
        range(host),
        range(gpu)
    )
}

/// Plans a run; `None` where no plan for a GPU comes out.
fn needed(architecture: &Architecture, made: &Made) -> Option<Needed> {
    let spec = LoraSpec { rank: RANK, alpha: 1.0, modules: architecture.modules().to_vec() };
    let adapter = AdapterSize::fresh(architecture, &LoraLayout::uniform(architecture, &spec));
    let demand = Demand {
        architecture,
        weights: weights(made, architecture),
        adapter,
        moments: Moments::F32,
        adapter_copy: false,
        positions: 2 * TOKENS,
        threads: rayon::current_num_threads(),
        token_bytes: 0,
        pack_rows: None,
        batches: &Rows,
    };
    let on_gpu = |limit| GpuDemand {
        element: Dense::Bf16,
        weights: gpu_weights(made, architecture),
        dropout: false,
        longest: 2 * TOKENS,
        held: kto_kernels::gpu::PRODUCTS as u64,
        limit,
    };
    // Of nothing the smallest plan comes back as an error.
    let either =
        |plan: std::result::Result<MemoryPlan, Box<MemoryPlan>>| plan.unwrap_or_else(|smallest| *smallest);
    let host = |limit| either(plan(&demand, limit)).peak;
    let gpu = |limit| either(plan_on_gpu(&demand, &on_gpu(limit))).on_gpu.map(|gpu| gpu.peak);
    Some(Needed {
        host: (host(0), host(u64::MAX)),
        gpu: (gpu(0)?, gpu(u64::MAX)?),
        run: format!("rank {RANK}, steps of {ROWS} rows of {TOKENS} + {TOKENS} tokens"),
    })
}

/// The weights as they will be stored.
fn weights(made: &Made, architecture: &Architecture) -> WeightSize {
    let mut blocks = vec![0u64; architecture.layers];
    let mut size = WeightSize::default();
    for (name, shape, form) in made {
        let bytes = form.bytes(shape);
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

/// The same on a GPU that computes in bf16: floats lie there in bf16, quantized matrices as stored, with a place to widen each kind in.
fn gpu_weights(made: &Made, architecture: &Architecture) -> GpuWeights {
    /// What the device rounds allocations up to.
    const GRAIN: u64 = 256;
    let mut blocks = vec![0u64; architecture.layers];
    let modules = architecture.modules();
    let mut widened = vec![0u64; modules.len()];
    let mut size = GpuWeights::default();
    for (name, shape, form) in made {
        let dense = 2 * shape.iter().map(|d| *d as u64).product::<u64>();
        let stored = form.bytes(shape).next_multiple_of(GRAIN);
        let float = matches!(form, Form::Float(_));
        let inner = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((block, rest)) = inner else {
            let head = if architecture.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
            if *name == head && !float {
                size.packed_head = stored;
            }
            continue;
        };
        let module = rest
            .strip_suffix(".weight")
            .and_then(|m| modules.iter().position(|l| m.rsplit('.').next() == Some(l.name())));
        match (block.parse::<usize>().ok().and_then(|b| blocks.get_mut(b)), module) {
            (Some(block), Some(_)) if float => *block += dense.next_multiple_of(GRAIN),
            (Some(block), Some(module)) => {
                *block += stored;
                widened[module] = widened[module].max(dense.next_multiple_of(GRAIN));
            }
            _ => size.vectors += dense.next_multiple_of(GRAIN),
        }
    }
    size.blocks = blocks.iter().sum();
    size.block = blocks.into_iter().max().unwrap_or(0);
    size.widened = widened.iter().sum();
    size.widest = widened.into_iter().max().unwrap_or(0);
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

/// Returns what the weights take now and will take, in bytes, and whether the second is exact.
pub fn sizes(of: &Plan) -> Result<(u64, u64, bool)> {
    let before = of.model.tensors.views().map(|v| v.data.len() as u64).sum();
    let (mut after, mut exact) = (0, true);
    for (name, form) in &of.forms {
        after += match form {
            Some(form) => form.stored_bytes(name, &shape_of(of, name))?,
            None => of.model.tensors.get(name).map_or(0, |v| v.data.len() as u64),
        };
        exact &= form.is_none_or(Form::is_exact);
    }
    Ok((before, after, exact))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;
    use kto_formats::model_dir::ModelDir;
    use std::path::Path;

    /// What is planned for the result must be what kto-train finds in the result, but for tables and text.
    #[test]
    fn the_result_is_planned_as_kto_train_finds_it() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/bnb");
        let model = folder.join("tiny_llama_bf16");
        let args = ["kto-quantize", model.to_str().unwrap(), "-o", "out"];
        let ui = kto_cli::Ui::silent("kto-quantize");
        let plan = Plan::new(&crate::Args::parse_from(args), &ui).unwrap();
        let directory = ModelDir::open(&folder.join("tiny_llama_bnb4")).unwrap();
        let architecture = plan.architecture.clone();
        let made = made(&plan);
        let (planned, found) =
            (gpu_weights(&made, &architecture), GpuWeights::of(&architecture, &directory, Dense::Bf16));
        let rest = |w: &GpuWeights| (w.widened, w.widest, w.vectors, w.packed_head);
        assert_eq!(rest(&planned), rest(&found));
        let matrices = (architecture.layers * architecture.modules().len()) as u64;
        // quant_map, nested_quant_map, quant_state and the rounding of each part.
        assert!(found.blocks > planned.blocks && found.blocks - planned.blocks < 3072 * matrices);
        let host = (weights(&made, &architecture), WeightSize::of(&architecture, &directory, 0..256));
        assert!(host.1.blocks > host.0.blocks && host.1.blocks - host.0.blocks < 2048 * matrices);
    }
}
