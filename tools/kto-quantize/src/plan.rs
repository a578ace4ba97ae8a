//! What to do with every tensor, decided and checked before anything is written.

use crate::Args;
use kto_cli::{Context, Error, Result, Ui, escape};
use kto_formats::{
    bnb,
    model_dir::{ModelDir, refuse_output},
    tensors::{TensorView, float_size},
};
use kto_hub::Need;
use safetensors::Dtype;
use serde_json::Value;
use std::path::PathBuf;

/// The linear layers of a decoder block that are quantized.
const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The job, with every default filled in.
pub struct Plan {
    /// The source.
    pub model: ModelDir,
    /// The directory to make.
    pub output: PathBuf,
    /// Whether an existing directory is replaced.
    pub force: bool,
    /// Whether scales are stored in 8 bits.
    pub double_quant: bool,
    /// Largest file of weights, in bytes.
    pub max_shard: u64,
    /// Names of the weights to quantize, sorted.
    pub quantize: Vec<String>,
    /// Names of the tensors to copy, sorted.
    pub copy: Vec<String>,
    /// Full names of skipped linear layers, sorted, and whether the user chose them.
    pub skipped: Option<Vec<String>>,
    /// Dtype that the 4-bit layers will compute in.
    pub compute: Dtype,
}

impl Plan {
    /// Opens the model and sorts its tensors. Errors: 65 for a model that is quantized already or whose tensors are
    /// not those of a dense decoder; 2 for a skipped name that matches nothing.
    pub fn new(args: &Args, ui: &Ui) -> Result<Self> {
        let model = ModelDir::open(&kto_hub::locate(&args.model, &Need::Weights(|_| Ok(())), ui)?)?;
        model.notes.iter().for_each(|note| ui.warn(note));
        refuse_output(&args.output, &model.path)?;
        refuse_quantized(&model)?;
        let skips: Vec<&str> = args.skip.iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
        let mut used = vec![false; skips.len()];
        let (mut quantize, mut copy, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        let mut blocks = 0;
        for view in model.tensors.views() {
            match linear_of(&view).at(model.tensors.place_of(view.name))? {
                Some(block) => {
                    blocks = blocks.max(block + 1);
                    let module = view.name.trim_end_matches(".weight");
                    match skips.iter().position(|s| matches(module, s)) {
                        Some(i) => {
                            used[i] = true;
                            skipped.push(module.to_string());
                            copy.push(view.name.to_string());
                        }
                        None => quantize.push(view.name.to_string()),
                    }
                }
                None => copy.push(view.name.to_string()),
            }
        }
        check_blocks(&model, blocks, quantize.len() + skipped.len())?;
        if let Some(unused) = skips.iter().zip(&used).find(|(s, u)| !**u && **s != "lm_head").map(|(s, _)| s)
        {
            return Err(Error::usage(format!("--skip {}: no linear layer has this name", escape(unused))));
        }
        if quantize.is_empty() {
            return Err(Error::usage("--skip leaves no layer to quantize"));
        }
        let compute = model.tensors.require(&quantize[0])?.dtype;
        let skipped = (!skipped.is_empty()).then(|| [vec!["lm_head".to_string()], skipped].concat());
        Ok(Self {
            model,
            output: args.output.clone(),
            force: args.force,
            double_quant: !args.no_double_quant,
            max_shard: args.max_shard_size,
            quantize,
            copy,
            skipped,
            compute,
        })
    }

    /// Returns the number of values to quantize.
    pub fn values(&self) -> u64 {
        self.quantize.iter().filter_map(|n| self.model.tensors.get(n)).map(|v| v.len() as u64).sum()
    }

    /// Returns config.json of the result.
    pub fn config(&self) -> Value {
        let mut config = self.model.config.clone();
        config["quantization_config"] =
            bnb::quantization_config(self.compute, self.double_quant, self.skipped.as_deref());
        config
    }
}

fn refuse_quantized(model: &ModelDir) -> Result<()> {
    let method = model.config.get("quantization_config").and_then(|q| q.get("quant_method"));
    if let Some(method) = method.filter(|m| !m.is_null()) {
        return Err(Error::data(format!(
            "{}: already quantized ({})",
            place(model),
            escape(&method.to_string())
        )));
    }
    if bnb::is_quantized(&model.tensors) || model.config.get("quantization").is_some_and(|q| !q.is_null()) {
        return Err(Error::data(format!("{}: already quantized", place(model))));
    }
    Ok(())
}

fn place(model: &ModelDir) -> String {
    escape(&model.path.display().to_string())
}

/// Returns the block of a linear layer's weight; `None` for what is stored as it is. A matrix in a decoder block that
/// is none of the known layers is an error: which of them transformers would quantize is not guessed.
fn linear_of(view: &TensorView) -> Result<Option<u64>> {
    let Some((block, rest)) = view.name.strip_prefix("model.layers.").and_then(|r| r.split_once('.')) else {
        return Ok(None);
    };
    let name = escape(view.name);
    let block = block
        .parse()
        .map_err(|_| Error::data(format!("tensor \"{name}\": \"{}\" is no block number", escape(block))))?;
    let known = rest.strip_suffix(".weight").is_some_and(|module| LINEARS.contains(&module));
    match (known, view.shape.len()) {
        (true, 2) if float_size(view.dtype).is_none() => {
            view.to_f32()?;
            Ok(None)
        }
        (true, 2) => Ok(Some(block)),
        (false, 0 | 1) => Ok(None),
        _ => Err(Error::data(format!(
            "tensor \"{name}\" of shape {:?} is no layer of a Llama-like decoder; this model cannot be quantized here",
            view.shape
        ))),
    }
}

/// config.json and the weights must agree about the number of blocks, and no block may lack a layer.
fn check_blocks(model: &ModelDir, blocks: u64, linears: usize) -> Result<()> {
    let place = place(model);
    if let Some(stated) = model.config.get("num_hidden_layers")
        && stated.as_u64() != Some(blocks)
    {
        let stated = escape(&stated.to_string());
        return Err(Error::data(format!(
            "{place}: config.json says {stated} layers, the weights hold {blocks}"
        )));
    }
    if linears as u64 != blocks * LINEARS.len() as u64 {
        let missing = (0..blocks)
            .flat_map(|b| LINEARS.map(|l| format!("model.layers.{b}.{l}.weight")))
            .find(|n| !model.tensors.contains(n));
        return Err(Error::data(format!("{place}: no tensor \"{}\"", missing.unwrap_or_default())));
    }
    if blocks == 0 {
        return Err(Error::data(format!("{place}: no decoder blocks (model.layers.0.…)")));
    }
    Ok(())
}

/// Whether a module is meant by a name given with --skip: whole, beginning, end or middle in whole components.
fn matches(module: &str, skip: &str) -> bool {
    format!(".{module}.").contains(&format!(".{}.", skip.trim_matches('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_match_whole_components() {
        let module = "model.layers.1.mlp.down_proj";
        for skip in [module, "down_proj", "model.layers.1", "layers.1.mlp", "mlp.down_proj", "mlp"] {
            assert!(matches(module, skip), "{skip}");
        }
        for skip in ["proj", "model.layers.11", "model.layers.1.mlp.down", "layers.0"] {
            assert!(!matches(module, skip), "{skip}");
        }
    }

    #[test]
    fn only_known_matrices_are_quantized() {
        let view = |name, shape| linear_of(&TensorView { name, dtype: Dtype::BF16, shape, data: &[] });
        assert_eq!(view("model.layers.3.mlp.up_proj.weight", &[2, 2]).unwrap(), Some(3));
        assert_eq!(view("model.layers.3.self_attn.q_proj.bias", &[2]).unwrap(), None);
        assert_eq!(view("model.embed_tokens.weight", &[2, 2]).unwrap(), None);
        assert!(view("model.layers.3.mlp.experts.0.w1.weight", &[2, 2]).is_err());
        assert!(view("model.layers.3.mlp.up_proj.weight", &[2]).is_err());
        assert!(view("model.layers.x.mlp.up_proj.weight", &[2, 2]).is_err());
    }
}
