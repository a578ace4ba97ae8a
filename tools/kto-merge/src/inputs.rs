//! Base and adapters, opened and checked against each other.

use crate::{
    Args,
    delta::{Change, Part},
    mix::Mix,
    origin,
};
use kto_cli::{Context, Error, Result, Ui, escape};
use kto_formats::{
    adapter,
    lora::{LoraModule, LoraSet, Saved},
    model_dir::{ModelDir, refuse_output},
};
use kto_hub::Need;
use kto_weights::{Values, Weight};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The embedding, which in a tied base is the head too.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head.
pub const HEAD: &str = "lm_head.weight";

/// What is merged into what.
pub struct Inputs {
    /// The model to merge into.
    pub base: ModelDir,
    /// What is merged.
    pub adapters: Vec<LoraSet>,
    /// The weight of each.
    pub weights: Vec<f64>,
    /// The adapted modules, and the adapters that adapt each.
    pub modules: BTreeMap<String, Vec<usize>>,
    /// The safetensors metadata of the result.
    pub metadata: BTreeMap<String, String>,
    /// Whether head and embedding, one tensor of the base, become two: either of them was trained whole.
    pub untied: bool,
}

impl Inputs {
    /// Opens the adapters of `base`. Errors: 2 for an output inside an input; 65 for an adapter tensor without its base tensor or of
    /// another shape; 78 for another base or a second merge.
    pub fn open(args: &Args, base: ModelDir, ui: &Ui) -> Result<Self> {
        let (mut adapters, weights) = adapters(args)?;
        base.notes.iter().for_each(|note| ui.warn(note));
        // Before the shapes: of a wholly different base, that is what is wrong.
        let metadata = origin::metadata(&base, &adapters, args.force_base, ui)?;
        for (adapter, path) in adapters.iter().zip(&args.adapters) {
            check(&base, adapter).at(escape(&adapter::directory(path).display().to_string()))?;
        }
        if let Some(layers) = &args.layers {
            let layers = parse_layers(layers)?;
            let chosen = |name: &str| block(name).is_some_and(|block| layers.contains(&block));
            for adapter in &mut adapters {
                adapter.modules.retain(|module, _| chosen(module));
                adapter.saved.retain(|name, _| chosen(name));
            }
        }
        let mut modules: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (i, adapter) in adapters.iter().enumerate() {
            adapter.modules.keys().for_each(|module| modules.entry(module.clone()).or_default().push(i));
        }
        if modules.is_empty() && adapters.iter().all(|a| a.saved.is_empty()) {
            return Err(Error::usage("--layers leaves nothing to merge"));
        }
        let zero = |m: &LoraModule| m.magnitude.is_none() && m.b.iter().all(|v| *v == 0.0);
        if adapters.iter().all(|a| a.saved.is_empty() && a.modules.values().all(zero)) {
            ui.warn("every B of the adapter is zero: the result equals the base");
        }
        let whole = |name: &str| adapters.iter().any(|adapter| adapter.saved.contains_key(name));
        // LoRA on the embedding changes rows that are looked up, not the head that shares them.
        let changed =
            |name: &str| whole(name) || name.strip_suffix(".weight").is_some_and(|m| modules.contains_key(m));
        let untied = is_tied(&base) && (whole(HEAD) || changed(EMBEDDING));
        Ok(Self { base, adapters, weights, modules, metadata, untied })
    }

    /// Returns the name of the base's tensor that the weight `name` of the result is made of.
    pub fn stored<'a>(&self, name: &'a str) -> &'a str {
        if self.untied && name == HEAD { EMBEDDING } else { name }
    }

    /// Returns the tensor that takes the place of `name`, if an adapter brings one, and the factor of its difference from the base.
    pub fn saved(&self, name: &str, scale: f64) -> Option<(&Saved, f64)> {
        let mut all = self.adapters.iter().zip(&self.weights);
        all.find_map(|(adapter, weight)| Some((adapter.saved.get(name)?, weight * scale)))
    }

    /// Returns what is added to the weight `name`, if anything.
    pub fn change(&self, args: &Args, name: &str, base: &dyn Values) -> Option<Change<'_>> {
        let module = name.strip_suffix(".weight")?;
        let parts: Vec<Part> = self
            .modules
            .get(module)?
            .iter()
            .map(|i| Part {
                module: &self.adapters[*i].modules[module],
                weight: self.weights[*i],
                adapter: *i,
            })
            .collect();
        let mix = Mix::new(args.method, args.density(), args.seed, module, &parts, base);
        Some(Change { parts, mix, scale: args.scale })
    }
}

/// Opens --base, a directory or a name on the hub. Error (2): the output lies in it.
pub fn base(args: &Args, ui: &Ui) -> Result<Option<ModelDir>> {
    let Some(path) = &args.base else { return Ok(None) };
    let base = ModelDir::open(&kto_hub::locate(path, &Need::Weights(|_| Ok(())), ui)?)?;
    refuse_output(&args.output, &base.path)?;
    Ok(Some(base))
}

/// As [`base`], where nothing can be done without one.
pub fn needed_base(args: &Args, ui: &Ui) -> Result<ModelDir> {
    base(args, ui)?.ok_or_else(|| Error::usage("--base is needed"))
}

/// Reads the adapters and their weights. Errors (2): not as many weights as adapters.
pub fn adapters(args: &Args) -> Result<(Vec<LoraSet>, Vec<f64>)> {
    let mut adapters = Vec::new();
    for path in &args.adapters {
        refuse_output(&args.output, &adapter::directory(path))?;
        adapters.push(LoraSet::read(path)?);
    }
    let weights = match args.weights.len() {
        0 => vec![1.0; adapters.len()],
        n if n == adapters.len() => args.weights.clone(),
        n => return Err(Error::usage(format!("{n} of --weight for {} of --adapter", adapters.len()))),
    };
    let mut saved = BTreeSet::new();
    if let Some(name) = adapters.iter().flat_map(|a| a.saved.keys()).find(|name| !saved.insert(*name)) {
        return Err(Error::data(format!("\"{}\" was trained whole in more than one adapter", escape(name))));
    }
    Ok((adapters, weights))
}

/// Returns whether the base's head is its embedding: config.json says so, or there is no other.
fn is_tied(base: &ModelDir) -> bool {
    let says = base.config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
    says || !matches!(Weight::find(base, HEAD), Ok(Some(_))) && base.tensors.get(EMBEDDING).is_some()
}

/// Every adapted module must have a weight of the right shape in the base.
fn check(base: &ModelDir, adapter: &LoraSet) -> Result<()> {
    let tied = is_tied(base);
    let shapes = adapter.modules.iter().map(|(module, m)| {
        (format!("{module}.weight"), module.as_str(), vec![m.out_features, m.in_features])
    });
    let saved = adapter
        .saved
        .iter()
        .map(|(name, s)| (name.clone(), name.strip_suffix(".weight").unwrap_or(name), s.shape.clone()));
    for (name, module, expected) in shapes.chain(saved) {
        let shown = escape(module);
        let whole = adapter.saved.contains_key(&name);
        let name = if tied && whole && name == HEAD { EMBEDDING.to_string() } else { name };
        if tied && module == "lm_head" && !whole {
            return Err(Error::data(format!(
                "\"{shown}\" is adapted, but the base ties it to the embedding"
            )));
        }
        let Some(view) = base.tensors.get(&name) else {
            return Err(Error::data(format!(
                "\"{shown}\" is adapted, but the base has no tensor \"{}\"",
                escape(&name)
            )));
        };
        let Some(weight) = Weight::find(base, view.name)? else {
            return view.to_f32().map(drop);
        };
        if weight.shape != expected {
            return Err(Error::data(format!(
                "\"{shown}\" is adapted with shape {expected:?}, but the base's tensor has {:?}",
                weight.shape
            )));
        }
    }
    Ok(())
}

/// The block of a module or tensor.
pub fn block(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// `0-15,20`.
fn parse_layers(text: &str) -> Result<BTreeSet<usize>> {
    let bad = || Error::usage(format!("--layers {}: must be like 0-15,20", escape(text)));
    let mut layers = BTreeSet::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |t: &str| t.trim().parse::<usize>().ok().filter(|n| *n < 1 << 20).ok_or_else(bad);
        let (from, to) = (number(from)?, number(to)?);
        if from > to {
            return Err(bad());
        }
        layers.extend(from..=to);
    }
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_layers() {
        assert_eq!(parse_layers("0-2,5").unwrap().into_iter().collect::<Vec<_>>(), [0, 1, 2, 5]);
        for text in ["", "a", "3-1", "1-", "99999999999"] {
            assert!(parse_layers(text).is_err(), "{text}");
        }
    }
}
