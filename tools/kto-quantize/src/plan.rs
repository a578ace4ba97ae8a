//! What to do with every tensor, decided and checked before anything is written.

use crate::{Args, args::FormName, choice::Choice};
use kto_cli::{Context, Error, Result, Ui, escape};
use kto_formats::{
    bnb, companions,
    model_dir::{ModelDir, refuse_output},
    tensors::TensorView,
};
use kto_hub::Need;
use kto_model::architecture::Architecture;
use kto_weights::{
    Content, Form, Item, MAX_SHARD, Values, Weight,
    roles::{Role, role},
    weights,
};
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

/// The job, with every default filled in.
pub struct Plan {
    /// The source.
    pub model: ModelDir,
    /// What config.json says of it.
    pub architecture: Architecture,
    /// The directory or file to make.
    pub output: PathBuf,
    /// Whether an existing output is replaced.
    pub force: bool,
    /// Largest file of weights, in bytes.
    pub max_shard: u64,
    /// What is made.
    pub job: Job,
    /// What becomes of each weight, by name; `None` for tensors without floats, which are copied.
    pub forms: BTreeMap<String, Option<Form>>,
    /// The weights that change their form.
    pub changed: BTreeSet<String>,
    /// Full names of linear layers that stay as they are because the user said so, sorted.
    pub skipped: Vec<String>,
}

/// What is made.
pub enum Job {
    /// A quantized directory.
    Quantize(FormName, Choice),
    /// A directory of floats, all of this dtype if there is one.
    Dequantize(Option<Dtype>),
}

impl Plan {
    /// Opens the model and decides. Errors: as [`open`] has them; 2 for names that match nothing.
    pub fn new(args: &Args, ui: &Ui) -> Result<Self> {
        let (model, architecture) = open(args, ui)?;
        let job = if args.dequantize {
            Job::Dequantize(args.dtype.map(Dtype::from))
        } else {
            Job::Quantize(args.form(), Choice::new(args, architecture.layers)?)
        };
        let mut plan = Self {
            output: args.output.clone(),
            force: args.force,
            max_shard: args.max_shard_size.unwrap_or(MAX_SHARD),
            job,
            forms: BTreeMap::new(),
            changed: BTreeSet::new(),
            skipped: Vec::new(),
            model,
            architecture,
        };
        plan.decide(ui)?;
        Ok(plan)
    }

    fn decide(&mut self, ui: &Ui) -> Result<()> {
        let names: Vec<String> = weights(&self.model).map(str::to_string).collect();
        // Said when nothing is refused any more.
        let mut unfit = Vec::new();
        for name in names {
            let Some(weight) = Weight::find(&self.model, &name)? else {
                self.forms.insert(name, None);
                continue;
            };
            let kept = Form::Float(weight.dtype);
            let form = match &self.job {
                Job::Dequantize(dtype) => Form::Float(dtype.unwrap_or(weight.dtype)),
                Job::Quantize(_, choice) => {
                    let module = name.strip_suffix(".weight").unwrap_or(&name);
                    let role = role(module).filter(|_| name.ends_with(".weight"));
                    let wanted = role.and_then(|role| choice.form(module, role, weight.dtype));
                    match wanted.map(|form| (form, form.unfit(&weight.shape))) {
                        Some((_, Some(why))) => {
                            unfit.push((escape(&name), why));
                            kept
                        }
                        Some((form, None)) => form,
                        None => {
                            if matches!(role, Some(Role::Linear(_))) {
                                self.skipped.push(module.to_string());
                            }
                            kept
                        }
                    }
                }
            };
            if form != kept || weight.quantized {
                self.changed.insert(name.clone());
            }
            self.forms.insert(name, Some(form));
        }
        if let Job::Quantize(_, choice) = &self.job {
            choice.check_used()?;
            if self.changed.is_empty() {
                return Err(match unfit.first() {
                    Some((name, why)) => {
                        let text = format!("no layer fits the form; of \"{name}\" {why}");
                        Error::usage(text).with_hint("a smaller --group-size, or another --form")
                    }
                    None => Error::usage("--skip leaves no layer to quantize"),
                });
            }
        } else if self.changed.is_empty() {
            return Err(Error::data(format!(
                "{}: not quantized, and of that dtype already",
                place(&self.model)
            )));
        }
        unfit.iter().for_each(|(name, why)| ui.warn(format_args!("\"{name}\" stays as it is: {why}")));
        Ok(())
    }

    /// Returns the tensors of the result, sorted by name.
    pub fn items(&self) -> Result<Vec<Item<'_>>> {
        let mut items = Vec::new();
        for (name, form) in &self.forms {
            let place = self.model.tensors.place_of(name);
            let (shape, content) = match (form, Weight::find(&self.model, name)?) {
                (Some(form), Some(weight)) => {
                    let shape = weight.shape.clone();
                    (shape, Content::Encoded { form: *form, values: Box::new(weight), keep: None })
                }
                _ => {
                    let view = self.model.tensors.require(name)?;
                    check_whole(&view).at(escape(&self.model.path.display().to_string()))?;
                    (view.shape.to_vec(), Content::Copy(vec![view], &self.model.tensors))
                }
            };
            items.push(Item { name: name.clone(), shape, content, place });
        }
        Ok(items)
    }

    /// Returns the number of values whose form changes.
    pub fn values(&self) -> Result<u64> {
        let of = |name: &String| Ok(Weight::find(&self.model, name)?.map_or(0, |w| w.len() as u64));
        self.changed.iter().map(of).sum()
    }

    /// Returns a text that tells everything the result depends on, for a later run.
    pub fn identity(&self) -> String {
        let forms: Vec<String> = self.forms.iter().map(|(name, form)| format!("{name} {form:?}")).collect();
        format!(
            "kto-quantize {} of {}\nfiles of {} bytes\n{}\n",
            env!("CARGO_PKG_VERSION"),
            kto_weights::source(&self.model),
            self.max_shard,
            forms.join("\n")
        )
    }
}

/// Refuses (65) codes whose scales are missing: copied, they would be taken for numbers.
fn check_whole(view: &TensorView) -> Result<()> {
    let is_float = matches!(view.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
    if is_float || !view.name.ends_with(".weight") {
        return Ok(());
    }
    Err(Error::data(format!("\"{}\" is {} without its scales", escape(view.name), view.dtype)))
}

/// Refuses (65) scales whose codes are missing.
fn check_scales(model: &ModelDir) -> Result<()> {
    for view in model.tensors.views() {
        let owner = [".SCB", ".scales", ".weight.absmax"].iter().find_map(|end| view.name.strip_suffix(end));
        if owner.is_some_and(|owner| model.tensors.require(&format!("{owner}.weight")).is_err()) {
            return Err(Error::data(format!("\"{}\" scales a weight that is missing", escape(view.name))));
        }
    }
    Ok(())
}

/// Opens the source. Errors (65): a model that kto-train would refuse, with the same line; one that is quantized and shall be quantized, or
/// whose quantization lacks a part; a matrix of a block that no family has.
pub fn open(args: &Args, ui: &Ui) -> Result<(ModelDir, Architecture)> {
    let model = ModelDir::open(&kto_hub::locate(&args.model, &Need::Weights(|_| Ok(())), ui)?)?;
    refuse_output(&args.output, &model.path)?;
    if !args.dequantize {
        refuse_quantized(&model)?;
    }
    let shown = || escape(&args.model.display().to_string());
    check_scales(&model).at(shown())?;
    let architecture = Architecture::from_config(&model.config).at(shown())?;
    kto_model::weights::check(&architecture, &model).at(shown())?;
    if !args.dequantize {
        check_matrices(&model, &architecture)?;
    }
    model.notes.iter().for_each(|note| ui.warn(note));
    companions::doubts(&model.path).iter().for_each(|doubt| ui.warn(doubt));
    Ok((model, architecture))
}

fn refuse_quantized(model: &ModelDir) -> Result<()> {
    let method = model.config.get("quantization_config").and_then(|q| q.get("quant_method"));
    let hint = "kto-quantize --dequantize first";
    if let Some(method) = method.filter(|m| !m.is_null()) {
        let text = format!("{}: already quantized ({})", place(model), escape(&method.to_string()));
        return Err(Error::data(text).with_hint(hint));
    }
    if bnb::is_quantized(&model.tensors) || model.config.get("quantization").is_some_and(|q| !q.is_null()) {
        return Err(Error::data(format!("{}: already quantized", place(model))).with_hint(hint));
    }
    Ok(())
}

fn place(model: &ModelDir) -> String {
    escape(&model.path.display().to_string())
}

/// Refuses (65) what is beyond the layers of the family: a matrix in a block that is none of them, for which of such other programs would
/// quantize is not guessed; a layer that is no float.
fn check_matrices(model: &ModelDir, architecture: &Architecture) -> Result<()> {
    let layers: BTreeSet<String> = (0..architecture.layers)
        .flat_map(|block| architecture.modules().iter().map(move |m| format!("{}.weight", m.path(block))))
        .collect();
    for view in model.tensors.views() {
        let place = || model.tensors.place_of(view.name);
        if layers.contains(view.name) {
            view.read_f32(0, &mut []).at(place())?;
        } else if view.name.starts_with("model.layers.") && view.shape.len() > 1 {
            let text = format!(
                "tensor \"{}\" of shape {:?} is no layer of a decoder of the family \"{}\"",
                escape(view.name),
                view.shape,
                architecture.family
            );
            return Err(Error::data(text)).at(place());
        }
    }
    Ok(())
}
