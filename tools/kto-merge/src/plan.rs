//! What to do with every tensor, decided and checked before anything is written.

use crate::{Args, origin};
use kto_cli::{Context, Error, Result, Ui, escape};
use kto_formats::{
    adapter::{self, Adapter, LoraPair},
    bnb::{self, Nf4Tensor, torch_name},
    model_dir::{ModelDir, refuse_output},
    safetensors_out::TensorSpec,
    tensors::float_size,
};
use kto_hub::Need;
use safetensors::Dtype;
use serde_json::Value;
use std::{collections::BTreeMap, path::PathBuf};

/// The job, with every default filled in.
pub struct Plan {
    /// The model to merge into.
    pub base: ModelDir,
    /// What is merged.
    pub adapter: Adapter,
    /// The directory to make.
    pub output: PathBuf,
    /// Whether an existing directory is replaced.
    pub force: bool,
    /// Largest file of weights, in bytes.
    pub max_shard: u64,
    /// The tensors of the result, sorted by name.
    pub tensors: Vec<TensorSpec>,
    /// How many of them were in 4 bits.
    pub dequantized: usize,
    /// Dtype of the result where the user asked for one.
    pub dtype: Option<Dtype>,
    /// The safetensors metadata of the result.
    pub metadata: BTreeMap<String, String>,
}

impl Plan {
    /// Opens both inputs and checks that they fit. Errors: 2 for an output inside an input; 65 for an adapter tensor
    /// without its base tensor or of another shape; 78 for another base or a second merge.
    pub fn new(args: &Args, ui: &Ui) -> Result<Self> {
        let base = ModelDir::open(&kto_hub::locate(&args.base, &Need::Weights(|_| Ok(())), ui)?)?;
        refuse_output(&args.output, &base.path)?;
        let path = adapter::directory(&args.adapter);
        let adapter = Adapter::read(&path)?;
        refuse_output(&args.output, &path)?;
        base.notes.iter().for_each(|note| ui.warn(note));
        // Before the shapes: of a wholly different base, that is what is wrong.
        let metadata = origin::metadata(&base, &adapter, args.force_base)?;
        check_pairs(&base, &adapter).at(escape(&path.display().to_string()))?;
        let dtype = args.dtype.map(Dtype::from);
        let (tensors, dequantized) = result_tensors(&base, dtype)?;
        Ok(Self {
            base,
            adapter,
            output: args.output.clone(),
            force: args.force,
            max_shard: args.max_shard_size,
            tensors,
            dequantized,
            dtype,
            metadata,
        })
    }

    /// Returns the matrices for the weight `name`, if it is adapted.
    pub fn pair(&self, name: &str) -> Option<&LoraPair> {
        self.adapter.tensors.get(name.strip_suffix(".weight")?)
    }

    /// Returns config.json of the result: without quantization, with the dtype that was asked for.
    pub fn config(&self) -> Value {
        let mut config = self.base.config.clone();
        if let Value::Object(map) = &mut config {
            map.remove("quantization_config");
            if let Some(dtype) = self.dtype {
                let key = if map.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
                map.insert(key.into(), torch_name(dtype).into());
            }
        }
        config
    }
}

/// Every adapted module must have a weight of the right shape in the base.
fn check_pairs(base: &ModelDir, adapter: &Adapter) -> Result<()> {
    let tied = base.config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
    for (module, pair) in &adapter.tensors {
        let shown = escape(module);
        if tied && module == "lm_head" {
            return Err(Error::data(format!(
                "\"{shown}\" is adapted, but the base ties it to the embedding"
            )));
        }
        let name = format!("{module}.weight");
        let Some(view) = base.tensors.get(&name) else {
            return Err(Error::data(format!(
                "\"{shown}\" is adapted, but the base has no tensor \"{}\"",
                escape(&name)
            )));
        };
        let weight = Nf4Tensor::find(&base.tensors, &name)?;
        let shape = weight.as_ref().map_or(view.shape, |w| w.state.shape.as_slice());
        let expected = [pair.out_features, pair.in_features];
        if shape != expected {
            return Err(Error::data(format!(
                "\"{shown}\" is adapted with shape {expected:?}, but the base's tensor has {shape:?}"
            )));
        }
        if weight.is_none() && float_size(view.dtype).is_none() {
            view.to_f32()?;
        }
    }
    Ok(())
}

/// Returns the tensors of the result and how many were in 4 bits. The parts of 4-bit weights go away.
fn result_tensors(base: &ModelDir, dtype: Option<Dtype>) -> Result<(Vec<TensorSpec>, usize)> {
    let store = &base.tensors;
    let mut quantized = BTreeMap::new();
    for name in store.names() {
        if let Some(weight) = Nf4Tensor::find(store, name).at(store.place_of(name))? {
            quantized.insert(name, weight.state);
        }
    }
    let is_part = |name: &str| {
        bnb::PARTS.iter().any(|p| name.strip_suffix(p).is_some_and(|weight| quantized.contains_key(weight)))
    };
    let mut tensors = Vec::new();
    for view in store.views().filter(|v| !is_part(v.name)) {
        let (stored, shape) = match quantized.get(view.name) {
            Some(state) => (state.dtype, state.shape.as_slice()),
            None => (view.dtype, view.shape),
        };
        let to = if float_size(stored).is_some() { dtype.unwrap_or(stored) } else { stored };
        tensors.push(TensorSpec::new(view.name, to, shape));
    }
    if bnb::is_quantized(store) && quantized.is_empty() || unknown_quantization(base, !quantized.is_empty()) {
        let place = escape(&base.path.display().to_string());
        return Err(Error::data(format!("{place}: quantized by a method other than NF4 of bitsandbytes")));
    }
    Ok((tensors, quantized.len()))
}

/// config.json tells of a quantization that the tensors do not show.
fn unknown_quantization(base: &ModelDir, found: bool) -> bool {
    let stated = |key: &str| base.config.get(key).is_some_and(|q| !q.is_null());
    !found && (stated("quantization_config") || stated("quantization"))
}
