//! The result is a model: a directory, or a GGUF file.

use crate::{
    args::{Args, FormName, GgufType},
    inputs::{self, Inputs},
    keep,
    plan::Plan,
    verify::Verify,
};
use kto_cli::{
    Error, Exit, Kind, Record, Result, Ui, atomic, disk, escape,
    output::{Output, print_path},
    units,
};
use kto_formats::{adapter, companions, model_dir::MERGED_FROM, python_json};
use kto_weights::{
    Layout, Values, Weight,
    gguf::{FileType, Gguf},
};
use std::{collections::BTreeSet, path::Path, sync::atomic::Ordering};

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
    let plan = Plan::new(args, Inputs::open(args, inputs::needed_base(args, ui)?, ui)?)?;
    if let Some(first) = plan.unfit.first() {
        let more = match plan.unfit.len() {
            1 => "stays".to_string(),
            n => format!("and {} others stay", n - 1),
        };
        ui.warn(format_args!(
            "\"{}\" {more} floats: the columns are no multiple of MLX's group of 64",
            escape(first)
        ));
    }
    if plan.from_fp4 {
        ui.warn("layers of the base are fp4: they are quantized anew, as nf4");
    }
    let verify = args.verify.then(|| Verify::new(args, &plan.inputs)).transpose()?;
    if args.dry_run {
        let mut out = Output::create(None)?;
        out.write(describe(args, &plan, ui)?.as_bytes())?;
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
        let directory = kto_weights::resume(&args.output, args.force, if_changed, &identity, ui)?;
        record.begin(&directory);
        let layout = Layout::plan(plan.items(args)?, args.max_shard_size())?;
        let bytes = layout.bytes();
        let room = layout.room(&directory, &plan.metadata())? + companions::bytes(&base.path);
        disk::require_free(&args.output, room)?;
        let written = layout.write(&directory, &plan.metadata(), ui, None);
        if let Err(error) = written.and_then(|()| base.tensors.check_unchanged()) {
            // What is wrong with the input will be wrong the next time.
            if matches!(error.kind(), Kind::Data | Kind::Internal) {
                directory.keep(false);
            }
            return Err(hinted(error, args));
        }
        if let Some(verify) = &verify
            && let Err(error) = verify.run(&base.path, directory.path(), plan.config(), ui)
        {
            directory.keep(error.kind() != Kind::Data);
            return Err(error);
        }
        let copied = companions::copy(&base.path, directory.path())?;
        let config = python_json::pretty_sorted(&plan.config()) + "\n";
        atomic::write(&directory.path().join("config.json"), config.as_bytes())?;
        let resumed = directory.resumed();
        record.commit(directory, &args.output)?;
        if !resumed {
            warn_if_equal(&plan, ui);
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
    print_path(&args.output)?;
    Ok(Exit::Ok)
}

fn warn_if_equal(plan: &Plan, ui: &Ui) {
    if plan.different.load(Ordering::Relaxed) == 0 {
        ui.warn("the result equals the base: the change is smaller than the rounding");
    }
}

/// A value that is too large for its form is too large for a dtype that the user can choose.
fn hinted(error: Error, args: &Args) -> Error {
    let large = error.kind() == Kind::Data && error.to_string().contains("too large for the form");
    if large && args.form.is_none() { error.with_hint("--dtype bf16 or --dtype f32") } else { error }
}

/// The GGUF file that the result becomes.
fn gguf_file(args: &Args, plan: &Plan, ui: &Ui) -> Result<Gguf> {
    let base = &plan.inputs.base;
    let mut all = Vec::new();
    for name in plan.targets.keys() {
        let source = plan.inputs.stored(name);
        let weight = Weight::find(base, base.tensors.require(source)?.name)?;
        let weight = weight.ok_or_else(|| {
            let place = base.tensors.place_of(source);
            Error::data(format!("{place}: tensor \"{}\" holds no floats", escape(name)))
        })?;
        all.push((name.clone(), weight.shape, weight.dtype));
    }
    let file = FileType::from(args.r#type.unwrap_or(GgufType::Q4KM));
    let mut gguf = Gguf::new(base, &all, file, &|_| Ok(None), ui)?;
    if let Some(list) = plan.inputs.metadata.get(MERGED_FROM) {
        gguf.merged(list);
    }
    Ok(gguf)
}

fn gguf(args: &Args, plan: &Plan, ui: &Ui) -> Result<()> {
    let gguf = gguf_file(args, plan, ui)?;
    let if_changed = args.common.make.if_changed;
    if args.output.exists() && !args.force && !if_changed {
        let text = format!("{}: already exists", escape(&args.output.display().to_string()));
        return Err(Error::new(Kind::CantCreate, text).with_hint("--force replaces it"));
    }
    disk::require_free(&args.output, gguf.size())?;
    let file = atomic::AtomicFile::create(&args.output)?;
    let file = file.if_changed(if_changed).keep_other(if_changed && !args.force);
    let base = &plan.inputs.base;
    let values = |name: &str| -> Result<(Box<dyn Values + '_>, String)> {
        let source = plan.inputs.stored(name);
        let (values, place) = (plan.values(args, name)?, base.tensors.place_of(source));
        Ok(match Weight::find(base, base.tensors.require(source)?.name)? {
            Some(stored) if plan.changed.contains(name) => {
                (Box::new(keep::counted(values, stored, &plan.different)), place)
            }
            _ => (values, place),
        })
    };
    gguf.write(&file, ui, &values, None)?;
    base.tensors.check_unchanged()?;
    file.commit()?;
    warn_if_equal(plan, ui);
    let (merged, all, size) = (plan.changed.len(), plan.targets.len(), gguf.size());
    ui.note(format_args!("{merged} of {all} tensors merged, {} MB", size.div_ceil(1_000_000)));
    Ok(())
}

/// The plan for --dry-run.
fn describe(args: &Args, plan: &Plan, ui: &Ui) -> Result<String> {
    let base = &plan.inputs.base;
    let path = |path: &Path| escape(&path.display().to_string());
    let mut text = format!("base {}\noutput {}\n", path(&base.path), path(&args.output));
    for ((adapter, weight), from) in plan.inputs.adapters.iter().zip(&plan.inputs.weights).zip(&args.adapters)
    {
        let scales: BTreeSet<String> = adapter.modules.values().map(|m| m.scale.to_string()).collect();
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
    let before = base.tensors.views().map(|view| view.data.len() as u64).sum();
    let (after, exact) = match args.form {
        Some(FormName::Gguf) => (gguf_file(args, plan, ui)?.size(), true),
        _ => plan.bytes()?,
    };
    text += &units::sizes(before, after, exact);
    Ok(text)
}
