//! The plan as a table, with what the run will hold in memory.

use crate::{
    plan::{Inputs, Plan},
    train::PACK_ROWS,
};
use kto_cli::{Exit, Result, output::Output};
use kto_model::lora::Lora;

/// Prints the plan to standard output.
pub fn print(plan: &Plan, inputs: &Inputs, lora: &Lora) -> Result<Exit> {
    let mut out = Output::create(None)?;
    let mut line = |name: &str, value: String| out.write(format!("{name:<36}{value}\n").as_bytes());
    let a = inputs.architecture;
    line(
        "model",
        format!("{}, {} blocks, hidden {}, vocabulary {}", a.family, a.layers, a.hidden, a.vocab_size),
    )?;
    line("parameters", format!("{}, of them trained {}", a.parameters(), lora.parameters()))?;
    let modules: Vec<&str> = plan.target_modules.iter().map(String::as_str).collect();
    line(
        "adapter",
        format!(
            "rank {}, alpha {}, dropout {}, {}",
            plan.lora_r,
            plan.lora_alpha,
            plan.lora_dropout,
            modules.join(" ")
        ),
    )?;
    line(
        "start and reference",
        format!(
            "{} adapter, reference {}",
            if inputs.adapter.is_some() { "given" } else { "fresh" },
            plan.reference
        ),
    )?;
    line(
        "order",
        format!("preset {}, seed {}, rows cut at {} tokens", plan.preset, plan.seed, plan.max_length),
    )?;
    line("rows", format!("{} in {} steps an epoch", plan.rows, plan.steps_per_epoch))?;
    line("steps", format!("{} of {} rows, KL over {}", plan.total_steps, plan.batch, plan.micro_batch))?;
    line(
        "loss",
        format!(
            "{}, beta {}, weights {} and {}",
            plan.loss, plan.beta, plan.desirable_weight, plan.undesirable_weight
        ),
    )?;
    line("learning rate", format!("{} {}, warm-up {} steps", plan.lr, plan.schedule, plan.warmup_steps))?;
    let mut total = 0.0;
    for (name, bytes) in memory(plan, inputs, lora) {
        total += bytes;
        line(&format!("memory: {name}"), mebibytes(bytes))?;
    }
    line("memory: all (estimate)", mebibytes(total))?;
    out.finish()?;
    Ok(Exit::Ok)
}

/// Bytes of each large item, f32. An estimate of the peak from sizes alone.
fn memory(plan: &Plan, inputs: &Inputs, lora: &Lora) -> Vec<(&'static str, f64)> {
    let a = inputs.architecture;
    let longest =
        inputs.tokens.rows().map(|r| r.prompt_ids.len() + r.completion_ids.len()).max().unwrap_or(0);
    let longest = longest.min(plan.max_length) as f64;
    let tokens: usize = inputs
        .tokens
        .rows()
        .map(|r| (r.prompt_ids.len() + r.completion_ids.len()).min(plan.max_length))
        .sum();
    let batch_rows = (tokens as f64 / plan.rows as f64 * plan.batch as f64 * 1.5).max(longest);
    let pack = (PACK_ROWS as f64).max(longest * 2.0).min(batch_rows);
    let heads = (a.shape.heads + 2 * a.shape.kv_heads) as f64 * a.shape.dim as f64;
    vec![
        ("weights", 4.0 * a.parameters() as f64),
        ("adapter, gradient, optimizer", 16.0 * lora.parameters() as f64),
        ("layer inputs", 4.0 * batch_rows * a.hidden as f64 * (a.layers + 1) as f64),
        (
            "one block's activations",
            4.0 * pack * (8.0 * a.hidden as f64 + 3.0 * heads + 6.0 * a.intermediate as f64),
        ),
        (
            "logits buffer",
            4.0 * 1024.0f64.min((1u64 << 23) as f64 / a.vocab_size as f64).max(16.0) * a.vocab_size as f64,
        ),
    ]
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / 1_048_576.0)
}
