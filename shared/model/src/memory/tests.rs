//! The plan on sizes that can be added up by hand.

use super::*;
use crate::{
    architecture::Module,
    lora::{LoraLayout, LoraSpec},
    rotary::{Rotary, Scaling},
};
use kto_kernels::{HeadShape, device::Gate};

fn architecture() -> Architecture {
    Architecture {
        family: "llama".into(),
        vocab_size: 1 << 10,
        hidden: 512,
        intermediate: 1024,
        layers: 8,
        shape: HeadShape { heads: 8, kv_heads: 4, dim: 64 },
        norm_eps: 1e-6,
        norm_bias: false,
        rotary: Rotary { dim: 64, theta: 1e4, scaling: Scaling::Default },
        sliding_rotary: None,
        window: None,
        sliding: Vec::new(),
        attention_scale: 0.125,
        attention_cap: None,
        logit_cap: None,
        embedding_scale: 1.0,
        norm_plus_one: false,
        post_norms: false,
        qk_norm: false,
        gate: Gate::Silu,
        tied: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        fused: false,
        max_positions: 2048,
    }
}

/// Steps of `rows` rows, half of them with gradient, in full packs.
struct Plain {
    rows: usize,
}

impl Batches for Plain {
    fn steps(&self, pack_rows: usize) -> BatchShape {
        let shape = |rows: usize| PackShape {
            rows,
            gradient_rows: rows / 2,
            rest_rows: rows / 2,
            part_rows: rows / 2,
            head_rows: rows / 4,
            gradient_head_rows: rows / 8,
            entries: rows / 4,
            gradient_entries: rows / 8,
            rest_entries: rows / 8,
        };
        BatchShape { all: shape(self.rows), largest: shape(pack_rows.min(self.rows)) }
    }
    fn reference(&self, _: usize, _: usize) -> BatchShape {
        BatchShape::default()
    }
}

fn demand<'a>(architecture: &'a Architecture, batches: &'a Plain) -> Demand<'a> {
    let block = 8 << 20;
    let weights =
        WeightSize { blocks: 8 * block, block, embedding: 2 << 20, embedding_touched: 2 << 20, head: 0 };
    Demand {
        architecture,
        weights,
        adapter: adapter(architecture, 16),
        moments: Moments::F32,
        adapter_copy: false,
        positions: 100,
        threads: 2,
        token_bytes: 1000,
        pack_rows: None,
        batches,
    }
}

fn get(plan: &MemoryPlan, name: &str) -> u64 {
    plan.items.iter().filter(|i| i.name.starts_with(name)).map(|i| i.bytes).sum()
}

fn adapter(architecture: &Architecture, rank: usize) -> AdapterSize {
    let spec = LoraSpec { rank, alpha: 1.0, modules: Module::ALL.to_vec() };
    AdapterSize::fresh(architecture, &LoraLayout::uniform(architecture, &spec))
}

#[test]
fn a_roomy_plan_keeps_everything_and_adds_up() {
    let (a, batches) = (architecture(), Plain { rows: 4096 });
    let plan = plan(&demand(&a, &batches), u64::MAX).unwrap();
    assert_eq!((plan.kept_layers, plan.pack_rows, plan.head_rows, plan.stream), (8, 4096, 1024, false));
    assert_eq!(plan.peak, plan.items.iter().map(|i| i.bytes).sum::<u64>());
    assert_eq!(get(&plan, "weights"), 66 << 20);
    // q_proj, o_proj: 1024 sides each; k, v: 768; gate, up, down: 1536; rank 16, 8 blocks.
    let parameters = (2 * 1024 + 2 * 768 + 3 * 1536) * 16 * 8;
    assert_eq!(get(&plan, "adapter"), 4 * parameters);
    assert_eq!(get(&plan, "gradients") + get(&plan, "AdamW"), 12 * parameters);
    assert_eq!(get(&plan, "layer inputs"), 8 * 2048 * 512 * 4);
    // Two numbers for each of 8 heads beside queries and attention's output.
    let activations = 2 * 512 + 2 * 8 + 512 + 2 * 1024 + 7 * 16;
    assert_eq!(get(&plan, "kept"), ((7 * 2048 + 512) * activations + 8 * 4096 * 2 * 256) * 4);
    assert_eq!(get(&plan, "streams"), 4096 * 512 * 4);
    // Gradients of keys and values, and their sums in four parts.
    let back = 512 + 2 * 512 + (2 + 2 * 4) * 256 + 7 * 16;
    // A pack of 4096 rows, half of them trained.
    let work = 2048 * (activations + 512 + 1024) + 4096 * 2 * 256 + 2048 * back;
    assert_eq!(get(&plan, "one block at work"), work * 4);
    assert_eq!(get(&plan, "rows of the head"), (1024 + 1024 + 512 + 512 + 1024) * 512 * 4);
    assert_eq!(get(&plan, "logits of 1024 rows"), 1024 * 1024 * 4);
}

/// 16 bytes a parameter that is trained whole; of an embedding's gradient only the pages of the rows that a step trains on.
#[test]
fn what_is_trained_whole_is_counted_by_itself() {
    let (a, batches) = (architecture(), Plain { rows: 128 });
    let spec = LoraSpec { rank: 16, alpha: 1.0, modules: Module::ALL.to_vec() };
    let layout = |names: &[&str]| {
        let whole = names.iter().map(|name| (name.to_string(), vec![a.vocab_size, a.hidden])).collect();
        let mut layout = LoraLayout { whole, ..LoraLayout::uniform(&a, &spec) };
        layout.blocks[0] = Default::default();
        layout
    };
    let plan_of = |names: &[&str], adapter_copy| {
        let adapter = AdapterSize::fresh(&a, &layout(names));
        plan(&Demand { adapter, adapter_copy, ..demand(&a, &batches) }, u64::MAX).unwrap()
    };
    let (none, head, ends) = (
        plan_of(&[], false),
        plan_of(&["lm_head.weight"], false),
        plan_of(&["lm_head.weight", "model.embed_tokens.weight"], true),
    );
    let n = (a.vocab_size * a.hidden) as u64;
    assert_eq!(get(&none, "modules trained whole"), 0);
    assert_eq!((get(&head, "modules trained whole"), get(&ends, "modules trained whole")), (4 * n, 16 * n));
    assert_eq!(get(&head, "gradients") - get(&none, "gradients"), 4 * n);
    // 64 trained rows of 2 KiB, which may lie in two pages each.
    assert_eq!(get(&ends, "gradients") - get(&head, "gradients"), 64 * 8192);
    assert_eq!(get(&ends, "AdamW") - get(&none, "AdamW"), 16 * n);
    // Above a trained embedding all blocks have a way back.
    assert_eq!(
        (get(&none, "layer inputs"), get(&ends, "layer inputs")),
        (7 * 64 * 512 * 4, 8 * 64 * 512 * 4)
    );
}

#[test]
fn moments_in_8_bits_are_counted_tensor_by_tensor() {
    let (a, batches) = (architecture(), Plain { rows: 4096 });
    let plan_of = |moments, rank| {
        let adapter = adapter(&a, rank);
        plan(&Demand { moments, adapter, ..demand(&a, &batches) }, u64::MAX).unwrap()
    };
    // Rank 16: sides of 512, 256 and 1024; 4096 elements are the smallest in 8 bits. Two bytes an element, two scales a block.
    let (f32, bits8) = (plan_of(Moments::F32, 16), plan_of(Moments::Bits8, 16));
    let parameters = (2 * 1024 + 2 * 768 + 3 * 1536) * 16 * 8;
    assert_eq!(get(&bits8, "AdamW moments in 8 bits"), 2 * parameters + 8 * parameters / 256);
    assert_eq!(f32.peak - bits8.peak, 6 * parameters - 8 * parameters / 256);
    // Rank 15: B of k and v (256 · 15) stays in f32; 512 · 15 and 1024 · 15 elements are 30 and 60 blocks.
    let small = 2 * 256 * 15 * 8;
    let large = (2 * 1024 + 2 * 512 + 3 * 1536) * 15 * 8;
    assert_eq!(get(&plan_of(Moments::Bits8, 15), "AdamW"), 8 * small + 2 * large + 8 * large / 256);
    // Rank 3 with sides of 512 and 1024: nothing is large.
    assert_eq!(get(&plan_of(Moments::Bits8, 3), "AdamW"), get(&plan_of(Moments::F32, 3), "AdamW"));
}

#[test]
fn memory_is_given_up_in_order() {
    let (a, batches) = (architecture(), Plain { rows: 4096 });
    let demand = demand(&a, &batches);
    let at = |limit: u64| plan(&demand, limit).unwrap();
    let smaller = |p: &MemoryPlan| at(p.peak - 1);
    let chosen = |p: &MemoryPlan| (p.kept_layers, p.pack_rows, p.stream);
    let most = at(u64::MAX);
    assert_eq!(chosen(&most), (8, 4096, false));
    // Smaller packs first, down to 1024 rows; then what is kept.
    assert_eq!(chosen(&smaller(&most)), (8, 2048, false));
    let full = smaller(&smaller(&most));
    assert_eq!(chosen(&full), (8, 1024, false));
    // One block less leaves room for larger packs again.
    assert_eq!(chosen(&smaller(&full)), (7, 2048, false));
    let kept = get(&full, "kept");
    assert_eq!(at(full.peak - kept / 2).kept_layers, 4);
    // At the end nothing is kept, then packs are smaller, then weights are streamed.
    let plans: Vec<MemoryPlan> =
        std::iter::successors(Some(full), |p| plan(&demand, p.peak - 1).ok()).collect();
    let tight: Vec<_> = plans.iter().map(chosen).filter(|c| c.0 == 0).collect();
    assert_eq!(tight[0], (0, 1024, false));
    let resident = tight.iter().take_while(|c| !c.2).count();
    assert!(
        tight[..resident].windows(2).all(|w| w[0].1 > w[1].1) && tight[resident - 1].1 == 128,
        "{tight:?}"
    );
    let streamed = plans.iter().find(|p| p.stream).unwrap();
    assert_eq!(get(streamed, "weights"), 8 << 20);
}

#[test]
fn less_memory_never_predicts_more() {
    let a = architecture();
    for rows in [10, 700, 5000] {
        let batches = Plain { rows };
        let demand = demand(&a, &batches);
        let least = plan(&demand, 0).unwrap_err().peak;
        let most = plan(&demand, u64::MAX).unwrap().peak;
        let mut before = 0;
        for i in 0..=200 {
            let limit = least + (most - least) * i / 200;
            let plan = plan(&demand, limit).unwrap();
            assert!(plan.peak <= limit && plan.peak >= before, "{rows} rows, {limit}");
            before = plan.peak;
        }
        assert_eq!(before, most);
        assert_eq!(plan(&demand, least - 1).unwrap_err().peak, least);
    }
}

#[test]
fn settled_packs_stay() {
    let (a, batches) = (architecture(), Plain { rows: 4096 });
    let settled = Demand { pack_rows: Some(256), ..demand(&a, &batches) };
    let (most, least) = (plan(&settled, u64::MAX).unwrap(), plan(&settled, 0).unwrap_err());
    assert_eq!((most.pack_rows, least.pack_rows), (256, 256));
}

#[test]
fn blocks_below_the_lowest_adapted_one_keep_nothing() {
    let (a, batches) = (architecture(), Plain { rows: 4096 });
    let mut upper = demand(&a, &batches);
    upper.adapter.first = 6;
    let plan = plan(&upper, u64::MAX).unwrap();
    assert_eq!(plan.kept_layers, 2);
    assert_eq!(get(&plan, "layer inputs"), 2 * 2048 * 512 * 4);
}
