//! kto-quantize: a model directory in 4 bits, in the form of transformers and bitsandbytes.
//!
//! Arguments become a [`Plan`]; two passes over the weights carry it out. Invariants: the result appears whole or not
//! at all, memory does not grow with the model, the same input gives the same bytes on any number of threads.
//! Deliberately absent: calibration, other quantization methods, and any change to what is not a linear layer.

#![forbid(unsafe_code)]

mod args;
mod plan;
mod work;

pub use args::Args;
pub use plan::Plan;

use kto_cli::{
    Error, Exit, Record, Result, Ui, atomic, disk, escape,
    output::{Output, print_path},
    signal,
};
use kto_formats::{companions, python_json};

/// Room that is left for tokenizer and other small files, in bytes.
const COMPANIONS: u64 = 64 << 20;

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    signal::install();
    let threads = args.threads.map_or(0, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(Error::threads)?.install(|| quantize(&args, ui))
}

fn quantize(args: &Args, ui: &Ui) -> Result<Exit> {
    let plan = Plan::new(args, ui)?;
    if args.dry_run {
        let mut out = Output::create(None)?;
        out.write(describe(&plan).as_bytes())?;
        out.finish()?;
        return Ok(Exit::Ok);
    }
    let mut record = Record::new(&args.common);
    record.output(Some(&plan.output));
    record.model(&plan.model.path, || plan.model.fingerprint());
    record.check()?;
    let if_changed = args.common.make.if_changed;
    let directory = atomic::AtomicDir::create_if_changed(&plan.output, plan.force, if_changed)?;
    let measured = work::measure(&plan, ui)?;
    disk::require_free(&plan.output, measured.shards.bytes() + COMPANIONS)?;
    measured.write(directory.path(), ui)?;
    let copied = companions::copy(&plan.model.path, directory.path())?;
    let config = python_json::pretty_sorted(&plan.config()) + "\n";
    atomic::write(&directory.path().join("config.json"), config.as_bytes())?;
    record.commit(directory, &plan.output)?;
    ui.note(format_args!(
        "{} layers quantized, {} tensors as they were, {} MB; copied {}",
        plan.quantize.len(),
        plan.copy.len(),
        measured.shards.bytes().div_ceil(1_000_000),
        if copied.is_empty() { "nothing else".into() } else { escape(&copied.join(", ")) }
    ));
    print_path(&plan.output)?;
    Ok(Exit::Ok)
}

/// The plan for --dry-run.
fn describe(plan: &Plan) -> String {
    let skipped = plan.skipped.as_ref().map_or("none".into(), |s| escape(&s.join(" ")));
    format!(
        "model {}\noutput {}\nquantize {} linear layers, {} values\nkeep {} tensors\nskipped {}\ndouble quantization {}\n",
        escape(&plan.model.path.display().to_string()),
        escape(&plan.output.display().to_string()),
        plan.quantize.len(),
        plan.values(),
        plan.copy.len(),
        skipped,
        if plan.double_quant { "yes" } else { "no" }
    )
}
