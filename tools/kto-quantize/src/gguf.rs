//! `--form gguf`: one file for llama.cpp instead of a directory.

use crate::{
    args::{Args, GgufType, Treatment},
    config,
    plan::open,
};
use kto_cli::{
    Error, Exit, Kind, Record, Result, Ui,
    atomic::{self, AtomicFile},
    disk, escape,
    output::{Output, print_path},
    units,
};
use kto_formats::model_dir::ModelDir;
use kto_weights::{
    Form, Values, Weight,
    gguf::{self, FileType, Gguf},
    roles::{Role, matches, role},
    weights,
};
use safetensors::Dtype;
use std::cell::RefCell;

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

/// Runs the tool.
pub fn run(args: &Args, ui: &Ui) -> Result<Exit> {
    let (model, _) = open(args, ui)?;
    let all = shapes(&model)?;
    let wishes = Wishes::new(args)?;
    let file = FileType::from(args.r#type.unwrap_or(GgufType::Q4KM));
    let wish = |name: &str| wishes.of(name, &all);
    // What is refused is refused before anything is said.
    all.iter().try_for_each(|(name, ..)| wish(name).map(|_| ()))?;
    wishes.check_used()?;
    let gguf = Gguf::new(&model, &all, file, &wish, ui)?;
    if args.dry_run {
        let mut out = Output::create(None)?;
        out.write(describe(args, &model, &gguf).as_bytes())?;
        out.finish()?;
        return Ok(Exit::Ok);
    }
    let mut record = Record::new(&args.common);
    record.output(Some(&args.output));
    record.side(args.report.as_deref());
    record.model(&model.path, || model.fingerprint());
    record.check()?;
    let if_changed = args.common.make.if_changed;
    if args.output.exists() && !args.force && !if_changed {
        let text = format!("{}: already exists", escape(&args.output.display().to_string()));
        return Err(Error::new(Kind::CantCreate, text).with_hint("--force replaces it"));
    }
    disk::require_free(&args.output, gguf.size())?;
    write(args, &model, &gguf, ui).map_err(|error| atomic::stopped(error, &args.output))?;
    record.finish()?;
    ui.note(format_args!("{} tensors, {} MB", gguf.tensors.len(), gguf.size().div_ceil(1_000_000)));
    print_path(&args.output)?;
    Ok(Exit::Ok)
}

fn write(args: &Args, model: &ModelDir, gguf: &Gguf, ui: &Ui) -> Result<()> {
    let values = |name: &str| -> Result<(Box<dyn Values + '_>, String)> {
        let name = model.tensors.require(name)?.name;
        let weight = Weight::find(model, name)?.ok_or_else(|| Error::internal("no floats"))?;
        let place = weight.place();
        Ok((Box::new(weight), place))
    };
    let if_changed = args.common.make.if_changed;
    let file = AtomicFile::create(&args.output)?.if_changed(if_changed).keep_other(if_changed && !args.force);
    let mut report = args.report.as_ref().map(|path| Output::create(Some(path))).transpose()?;
    match &mut report {
        None => gguf.write(&file, ui, &values, None)?,
        Some(report) => gguf.write(
            &file,
            ui,
            &values,
            Some(&mut |tensor, errors| {
                report
                    .write(config::report_line(&tensor.weight, &tensor.shape, tensor.form, errors).as_bytes())
            }),
        )?,
    }
    model.tensors.check_unchanged()?;
    file.commit()?;
    report.map_or(Ok(()), Output::finish)
}

/// Names, shapes and dtypes of all weights. Error 65: a tensor without floats.
fn shapes(model: &ModelDir) -> Result<Vec<(String, Vec<usize>, Dtype)>> {
    let of = |name: &str| match Weight::find(model, model.tensors.require(name)?.name)? {
        Some(weight) => Ok((name.to_string(), weight.shape, weight.dtype)),
        None => Err(Error::data(format!(
            "{}: tensor \"{}\" holds no floats",
            model.tensors.place_of(name),
            escape(name)
        ))),
    };
    weights(model).map(of).collect()
}

/// What was asked of single modules.
struct Wishes<'a> {
    args: &'a Args,
    /// Name and form of `--override`, in order.
    overrides: Vec<(String, Form)>,
    used: RefCell<Vec<bool>>,
}

impl<'a> Wishes<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        let parse = |text: &String| {
            let parsed =
                text.split_once('=').and_then(|(name, kind)| Some((name.to_string(), gguf::parse(kind)?)));
            parsed.ok_or_else(|| {
                let known = "F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_0";
                Error::usage(format!("--override {}: must be NAME=TYPE, types: {known}", escape(text)))
            })
        };
        let overrides: Vec<_> = args.overrides.iter().map(parse).collect::<Result<_>>()?;
        let used = RefCell::new(vec![false; args.skip.len() + overrides.len()]);
        Ok(Self { args, overrides, used })
    }

    /// The form that was asked for a weight.
    fn of(&self, name: &str, all: &[(String, Vec<usize>, Dtype)]) -> Result<Option<Form>> {
        let Some(module) = name.strip_suffix(".weight").filter(|module| role(module).is_some()) else {
            return Ok(None);
        };
        let stored = || all.iter().find(|(n, ..)| n == name).map(|(_, _, dtype)| Form::Float(*dtype));
        if let Some(i) = self.args.skip.iter().position(|skip| !skip.is_empty() && matches(module, skip)) {
            self.used.borrow_mut()[i] = true;
            return Ok(stored());
        }
        let mut wish = None;
        for (i, (name, form)) in self.overrides.iter().enumerate() {
            if matches(module, name) {
                self.used.borrow_mut()[self.args.skip.len() + i] = true;
                wish = Some(*form);
            }
        }
        let treatment = match role(module) {
            Some(Role::Embedding) => self.args.embeddings,
            Some(Role::Head) => self.args.head,
            _ => None,
        };
        Ok(wish.or_else(|| stored().filter(|_| treatment == Some(Treatment::Keep))))
    }

    fn check_used(&self) -> Result<()> {
        let names = self.args.skip.iter().map(|n| ("--skip", n));
        let names = names.chain(self.overrides.iter().map(|(n, _)| ("--override", n)));
        let used = self.used.borrow();
        let mut unused =
            names.zip(&*used).filter(|((_, name), used)| !**used && !name.is_empty() && *name != "lm_head");
        match unused.next() {
            Some(((flag, name), _)) => {
                Err(Error::usage(format!("{flag} {}: no linear layer has this name", escape(name))))
            }
            None => Ok(()),
        }
    }
}

fn describe(args: &Args, model: &ModelDir, gguf: &Gguf) -> String {
    let mut text = format!(
        "model {}\noutput {}\n",
        escape(&model.path.display().to_string()),
        escape(&args.output.display().to_string())
    );
    if let Some(report) = &args.report {
        text += &format!("report {}\n", escape(&report.display().to_string()));
    }
    let mut counts = std::collections::BTreeMap::new();
    for tensor in &gguf.tensors {
        *counts.entry(gguf::label(tensor.form)).or_insert(0) += 1;
    }
    for (label, count) in counts {
        text += &format!("{count} tensors {label}\n");
    }
    let before: u64 = model.tensors.views().map(|v| v.data.len() as u64).sum();
    text += &units::sizes(before, gguf.size(), true);
    text
}
