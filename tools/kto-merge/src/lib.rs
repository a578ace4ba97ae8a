//! kto-merge: a LoRA adapter merged into its base model.
//!
//! Arguments become a [`Plan`]; one pass over the weights carries it out. Invariants: the result appears whole or not at
//! all, memory does not grow with the model, the same inputs give the same bytes on any number of threads.
//! Deliberately absent: merging into 4-bit codes (which would round the adapter away), and mixing several adapters.

#![forbid(unsafe_code)]

mod args;
mod origin;
mod plan;
mod work;

pub use args::{Args, FloatType};
pub use plan::Plan;

use kto_cli::{
    Error, Exit, Record, Result, Ui, atomic, disk, escape,
    output::{Output, print_path},
    signal,
};
use kto_formats::{adapter, companions, python_json, shards::Shards};

/// Room that is left for tokenizer and other small files, in bytes.
const COMPANIONS: u64 = 64 << 20;

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    signal::install();
    let threads = args.threads.map_or(0, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(Error::threads)?.install(|| merge(&args, ui))
}

fn merge(args: &Args, ui: &Ui) -> Result<Exit> {
    let plan = Plan::new(args, ui)?;
    let shards = Shards::plan(plan.tensors.iter().map(|t| vec![t.clone()]).collect(), plan.max_shard);
    if args.dry_run {
        let mut out = Output::create(None)?;
        out.write(describe(&plan, &shards).as_bytes())?;
        out.finish()?;
        return Ok(Exit::Ok);
    }
    let mut record = Record::new(&args.common);
    record.output(Some(&plan.output));
    record.model(&plan.base.path, || plan.base.fingerprint());
    record.directory(&adapter::directory(&args.adapter));
    record.check()?;
    let if_changed = args.common.make.if_changed;
    let directory = atomic::AtomicDir::create_if_changed(&plan.output, plan.force, if_changed)?;
    disk::require_free(&plan.output, shards.bytes() + COMPANIONS)?;
    work::write(&plan, &shards, directory.path(), ui)?;
    let copied = companions::copy(&plan.base.path, directory.path())?;
    let config = python_json::pretty_sorted(&plan.config()) + "\n";
    atomic::write(&directory.path().join("config.json"), config.as_bytes())?;
    record.commit(directory, &plan.output)?;
    ui.note(format_args!(
        "{} of {} tensors merged, {} dequantized, {} MB; copied {}",
        plan.adapter.tensors.len(),
        plan.tensors.len(),
        plan.dequantized,
        shards.bytes().div_ceil(1_000_000),
        if copied.is_empty() { "nothing else".into() } else { escape(&copied.join(", ")) }
    ));
    print_path(&plan.output)?;
    Ok(Exit::Ok)
}

/// The plan for --dry-run.
fn describe(plan: &Plan, shards: &Shards) -> String {
    format!(
        "base {}\noutput {}\nmerge {} modules, rank {}, scale {}\ntensors {}, of them dequantized {}\nbytes {} in {} files\n",
        escape(&plan.base.path.display().to_string()),
        escape(&plan.output.display().to_string()),
        plan.adapter.tensors.len(),
        plan.adapter.config.r,
        plan.adapter.config.scale(),
        plan.tensors.len(),
        plan.dequantized,
        shards.bytes(),
        shards.count()
    )
}
