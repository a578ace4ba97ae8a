//! Whether a checkpoint holds the tensors that its config.json promises.
//!
//! Called before anything of the promised sizes is allocated: a config.json that lies about a size must not cost memory or time.
//! Invariant: headers only, no weight is read. Deliberately absent: finiteness, which is checked as weights are loaded.

use crate::whole::{Part, parts};
use crate::{
    architecture::{Architecture, Module},
    norm::NormWeights,
};
use kto_cli::{Error, Result, escape};
use kto_formats::model_dir::ModelDir;
use kto_weights::Source;
use std::collections::BTreeMap;

/// Name of the embedding (V, C).
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head (V, C), where it is not the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";
/// Name of the norm before the head (C), without `.weight`.
pub(crate) const FINAL_NORM: &str = "model.norm";
/// The norms of a block, or their names.
#[derive(Clone, Debug)]
pub struct Norms<T> {
    /// Before attention (C).
    pub input: T,
    /// Before the MLP (C).
    pub mlp: T,
    /// Of queries and of keys (D).
    pub heads: Option<(T, T)>,
    /// Behind attention and behind the MLP, before the sum (C).
    pub post: Option<(T, T)>,
}

impl Norms<String> {
    /// Returns the names in a checkpoint, without `.weight`.
    pub(crate) fn names(architecture: &Architecture, layer: usize) -> Self {
        let name = |norm: &str| format!("model.layers.{layer}.{norm}");
        let heads = architecture.qk_norm.then(|| (name("self_attn.q_norm"), name("self_attn.k_norm")));
        match architecture.post_norms {
            false => Self {
                input: name("input_layernorm"),
                mlp: name("post_attention_layernorm"),
                heads,
                post: None,
            },
            true => Self {
                input: name("input_layernorm"),
                mlp: name("pre_feedforward_layernorm"),
                heads,
                post: Some((name("post_attention_layernorm"), name("post_feedforward_layernorm"))),
            },
        }
    }
}

impl<T> Norms<T> {
    /// Pairs the norms of two sets of the same decoder.
    pub(crate) fn zip<U>(self, other: Norms<U>) -> Norms<(T, U)> {
        let pair = |a: Option<(T, T)>, b: Option<(U, U)>| a.zip(b).map(|((a, b), (c, d))| ((a, c), (b, d)));
        Norms {
            input: (self.input, other.input),
            mlp: (self.mlp, other.mlp),
            heads: pair(self.heads, other.heads),
            post: pair(self.post, other.post),
        }
    }

    /// Returns what `f` makes of every norm; it also gets the norm's length.
    pub(crate) fn map<U>(
        &self,
        architecture: &Architecture,
        mut f: impl FnMut(&T, usize) -> Result<U>,
    ) -> Result<Norms<U>> {
        let (c, d) = (architecture.hidden, architecture.shape.dim);
        let mut pair = |pair: &Option<(T, T)>, n: usize| -> Result<Option<(U, U)>> {
            pair.as_ref().map(|(a, b)| Ok((f(a, n)?, f(b, n)?))).transpose()
        };
        let (heads, post) = (pair(&self.heads, d)?, pair(&self.post, c)?);
        Ok(Norms { input: f(&self.input, c)?, mlp: f(&self.mlp, c)?, heads, post })
    }
}

/// Returns the names of the tensors of the norm `name`.
pub(crate) fn norm_names(architecture: &Architecture, name: &str) -> NormWeights<String> {
    let bias = architecture.norm_bias.then(|| format!("{name}.bias"));
    NormWeights { weight: format!("{name}.weight"), bias }
}

/// Returns the name of a linear layer's weight (out, in).
pub(crate) fn weight_name(module: Module, layer: usize) -> String {
    format!("{}.weight", module.path(layer))
}

/// Returns the name of a linear layer's bias (out).
pub(crate) fn bias_name(module: Module, layer: usize) -> String {
    format!("{}.bias", module.path(layer))
}

/// Fails (65) at the first tensor that is missing or has another shape, and when there are more blocks than config.json says.
pub fn check(architecture: &Architecture, directory: &ModelDir) -> Result<()> {
    let (v, c) = (architecture.vocab_size, architecture.hidden);
    let vector = |name: &str, shape: &[usize]| directory.tensors.require(name)?.expect_shape(shape);
    let matrix = |name: &str, rows, columns| Source::find(directory, name)?.expect_shape(name, rows, columns);
    let norm = |name: &str, length: usize| {
        norm_names(architecture, name).map(|name| vector(name, &[length])).map(drop)
    };
    matrix(EMBEDDING, v, c)?;
    norm(FINAL_NORM, c)?;
    if !architecture.tied {
        matrix(HEAD, v, c)?;
    }
    for layer in 0..architecture.layers {
        Norms::names(architecture, layer).map(architecture, |name, length| norm(name, length))?;
        for &module in architecture.modules() {
            let (rows, columns) = architecture.weight_shape(module);
            matrix(&weight_name(module, layer), rows, columns)?;
            if architecture.has_bias(module) {
                vector(&bias_name(module, layer), &[rows])?;
            }
        }
    }
    no_further_block(architecture.layers, directory)
}

/// Returns a line about tensors that the decoder does not compute with.
pub fn unused(architecture: &Architecture, directory: &ModelDir) -> Option<String> {
    let parts = parts(architecture);
    let modules: BTreeMap<&str, &Part> = parts.iter().map(|part| (part.name.as_str(), part)).collect();
    let used = |name: &&str| {
        // Scales and their like lie under the weight or beside it; a bias is a part of its own.
        let mut module = *name;
        while let Some((before, rest)) = module.rsplit_once('.') {
            if let Some(part) = modules.get(before) {
                return part.tensors.contains_key(*name) || rest != "bias";
            }
            module = before;
        }
        // Old files have the divisors of the rotation.
        name.ends_with("rotary_emb.inv_freq")
    };
    let mut all = directory.tensors.names().filter(|name| !used(name));
    let (first, more) = (all.next()?, all.count());
    let more = if more > 0 { format!(" and {more} others") } else { String::new() };
    Some(format!(
        "tensor \"{}\"{more}: not a part of a {} model, not used",
        escape(first),
        architecture.family
    ))
}

fn no_further_block(layers: usize, directory: &ModelDir) -> Result<()> {
    let number = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    match directory.tensors.names().find(|name| number(name).is_some_and(|n| n >= layers)) {
        None => Ok(()),
        Some(name) => {
            let name = escape(name);
            Err(Error::data(format!(
                "tensor \"{name}\": config.json says {layers} blocks (num_hidden_layers)"
            )))
        }
    }
}
