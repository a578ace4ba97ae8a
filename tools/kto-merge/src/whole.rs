//! The result is a model: a directory, or a GGUF file.

use crate::{
    args::{Args, FormName, GgufType},
    inputs::Inputs,
    plan::{Plan, Target},
    verify::Verify,
};
use kto_cli::{
    Error, Exit, Kind, Record, Result, Ui, atomic, disk, escape,
    output::{Output, print_path},
    units,
};
use kto_formats::{adapter, companions, python_json};
use kto_weights::{
    Form, Layout, Weight,
    gguf::{FileType, Gguf},
};
use std::sync::atomic::Ordering;

/// Room that is left for tokenizer and other small files, in bytes.
const COMPANIONS: u64 = 64 << 20;

impl From<GgufType> for FileType {
    fn from(value: GgufType) -> Self {
        match value {
            GgufType::F32 => Self::F32,
            GgufType::F16 => Self::F16,
            GgufType::Bf16 => Self::Bf16,
            GgufType::Q8_0 => Self::Q8_0,
            GgufType::Q6K => Self::Q6K,
            GgufType::Q5KM => Self::Q5KM,
            GgufType::Q4KM => Self::Q4KM,
            GgufType::Q4_0 => Self::Q4_0,
        }
    }
}

/// Merges.
pub fn merge(args: &Args, ui: &Ui) -> Result<Exit> {
    if let Some(rank) = args.rank {
        return Err(Error::usage(format!("--rank {rank} needs --to or --extract")));
    }
    let plan = Plan::new(args, Inputs::open(args, ui)?)?;
    let verify = args.verify.then(|| Verify::new(args, &plan.inputs)).transpose()?;
    if args.dry_run {
        let mut out = Output::create(None)?;
        out.write(describe(args, &plan).as_bytes())?;
        out.finish()?;
        return Ok(Exit::Ok);
    }
    let base = &plan.inputs.base;
    let mut record = Record::new(&args.common);
    record.output(Some(&args.output));
    record.model(&base.path, || base.fingerprint());
    args.adapters.iter().for_each(|path| record.directory(&adapter::directory(path)));
    record.check()?;
    if args.form == Some(FormName::Gguf) {
        gguf(args, &plan, ui)?;
        record.finish()?;
    } else {
        let if_changed = args.common.make.if_changed;
        let identity = plan.identity(args);
        let directory = atomic::AtomicDir::resume(&args.output, args.force, if_changed, &identity)?;
        record.begin(&directory);
        let layout = Layout::plan(plan.items(args)?, args.max_shard_size)?;
        let bytes = layout.bytes();
        disk::require_free(&args.output, bytes.saturating_sub(disk::used(directory.path())) + COMPANIONS)?;
        if let Err(error) = layout.write(&directory, &plan.metadata(), ui, None) {
            // What is wrong with the input will be wrong the next time.
            if matches!(error.kind(), Kind::Data | Kind::Internal) {
                directory.keep(false);
            }
            return Err(hinted(error, args));
        }
        let copied = companions::copy(&base.path, directory.path())?;
        let config = python_json::pretty_sorted(&plan.config()) + "\n";
        atomic::write(&directory.path().join("config.json"), config.as_bytes())?;
        let resumed = directory.resumed();
        record.commit(directory, &args.output)?;
        if !resumed && plan.different.load(Ordering::Relaxed) == 0 {
            ui.warn("the result equals the base: the change is smaller than the rounding");
        }
        ui.note(format_args!(
            "{} of {} tensors merged, {} dequantized, {} MB; copied {}",
            plan.changed.len(),
            plan.targets.len(),
            plan.dequantized,
            bytes.div_ceil(1_000_000),
            if copied.is_empty() { "nothing else".into() } else { escape(&copied.join(", ")) }
        ));
    }
    if let Some(verify) = verify {
        verify.run(&base.path, &args.output, ui)?;
    }
    print_path(&args.output)?;
    Ok(Exit::Ok)
}

/// A value that is too large for its form is too large for a dtype that the user can choose.
fn hinted(error: Error, args: &Args) -> Error {
    let large = error.kind() == Kind::Data && error.to_string().contains("too large for the form");
    if large && args.form.is_none() { error.with_hint("--dtype bf16 or --dtype f32") } else { error }
}

fn gguf(args: &Args, plan: &Plan, ui: &Ui) -> Result<()> {
    let base = &plan.inputs.base;
    let mut all = Vec::new();
    for name in plan.targets.keys() {
        let weight = Weight::find(base, base.tensors.require(name)?.name)?;
        let weight = weight.ok_or_else(|| {
            Error::data(format!(
                "{}: tensor \"{}\" holds no floats",
                base.tensors.place_of(name),
                escape(name)
            ))
        })?;
        all.push((name.clone(), weight.shape, weight.dtype));
    }
    let file = FileType::from(args.r#type.unwrap_or(GgufType::Q4KM));
    let gguf = Gguf::new(base, &all, file, &|_| Ok(None), ui)?;
    if args.output.exists() && !args.force {
        let text = format!("{}: already exists", escape(&args.output.display().to_string()));
        return Err(Error::new(Kind::CantCreate, text).with_hint("--force replaces it"));
    }
    disk::require_free(&args.output, gguf.size())?;
    gguf.write(&args.output, ui, &|name| plan.values(args, name), None)?;
    let merged = plan.changed.len();
    ui.note(format_args!("{merged} of {} tensors merged, {} MB", all.len(), gguf.size().div_ceil(1_000_000)));
    Ok(())
}

/// The plan for --dry-run.
fn describe(args: &Args, plan: &Plan) -> String {
    let path = |path: &std::path::Path| escape(&path.display().to_string());
    let mut text = format!("base {}\noutput {}\n", path(&plan.inputs.base.path), path(&args.output));
    for ((adapter, weight), from) in plan.inputs.adapters.iter().zip(&plan.inputs.weights).zip(&args.adapters)
    {
        let scales: std::collections::BTreeSet<String> =
            adapter.modules.values().map(|m| m.scale.to_string()).collect();
        let scales: Vec<String> = scales.into_iter().collect();
        let dora = if adapter.modules.values().any(|m| m.magnitude.is_some()) { ", DoRA" } else { "" };
        text += &format!(
            "adapter {}: merge {} modules, rank {}, scale {}{dora}, weight {weight}, {} tensors trained whole\n",
            path(from),
            adapter.modules.len(),
            adapter.rank(),
            scales.join(" "),
            adapter.saved.len()
        );
    }
    text += &format!("tensors {}, of them dequantized {}\n", plan.targets.len(), plan.dequantized);
    if args.form != Some(FormName::Gguf) {
        let bytes = |(name, target): (&String, &Target)| {
            let tensors = &plan.inputs.base.tensors;
            let stored = tensors.get(name).and_then(|v| Weight::find(&plan.inputs.base, v.name).ok()?);
            match (target, stored) {
                (Target::Form(form), Some(weight)) => form.bytes(&weight.shape),
                (Target::Form(Form::Float(_)) | Target::Same | Target::Form(_), stored) => {
                    stored.map_or(0, |weight| weight.bytes())
                }
            }
        };
        text += &format!("size {}\n", units::size(plan.targets.iter().map(bytes).sum()));
    }
    text
}
