//! What is trained whole beside LoRA's matrices, PEFT's `modules_to_save` and `bias`; and the policy's weights, which are the base's with
//! those in their place.
//!
//! Called by [`crate::lora`], which holds such tensors by their names in a checkpoint, and by the sweep and generation. They begin with the
//! base's values, widened; from then on the base's own are what the reference is scored with. As in PEFT, a head that was the embedding is
//! a matrix of its own as soon as either of them is trained. Deliberately absent: parts of a module, and GPUs.

use crate::{
    architecture::Architecture,
    base::{BaseModel, LayerWeights},
    lora::Lora,
    norm::{NormGradient, NormWeights},
    numeric::Numeric,
    weights::{EMBEDDING, FINAL_NORM, HEAD, Norms, bias_name, norm_names, weight_name},
};
use candle_core::Tensor as HostTensor;
use kto_cli::{Error, Kind, Result, escape};
use kto_formats::peft::{Bias, PeftConfig};
use kto_kernels::{
    Weight,
    device::{FrozenWeight, Tensor},
};
use std::{borrow::Cow, collections::BTreeMap};

/// Shapes of tensors by their names in a checkpoint.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// Tensors of the base that are trained whole, or their gradients, by their names in a checkpoint.
pub type Whole = BTreeMap<String, HostTensor>;

/// A module of the decoder that holds tensors itself.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its name (`model.layers.0.mlp.down_proj`).
    pub name: String,
    /// Whether it is a linear layer of a block, which LoRA can be on.
    pub linear: bool,
    /// Its tensors.
    pub tensors: Shapes,
}

/// Returns the modules that hold tensors.
pub fn parts(architecture: &Architecture) -> Vec<Part> {
    let (v, c) = (architecture.vocab_size, architecture.hidden);
    let part = |name: &str, linear: bool, tensors: Vec<(String, Vec<usize>)>| Part {
        name: name.into(),
        linear,
        tensors: tensors.into_iter().collect(),
    };
    let ends = [EMBEDDING, HEAD];
    let mut all: Vec<Part> =
        ends.map(|name| part(module_of(name), false, vec![(name.into(), vec![v, c])])).into();
    let norm = |name: &str, length: usize| {
        let names = norm_names(architecture, name);
        let tensors = std::iter::once(names.weight).chain(names.bias).map(|name| (name, vec![length]));
        part(name, false, tensors.collect())
    };
    all.push(norm(FINAL_NORM, c));
    for layer in 0..architecture.layers {
        for &module in architecture.modules() {
            let (rows, columns) = architecture.weight_shape(module);
            let mut tensors = vec![(weight_name(module, layer), vec![rows, columns])];
            if architecture.has_bias(module) {
                tensors.push((bias_name(module, layer), vec![rows]));
            }
            all.push(part(&module.path(layer), true, tensors));
        }
        // Nothing in it fails.
        let _ = Norms::names(architecture, layer).map(architecture, |name, n| {
            all.push(norm(name, n));
            Ok(())
        });
    }
    all
}

/// Returns what settings train whole. Errors (65): settings with a meaning that is not computed here.
pub fn chosen(architecture: &Architecture, config: &PeftConfig) -> Result<Shapes> {
    if let Some(name) = ["model", "model.layers"].into_iter().find(|name| config.saves(name)) {
        return Err(Error::data(format!("modules_to_save names \"{name}\", which is the whole decoder"))
            .with_hint("--modules-to-save self_attn,mlp,norm,embed_tokens,lm_head"));
    }
    let mut all = Shapes::new();
    for part in parts(architecture) {
        let saved = within(&part.name).any(|module| config.saves(module));
        let adapted = part.linear && config.adapts(&part.name)?;
        if saved && adapted {
            let text = "is trained whole (modules_to_save) and has LoRA matrices (target_modules)";
            return Err(Error::data(format!("\"{}\" {text}", part.name)));
        }
        for (name, shape) in part.tensors {
            let bias = name.ends_with(".bias");
            if bias && saved && config.bias == Bias::All {
                // PEFT writes it under three names then.
                let text = "a module of modules_to_save may have no bias where bias is \"all\"";
                return Err(Error::data(format!("\"{}\": {text}", part.name)));
            }
            let by_bias = match config.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => adapted,
            };
            if saved || bias && by_bias {
                all.insert(name, shape);
            }
        }
    }
    Ok(all)
}

/// Returns a module and, of one in a block, what is around it there, up to the block: naming any of these trains it whole.
pub fn within(module: &str) -> impl Iterator<Item = &str> {
    let inside = module.strip_prefix("model.layers.");
    std::iter::successors(Some(module), move |name| {
        let (outer, _) = name.rsplit_once('.')?;
        inside.filter(|_| outer != "model.layers").map(|_| outer)
    })
}

/// Returns whether a head that is the embedding is taken apart from it.
pub fn unties<'a>(architecture: &Architecture, mut names: impl Iterator<Item = &'a String>) -> bool {
    architecture.tied && names.any(|name| name == EMBEDDING || name == HEAD)
}

/// Returns the name of the module that a tensor is of.
pub(crate) fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// Returns the block that a tensor is of.
fn layer_of(tensor: &str) -> Option<usize> {
    tensor.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Returns the lowest block from which on a gradient is needed for these tensors.
pub(crate) fn first_layer<'a>(names: impl Iterator<Item = &'a String>, layers: usize) -> usize {
    let of = |name: &String| if name == EMBEDDING { 0 } else { layer_of(name).unwrap_or(layers) };
    names.map(of).min().unwrap_or(layers)
}

/// The error of such tensors on a GPU.
pub fn not_on_gpu() -> Error {
    let text = "modules trained whole (modules_to_save, bias) are not computed on a GPU yet";
    Error::new(Kind::Unavailable, text).with_hint("--device cpu")
}

impl Lora {
    /// Gives the tensors of a fresh adapter that are trained whole the base's values. Error (65): one that is not finite.
    pub fn fill(&self, base: &BaseModel) -> Result<()> {
        for (name, to) in &self.whole {
            to.slice_set(&base.values(name, to.dims())?, 0, 0).numeric()?;
        }
        Ok(())
    }
}

/// Reads the tensors of an adapter that take the place of the base's. `needed` must be among them.
/// Errors (65): one that the decoder has not, or of another shape; one that is missing.
pub(crate) fn take<'a>(
    architecture: &Architecture,
    needed: &Shapes,
    saved: impl Iterator<Item = (&'a String, &'a [usize])> + Clone,
) -> Result<()> {
    let known: Shapes = parts(architecture).into_iter().flat_map(|part| part.tensors).collect();
    for (name, shape) in saved.clone() {
        let (shown, family) = (escape(name), &architecture.family);
        let Some(expected) = known.get(name) else {
            return Err(Error::data(format!("adapter: \"{shown}\" is no tensor of this {family} model")));
        };
        if expected != shape {
            let text = format!("adapter: \"{shown}\" has the shape {shape:?}, the model has {expected:?}");
            return Err(Error::data(text));
        }
    }
    match needed.keys().find(|name| saved.clone().all(|(own, _)| own != *name)) {
        None => Ok(()),
        Some(name) => {
            let text = "is trained whole (modules_to_save, bias), but the file does not hold it";
            Err(Error::data(format!("adapter: \"{name}\" {text}")))
        }
    }
}

/// The weights of a pass: the base's, and in their place what an adapter has trained whole.
#[derive(Clone, Copy)]
pub(crate) struct Policy<'a> {
    pub base: &'a BaseModel,
    pub whole: Option<&'a Whole>,
}

impl<'a> Policy<'a> {
    pub fn new(base: &'a BaseModel, lora: Option<&'a Lora>) -> Self {
        Self { base, whole: lora.map(|lora| &lora.whole).filter(|whole| !whole.is_empty()) }
    }

    fn get(&self, name: &str) -> Option<&'a HostTensor> {
        self.whole?.get(name)
    }

    /// Returns whether a tensor is trained whole.
    pub fn trains(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Returns the embedding (V, C).
    pub fn embedding(&self) -> Result<Cow<'a, Weight>> {
        match self.get(EMBEDDING) {
            Some(own) => Ok(Cow::Owned(Weight::Dense(own.clone()))),
            None => self.base.embedding().map(Cow::Borrowed),
        }
    }

    /// Returns the head (V, C).
    pub fn head(&self) -> Result<Cow<'a, FrozenWeight>> {
        match self.get(HEAD) {
            Some(own) => Ok(Cow::Owned(FrozenWeight::Host(Weight::Dense(own.clone())))),
            None => self.base.head().map(Cow::Borrowed),
        }
    }

    /// Returns the last norm.
    pub fn final_norm(&self) -> Result<NormWeights<Tensor>> {
        self.norm(FINAL_NORM, self.base.final_norm().clone())
    }

    /// Returns the weights of block `layer`; see [`BaseModel::layer`].
    pub fn layer(&self, layer: usize) -> Result<LayerWeights> {
        let (a, mut own) = (&self.base.architecture, self.base.layer(layer)?);
        if !self.whole.is_some_and(|whole| whole.keys().any(|name| layer_of(name) == Some(layer))) {
            return Ok(own);
        }
        for &module in a.modules() {
            let (weight, bias) = (self.get(&weight_name(module, layer)), self.get(&bias_name(module, layer)));
            for (part, rows) in a.parts().of(module) {
                let linear = &mut own.linears[part as usize];
                let of = |t: &HostTensor| t.narrow(0, rows.start, rows.len()).numeric();
                if let Some(weight) = weight {
                    linear.weight = FrozenWeight::Host(Weight::Dense(of(weight)?));
                }
                if let Some(bias) = bias {
                    linear.bias = Some(Tensor::Host(of(bias)?));
                }
            }
        }
        let both = own.norms.zip(Norms::names(a, layer));
        own.norms = both.map(a, |(norm, name), _| self.norm(name, norm.clone()))?;
        Ok(own)
    }

    /// Returns a norm as it is multiplied with.
    fn norm(&self, name: &str, mut own: NormWeights<Tensor>) -> Result<NormWeights<Tensor>> {
        let names = norm_names(&self.base.architecture, name);
        if let Some(weight) = self.get(&names.weight) {
            let one = if self.base.architecture.norm_plus_one { 1.0 } else { 0.0 };
            own.weight = Tensor::Host((weight + one).numeric()?);
        }
        if let Some(bias) = names.bias.and_then(|name| self.get(&name)) {
            own.bias = Some(Tensor::Host(bias.clone()));
        }
        Ok(own)
    }
}

/// Where the gradients of what is trained whole in a block are added to.
pub(crate) struct WholeGradient {
    /// By [`crate::architecture::Module`]: of the weight (out, in).
    pub weights: [Option<HostTensor>; 7],
    /// By [`crate::architecture::Module`]: of the bias (out).
    pub biases: [Option<HostTensor>; 7],
    pub norms: Norms<NormGradient>,
}

impl WholeGradient {
    /// Returns those of block `layer`.
    pub fn of(architecture: &Architecture, whole: &Whole, layer: usize) -> Result<Self> {
        let (mut weights, mut biases) = (<[Option<HostTensor>; 7]>::default(), Default::default());
        for &module in architecture.modules() {
            for (to, name) in
                [(&mut weights, weight_name(module, layer)), (&mut biases, bias_name(module, layer))]
            {
                let Some(own) = whole.get(&name) else { continue };
                for (part, rows) in architecture.parts().of(module) {
                    to[part as usize] = Some(own.narrow(0, rows.start, rows.len()).numeric()?);
                }
            }
        }
        let norm = |name: &String, _| Ok(norm_gradient(architecture, whole, name));
        let norms = Norms::names(architecture, layer).map(architecture, norm)?;
        Ok(Self { weights, biases, norms })
    }
}

/// Returns where the gradient of the last norm is added to.
pub(crate) fn final_norm_gradient(architecture: &Architecture, whole: &Whole) -> NormGradient {
    norm_gradient(architecture, whole, FINAL_NORM)
}

fn norm_gradient(architecture: &Architecture, whole: &Whole, name: &str) -> NormGradient {
    let names = norm_names(architecture, name);
    let get = |name: &String| whole.get(name).cloned();
    NormGradient { weight: get(&names.weight), bias: names.bias.as_ref().and_then(get) }
}
