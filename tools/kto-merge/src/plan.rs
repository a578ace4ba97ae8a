//! What becomes of every tensor of the base, decided and checked before anything is written.

use crate::{
    Args,
    args::FormName,
    delta,
    inputs::{HEAD, Inputs},
    keep,
};
use kto_cli::{Error, Result, escape};
use kto_formats::{
    bnb::{self, FourBitKind, Nf4Tensor, torch_name},
    mlx::{self, AffineTensor, Setting},
    model_dir::{MERGED_FROM, ModelDir},
    tensors::TensorView,
};
use kto_weights::{
    Content, Form, Held, Item, Values, Weight,
    roles::{Role, role},
    weights,
};
use safetensors::Dtype;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::AtomicU64,
};

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The same bytes.
    Same,
    /// Its values in this form.
    Form(Form),
}

/// The job, with every default filled in.
pub struct Plan {
    /// Base and adapters.
    pub inputs: Inputs,
    /// By weight.
    pub targets: BTreeMap<String, Target>,
    /// The weights that an adapter changes.
    pub changed: BTreeSet<String>,
    /// How many weights were quantized and become floats.
    pub dequantized: usize,
    /// Values that differ from the base in the file, as far as they can be compared.
    pub different: AtomicU64,
    /// Whether layers of the base are bitsandbytes' 4-bit floats, and of the result NF4.
    pub from_fp4: bool,
    /// Matrices that stay floats because their columns do not fit a quantized form.
    pub unfit: Vec<String>,
    form: Option<FormName>,
    dtype: Option<Dtype>,
    /// Whether the base is quantized in the form that is asked for, so that its settings are those of the result.
    keeps: bool,
}

impl Plan {
    /// Decides. Errors (65): a quantization of the base that is not known.
    pub fn new(args: &Args, inputs: Inputs) -> Result<Self> {
        let base = &inputs.base;
        // A head beside the embedding that the base ties it to is not used.
        let names = weights(base).filter(|name| !inputs.untied || *name != HEAD);
        let names: Vec<&str> = names.chain(inputs.untied.then_some(HEAD)).collect();
        let (mut targets, mut changed) = (BTreeMap::new(), BTreeSet::new());
        let (mut dequantized, mut quantized, mut unfit, mut from_fp4) = (0, false, Vec::new(), false);
        let has_four = names.iter().any(|n| matches!(Nf4Tensor::find(&base.tensors, n), Ok(Some(_))));
        let has_mlx = names.iter().any(|n| matches!(AffineTensor::find(base, n), Ok(Some(_))));
        for name in names {
            let touched = inputs.saved(name, 1.0).is_some()
                || name.strip_suffix(".weight").is_some_and(|module| inputs.modules.contains_key(module));
            if touched {
                changed.insert(name.to_string());
            }
            let Some(weight) = Weight::find(base, inputs.stored(name))? else {
                targets.insert(name.to_string(), Target::Same);
                continue;
            };
            quantized |= weight.quantized;
            let now = stored_form(base, &weight)?;
            let form = match args.form {
                None | Some(FormName::Gguf) => Form::Float(args.dtype.map_or(weight.dtype, Dtype::from)),
                Some(FormName::Nf4) => nf4(&weight, now, has_four),
                Some(FormName::Mlx) => affine(&weight, now, has_mlx),
            };
            if args.form == Some(FormName::Mlx) && !has_mlx && matches!(form, Form::Float(_)) {
                let module = name.strip_suffix(".weight").unwrap_or_default();
                unfit.extend(role(module).is_some().then(|| name.to_string()));
            }
            let float = matches!(form, Form::Float(_));
            dequantized += usize::from(weight.quantized && float);
            from_fp4 |= args.form == Some(FormName::Nf4)
                && matches!(now, Some(Form::FourBit { kind: FourBitKind::Fp4, .. }));
            // Floats that stay what they are need no way through f32 either.
            let floats = !weight.quantized && args.form.is_none() && form == Form::Float(weight.dtype);
            let same = !touched && inputs.stored(name) == name && (floats || now == Some(form));
            targets.insert(name.to_string(), if same { Target::Same } else { Target::Form(form) });
        }
        if !quantized && (bnb::is_quantized(&base.tensors) || states_quantization(&base.config)) {
            let place = escape(&base.path.display().to_string());
            return Err(Error::data(format!("{place}: quantized by a method that is not known here")));
        }
        let keeps = match args.form {
            Some(FormName::Nf4) => has_four,
            Some(FormName::Mlx) => has_mlx,
            _ => false,
        };
        let few = |target: &Target| matches!(target, Target::Form(form) if !matches!(form, Form::Float(_)));
        if !keeps && matches!(args.form, Some(FormName::Nf4 | FormName::Mlx)) && !targets.values().any(few) {
            let text = "no matrix of the model fits the form: MLX's groups have 64 columns";
            return Err(Error::usage(text).with_hint("leave --form out"));
        }
        let (form, dtype, different) = (args.form, args.dtype.map(Dtype::from), AtomicU64::new(0));
        Ok(Self { inputs, targets, changed, dequantized, different, unfit, from_fp4, form, dtype, keeps })
    }

    /// Returns the values of a weight of the result.
    pub fn values<'a>(&'a self, args: &Args, name: &str) -> Result<Box<dyn Values + 'a>> {
        let base = &self.inputs.base;
        let stored = base.tensors.require(self.inputs.stored(name))?.name;
        let base: Box<dyn Values + 'a> = match self.inputs.saved(name, args.scale) {
            Some((saved, factor)) => {
                let columns = saved.shape.last().copied().unwrap_or(1);
                match Weight::find(base, stored)? {
                    Some(weight) if factor != 1.0 => {
                        Box::new(delta::moved(Box::new(weight), &saved.values, factor as f32))
                    }
                    _ => Box::new(Held { values: &saved.values, columns }),
                }
            }
            None => {
                let weight = Weight::find(base, stored)?;
                Box::new(weight.ok_or_else(|| Error::internal("a weight without floats"))?)
            }
        };
        Ok(match self.inputs.change(args, name, &*base) {
            Some(change) => Box::new(delta::merged(base, change)),
            None => base,
        })
    }

    /// Returns the tensors of the result, sorted by name. With TIES this reads the adapted weights.
    pub fn items<'a>(&'a self, args: &Args) -> Result<Vec<Item<'a>>> {
        let base = &self.inputs.base;
        let mut items = Vec::new();
        for (name, target) in &self.targets {
            let source = self.inputs.stored(name);
            let place = base.tensors.place_of(source);
            let place = if self.changed.contains(name) { format!("{place} with the adapter") } else { place };
            let stored = Weight::find(base, base.tensors.require(source)?.name)?;
            let shape = stored.as_ref().map(|w| w.shape.clone());
            let content = match target {
                Target::Same => Content::Copy(self.parts(name), &base.tensors),
                Target::Form(form) => {
                    let values = self.values(args, name)?;
                    // A head that was the embedding is written anew, but may have its values.
                    let anew = self.changed.contains(name) || source != name;
                    let keep = match stored {
                        Some(stored) if anew => keep::hook(base, source, stored, *form, &self.different)?,
                        _ => None,
                    };
                    Content::Encoded { form: *form, values, keep }
                }
            };
            let shape = match shape {
                Some(shape) => shape,
                None => base.tensors.require(name)?.shape.to_vec(),
            };
            items.push(Item { name: name.clone(), shape, content, place });
        }
        Ok(items)
    }

    /// Returns the bytes that the tensors of the result take, and whether it is exactly that.
    pub fn bytes(&self) -> Result<(u64, bool)> {
        let (mut bytes, mut exact) = (0, true);
        for (name, target) in &self.targets {
            match target {
                Target::Same => {
                    bytes += self.parts(name).iter().map(|part| part.data.len() as u64).sum::<u64>()
                }
                Target::Form(form) => {
                    let base = &self.inputs.base;
                    let weight = Weight::find(base, base.tensors.require(self.inputs.stored(name))?.name)?;
                    let weight = weight.ok_or_else(|| Error::internal("a weight without floats"))?;
                    bytes += form.stored_bytes(name, &weight.shape)?;
                    exact &= form.is_exact();
                }
            }
        }
        Ok((bytes, exact))
    }

    /// The tensors that a weight is stored in.
    fn parts(&self, name: &str) -> Vec<TensorView<'_>> {
        let store = &self.inputs.base.tensors;
        let belongs = |n: &str| {
            n == name
                || bnb::part_of(store, n).as_deref() == Some(name)
                || mlx::part_of(store, n).as_deref() == Some(name)
        };
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let near = store.names().filter(|n| n.starts_with(module) && belongs(n));
        near.filter_map(|n| store.get(n)).collect()
    }

    /// Returns config.json of the result.
    pub fn config(&self) -> Value {
        let mut config = self.inputs.base.config.clone();
        let Value::Object(map) = &mut config else { return config };
        if self.inputs.untied {
            map.insert("tie_word_embeddings".into(), false.into());
        }
        if self.keeps {
            if self.from_fp4
                && let Some(Value::Object(settings)) = map.get_mut("quantization_config")
            {
                settings.insert("bnb_4bit_quant_type".into(), FourBitKind::Nf4.name().into());
            }
            return config;
        }
        map.remove("quantization_config");
        map.remove("quantization");
        if let Some(dtype) = self.dtype {
            let key = if map.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
            map.insert(key.into(), torch_name(dtype).into());
        }
        let forms = || {
            self.targets.iter().filter_map(|(name, t)| match t {
                Target::Form(form) => Some((name, *form)),
                Target::Same => None,
            })
        };
        match self.form {
            Some(FormName::Nf4) => {
                let compute = forms().find_map(|(_, form)| match form {
                    Form::FourBit { dtype, .. } => Some(dtype),
                    _ => None,
                });
                let (kind, compute) = (FourBitKind::Nf4, compute.unwrap_or(Dtype::BF16));
                let setting = bnb::Setting::FourBit { kind, double_quant: true, compute };
                config["quantization_config"] = bnb::quantization_config(setting, None);
            }
            Some(FormName::Mlx) => {
                let mut layers = BTreeMap::new();
                for (name, form) in forms() {
                    let Some(module) = name.strip_suffix(".weight").filter(|m| role(m).is_some()) else {
                        continue;
                    };
                    let setting = match form {
                        Form::Affine { bits, group, .. } => Some(Setting { bits, group }),
                        _ => None,
                    };
                    layers.insert(module.to_string(), setting);
                }
                let value = mlx::quantization(MLX, &layers);
                config["quantization"] = value.clone();
                config["quantization_config"] = value;
            }
            _ => {}
        }
        config
    }

    /// Returns the safetensors metadata of the result.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut metadata = self.inputs.metadata.clone();
        if self.form == Some(FormName::Mlx) {
            metadata.insert("format".into(), "mlx".into());
        }
        metadata
    }

    /// Returns a text that tells everything the result depends on, for a later run.
    pub fn identity(&self, args: &Args) -> String {
        // Of each adapter that is merged its hash.
        let merges = self.inputs.metadata.get(MERGED_FROM);
        let targets: Vec<String> =
            self.targets.iter().map(|(name, target)| format!("{name} {target:?}")).collect();
        format!(
            "kto-merge {} into {}\n{merges:?} {:?} {} {:?} {} {} {:?}\nfiles of {} bytes\n{}\n",
            env!("CARGO_PKG_VERSION"),
            kto_weights::source(&self.inputs.base),
            self.inputs.weights,
            args.scale,
            args.method,
            args.density(),
            args.seed,
            args.layers,
            args.max_shard_size(),
            targets.join("\n")
        )
    }
}

/// What mlx-lm makes when nothing is asked for.
const MLX: Setting = Setting { bits: 4, group: 64 };

/// The quantized form that a weight of the base has, of those that a result may have.
fn stored_form(base: &ModelDir, weight: &Weight) -> Result<Option<Form>> {
    if let Some(Nf4Tensor { state, .. }) = Nf4Tensor::find(&base.tensors, weight.name)? {
        let (kind, block, nested, dtype) = (state.kind, state.block, state.nested.is_some(), state.dtype);
        return Ok(Some(Form::FourBit { kind, block, nested, dtype }));
    }
    let stored = AffineTensor::find(base, weight.name)?;
    Ok(stored.map(|s| Form::Affine { bits: s.bits, group: s.group, dtype: s.scales.dtype }))
}

/// With a 4-bit base its layers and blocks, whichever 4 bits these are; else every linear layer in blocks of 64.
fn nf4(weight: &Weight, now: Option<Form>, has_four: bool) -> Form {
    let kind = FourBitKind::Nf4;
    let module = weight.name.strip_suffix(".weight").unwrap_or_default();
    match now {
        Some(Form::FourBit { block, nested, dtype, .. }) => Form::FourBit { kind, block, nested, dtype },
        _ if !has_four && matches!(role(module), Some(Role::Linear(_))) => {
            Form::FourBit { kind, block: bnb::BLOCK, nested: true, dtype: weight.dtype }
        }
        _ => Form::Float(weight.dtype),
    }
}

/// With an MLX base its layers, bits and groups; else every matrix in 4 bits and groups of 64.
fn affine(weight: &Weight, now: Option<Form>, has_mlx: bool) -> Form {
    let module = weight.name.strip_suffix(".weight").unwrap_or_default();
    let wanted = match now {
        Some(form @ Form::Affine { .. }) => form,
        _ if !has_mlx && role(module).is_some() => {
            Form::Affine { bits: MLX.bits, group: MLX.group, dtype: weight.dtype }
        }
        _ => return Form::Float(weight.dtype),
    };
    if wanted.unfit(&weight.shape).is_none() { wanted } else { Form::Float(weight.dtype) }
}

/// config.json tells of a quantization.
fn states_quantization(config: &Value) -> bool {
    ["quantization_config", "quantization"].iter().any(|key| config.get(key).is_some_and(|q| !q.is_null()))
}
