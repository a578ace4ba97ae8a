//! kto-quantize: a model directory in fewer bits, or back in floats.
//!
//! Arguments become a [`Plan`]; one pass over the weights carries it out. Invariants: the result appears whole or not at all, memory does
//! not grow with the model, the same input gives the same bytes on any number of threads and however often a run was killed.
//! Deliberately absent: calibration, and any change to what is not a matrix.

#![forbid(unsafe_code)]

mod args;
mod choice;
mod config;
mod from_gguf;
mod gguf;
mod memory;
mod plan;

use args::FormName;

pub use args::Args;
pub use plan::Plan;

use kto_cli::{
    Error, Exit, Kind, Record, Result, Ui, atomic, disk, escape,
    output::{Output, print_path},
    signal, units,
};
use kto_formats::{companions, gguf::is_gguf, python_json};
use kto_weights::{Content, Layout};

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    signal::install();
    let threads = args.threads.map_or(0, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(Error::threads)?.install(|| quantize(&args, ui))
}

fn quantize(args: &Args, ui: &Ui) -> Result<Exit> {
    args.check()?;
    if is_gguf(&args.model) {
        return from_gguf::run(args, ui);
    }
    if args.form() == FormName::Gguf {
        return gguf::run(args, ui);
    }
    let plan = Plan::new(args, ui)?;
    if args.dry_run {
        let mut out = Output::create(None)?;
        out.write(describe(args, &plan)?.as_bytes())?;
        out.finish()?;
        return Ok(Exit::Ok);
    }
    let mut record = Record::new(&args.common);
    record.output(Some(&plan.output));
    record.side(args.report.as_deref());
    record.model(&plan.model.path, || plan.model.fingerprint());
    record.check()?;
    make(args, &plan, &record, ui).map_err(|error| atomic::stopped(error, &plan.output))?;
    print_path(&plan.output)?;
    Ok(Exit::Ok)
}

fn make(args: &Args, plan: &Plan, record: &Record, ui: &Ui) -> Result<()> {
    let layout = Layout::plan(plan.items()?, plan.max_shard)?;
    let if_changed = args.common.make.if_changed;
    let mut job = plan.identity();
    if args.report.is_some() {
        // It measures every tensor: what another run has finished is of no use, nor this one's for another.
        job += &format!("with a report, at {:?}\n", std::time::SystemTime::now());
    }
    let directory = kto_weights::resume(&plan.output, plan.force, if_changed, &job, ui)?;
    record.begin(&directory);
    let config = python_json::pretty_sorted(&plan.config()) + "\n";
    disk::require_free(&plan.output, room(plan, &layout, &directory, &config)?)?;
    let written = write(args, plan, &layout, &directory, ui);
    if let Err(error) = written.and_then(|()| plan.model.tensors.check_unchanged()) {
        // What is wrong with the input will be wrong the next time.
        if matches!(error.kind(), Kind::Data | Kind::Internal) || args.report.is_some() {
            directory.keep(false);
        }
        return Err(error);
    }
    let copied = companions::copy(&plan.model.path, directory.path())?;
    atomic::write(&directory.path().join("config.json"), config.as_bytes())?;
    record.commit(directory, &plan.output)?;
    ui.note(format_args!(
        "{} weights {}, {} as they were, {} MB; copied {}",
        plan.changed.len(),
        if args.dequantize { "dequantized" } else { "quantized" },
        plan.forms.len() - plan.changed.len(),
        layout.bytes().div_ceil(1_000_000),
        if copied.is_empty() { "nothing else".into() } else { escape(&copied.join(", ")) }
    ));
    Ok(())
}

/// Returns the bytes that the directory lacks, but for the manifest.
fn room(plan: &Plan, layout: &Layout, directory: &atomic::AtomicDir, config: &str) -> Result<u64> {
    let weights = layout.room(directory, &plan.metadata())?;
    Ok(weights + companions::bytes(&plan.model.path) + config.len() as u64)
}

fn write(args: &Args, plan: &Plan, layout: &Layout, directory: &atomic::AtomicDir, ui: &Ui) -> Result<()> {
    let Some(path) = &args.report else {
        return layout.write(directory, &plan.metadata(), ui, None);
    };
    let mut report = Output::create(Some(path))?;
    layout.write(
        directory,
        &plan.metadata(),
        ui,
        Some(&mut |item, errors| match item.content {
            Content::Encoded { form, .. } if plan.changed.contains(&item.name) => {
                report.write(config::report_line(&item.name, &item.shape, form, errors).as_bytes())
            }
            _ => Ok(()),
        }),
    )?;
    report.finish()
}

/// The plan for --dry-run.
fn describe(args: &Args, plan: &Plan) -> Result<String> {
    let (before, after, exact) = memory::sizes(plan)?;
    let path = |path: &std::path::Path| escape(&path.display().to_string());
    let mut text = format!("model {}\noutput {}\n", path(&plan.model.path), path(&plan.output));
    text += &args.report.as_ref().map_or(String::new(), |report| format!("report {}\n", path(report)));
    text += &format!(
        "change {} of {} weights, {} values\n",
        plan.changed.len(),
        plan.forms.len(),
        plan.values()?
    );
    for (form, count) in plan.summary() {
        text += &format!("{count} weights {form}\n");
    }
    if !plan.skipped.is_empty() {
        text += &format!("skipped {}\n", escape(&plan.skipped.join(" ")));
    }
    text += &units::sizes(before, after, exact);
    text += &memory::lines(&plan.architecture, &memory::made(plan));
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;
    use kto_formats::model_dir::ModelDir;
    use std::{fs, path::Path};

    /// What is asked of the disk is what the result takes.
    #[test]
    fn the_disk_is_asked_for_what_is_written() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/demo/model");
        for more in [&[][..], &["--max-shard-size", "200kB"], &["--form", "mlx", "--max-shard-size", "200kB"]]
        {
            let top = tempfile::tempdir().unwrap();
            let out = top.path().join("out");
            let flags = ["kto-quantize", demo.to_str().unwrap(), "-o", out.to_str().unwrap()];
            let args = Args::parse_from(flags.iter().chain(more));
            let ui = Ui::silent("kto-quantize");
            let plan = Plan::new(&args, &ui).unwrap();
            let layout = Layout::plan(plan.items().unwrap(), plan.max_shard).unwrap();
            let config = python_json::pretty_sorted(&plan.config()) + "\n";
            let asked = {
                let directory = kto_weights::resume(&out, false, false, &plan.identity(), &ui).unwrap();
                room(&plan, &layout, &directory, &config).unwrap()
            };
            make(&args, &plan, &Record::new(&args.common), &ui).unwrap();
            // And the plan says what its tensors are, up to the digits of a number in a text.
            let (_, planned, exact) = memory::sizes(&plan).unwrap();
            let made: u64 = ModelDir::open(&out).unwrap().tensors.views().map(|v| v.data.len() as u64).sum();
            let texts = 24 * plan.changed.len() as u64;
            assert!(
                planned == made || !exact && planned > made && planned - made <= texts,
                "{planned} {made}"
            );
            assert_eq!(exact, more.contains(&"mlx"));
            let files = fs::read_dir(&out).unwrap().map(|e| e.unwrap());
            let files = files.filter(|e| e.file_name() != "manifest.json");
            let size: u64 = files.map(|e| e.metadata().unwrap().len()).sum();
            // Of a text that spells a number the longest is thought of.
            assert!(asked >= size && asked < size + size / 100 + 4096, "{more:?}: {asked} for {size}");
            assert!(asked + disk::MARGIN < size + (2 << 20), "{more:?}");
        }
    }
}
