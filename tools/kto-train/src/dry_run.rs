//! The plan as a table, with what the run will hold in memory.

use crate::{
    memory::Fit,
    plan::{Inputs, Plan},
};
use kto_cli::{Result, output::Output, units};
use std::collections::BTreeMap;

/// Returns the tensors that are trained whole and their shapes, those of all blocks together, with their numbers.
fn whole(plan: &Plan) -> BTreeMap<(String, &[usize]), usize> {
    let mut all = BTreeMap::new();
    for (name, shape) in &plan.typed.whole {
        let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
        *all.entry((parts.collect::<Vec<_>>().join("."), &shape[..])).or_default() += 1;
    }
    all
}

/// Prints the plan to standard output.
pub fn print(plan: &Plan, inputs: &Inputs, fit: &Fit) -> Result<()> {
    let mut out = Output::create(None)?;
    let mut line = |name: &str, value: String| out.write(format!("{name:<43} {value}\n").as_bytes());
    let a = inputs.architecture;
    line(
        "model",
        format!("{}, {} blocks, hidden {}, vocabulary {}", a.family, a.layers, a.hidden, a.vocab_size),
    )?;
    line("parameters", format!("{}, of them trained {}", a.parameters(), fit.adapter.parameters))?;
    let kinds = [(plan.use_dora, "DoRA, "), (plan.use_rslora, "rank-stabilised, ")];
    let kinds: String = kinds.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
    let Plan { lora_r, lora_alpha, lora_dropout, ref target_modules, .. } = *plan;
    line(
        "adapter",
        format!("{kinds}rank {lora_r}, alpha {lora_alpha}, dropout {lora_dropout}, {target_modules}"),
    )?;
    for (field, value) in &plan.typed.adapter.kept {
        line(&format!("adapter: {field}"), value.to_string())?;
    }
    for ((name, shape), count) in whole(plan) {
        let count = if count > 1 { format!("{count} of ") } else { String::new() };
        line(&format!("whole: {name}"), format!("{count}{shape:?}"))?;
    }
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
    line(
        "optimizer",
        format!(
            "{}, betas {} and {}, epsilon {}, weight decay {}, gradient norm {}",
            plan.optimizer,
            plan.adam_beta1,
            plan.adam_beta2,
            plan.adam_epsilon,
            plan.weight_decay,
            plan.max_grad_norm
        ),
    )?;
    if let (Some(held_out), Some(every)) = (inputs.held_out, plan.eval_every) {
        line("evaluation", format!("{} rows every {every} steps", held_out.tokens.len()))?;
    }
    line("compute", plan.compute.clone())?;
    if let Some((items, peak, limit)) = fit.on_gpu() {
        for item in items {
            line(&format!("GPU: {}", item.name), units::size(item.bytes))?;
        }
        line("GPU: predicted peak", units::size(peak))?;
        line("GPU: limit", limit.to_string())?;
    }
    for item in &fit.plan.items {
        line(&format!("memory: {}", item.name), units::size(item.bytes))?;
    }
    line("memory: predicted peak", units::size(fit.plan.peak))?;
    line("memory: limit", fit.limit.to_string())?;
    line("memory: choice", fit.choices())?;
    out.finish()
}
