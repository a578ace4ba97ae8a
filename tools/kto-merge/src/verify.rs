//! `--verify`: the merged model beside base and adapters on a few prompts, both computed by the engine that trains.
//!
//! What cannot be compared is refused before anything is written: the engine knows adapters of the linear layers. The weighted sum of plain
//! ones is one adapter of the sum of their ranks; one with DoRA stands alone in its layer and counts as it is; what was trained whole takes the
//! place of the base's.

use crate::{
    args::{Args, FormName, Method},
    inputs::Inputs,
};
use candle_core::{DType, Tensor};
use kto_cli::{Context, Error, Result, Ui, escape, signal};
use kto_formats::{
    adapter::{Adapter, AdapterConfig, AdapterMeta, Targets},
    lora::LoraModule,
    model_dir::ModelDir,
    tokenizer::TextTokenizer,
};
use kto_model::{architecture::Architecture, base::BaseModel, generate::Generator, lora::Lora, whole};
use kto_weights::roles::{Role, role};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// What is scored.
const PROMPTS: [&str; 4] = [
    "The quick brown fox jumps over the lazy dog, and then",
    "Question: What is the capital of France?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "In 1969, 3 astronauts flew 384,400 km to the Moon because",
];
/// Tokens of a prompt, at most.
const TOKENS: usize = 64;

/// The base with everything that is merged into it.
pub struct Verify {
    lora: Lora,
    /// Said of a result whose values are rounded to a few bits.
    quantized: &'static str,
}

impl Verify {
    /// Prepares the comparison. Errors: 2 for a mixture or an adapter that the engine cannot compute unmerged; 65 for a model it does not know.
    pub fn new(args: &Args, inputs: &Inputs) -> Result<Self> {
        let refuse = |what: &str| Err(Error::usage(format!("--verify: {what}")));
        if args.form == Some(FormName::Gguf) {
            return refuse("the result is no model directory")
                .map_err(|e| e.with_hint("--form gguf without it"));
        }
        if args.method != Method::Linear {
            return refuse("a mixture that is not linear exists only merged");
        }
        let architecture = Architecture::from_config(&inputs.base.config).at(shown(&inputs.base.path))?;
        let mut tensors = BTreeMap::new();
        for (name, adapters) in &inputs.modules {
            if !matches!(role(name), Some(Role::Linear(_))) {
                return refuse(&format!(
                    "\"{}\" is adapted, which the engine computes only merged",
                    escape(name)
                ));
            }
            let part = |i: &usize| (&inputs.adapters[*i].modules[name], inputs.weights[*i] * args.scale);
            let parts: Vec<_> = adapters.iter().map(part).collect();
            let module = match parts[..] {
                [(module, 1.0)] => module.clone(),
                _ if parts.iter().any(|(module, _)| module.magnitude.is_some()) => {
                    return refuse("DoRA with a factor or beside another adapter exists only merged");
                }
                _ => sum(&parts),
            };
            tensors.insert(name.clone(), module);
        }
        // The settings are not looked at: each module has its own rank and scale.
        let config = AdapterConfig {
            r: 1,
            lora_alpha: 1.0,
            lora_dropout: 0.0,
            target_modules: Targets::default(),
            base_model_name_or_path: None,
            use_rslora: false,
            use_dora: false,
            kept: serde_json::Map::new(),
        };
        let adapter = Adapter { config, tensors, saved: BTreeMap::new(), meta: AdapterMeta::default() };
        let mut lora = Lora::from_adapter(&architecture, &adapter, DType::F32)?;
        let parts = whole::parts(&architecture);
        for (name, saved) in inputs.adapters.iter().flat_map(|adapter| &adapter.saved) {
            if inputs.saved(name, args.scale).is_some_and(|(_, factor)| factor != 1.0) {
                return refuse("what was trained whole, with a factor, exists only merged");
            }
            if !parts.iter().any(|part| part.tensors.contains_key(name)) {
                return refuse(&format!("\"{}\" is no tensor that the engine computes with", escape(name)));
            }
            let values = Tensor::from_slice(&saved.values, &saved.shape[..], &candle_core::Device::Cpu);
            lora.whole.insert(name.clone(), values.map_err(|e| Error::internal(e.to_string()))?);
        }
        let quantized = if args.form.is_some() { ", with the rounding to its form" } else { "" };
        Ok(Self { lora, quantized })
    }

    /// Compares the model whose weights lie at `merged`, without a name and a config.json yet, and says how far it is off. Error 65: its
    /// logits are not finite.
    pub fn run(&self, base: &Path, merged: &Path, config: Value, ui: &Ui) -> Result<()> {
        let prompts = prompts(base)?;
        let positions = prompts.iter().map(Vec::len).max().unwrap_or(1);
        let Value::Object(config) = config else { return Err(Error::internal("config.json is no object")) };
        let load = |model| BaseModel::load(model, DType::F32, positions);
        let base = load(ModelDir::open(base)?).at(shown(base))?;
        let model = load(ModelDir::with_config(merged, config)?).at(shown(merged))?;
        let vocabulary = model.architecture.vocab_size;
        let mut found = Difference::default();
        for ids in &prompts {
            signal::check()?;
            let expected = Generator::new(&base, Some(&self.lora), ids.len())?.feed(ids, true)?;
            let logits = Generator::new(&model, None, ids.len())?.feed(ids, true)?;
            found.add(&values(&expected)?, &values(&logits)?, vocabulary);
        }
        if !found.largest.is_finite() || !found.off.is_finite() {
            return Err(Error::data("--verify: logits that are not finite")).at(shown(merged));
        }
        if found.largest == 0.0 {
            return Err(Error::data("--verify: every logit is zero")).at(shown(merged));
        }
        ui.note(format_args!(
            "verified on {} prompts: logits differ from base and adapter by at most {:.2e}{}, the largest is {:.3}; the likeliest next \
             token is the same {} times of {}",
            prompts.len(),
            found.off,
            self.quantized,
            found.largest,
            found.same,
            found.rows
        ));
        Ok(())
    }
}

/// What two models disagree about.
#[derive(Default)]
struct Difference {
    /// Largest difference of two logits.
    off: f32,
    /// Largest logit.
    largest: f32,
    rows: usize,
    /// Rows with the same likeliest token.
    same: usize,
}

impl Difference {
    /// Takes in logits (T, V) of both.
    fn add(&mut self, expected: &[f32], found: &[f32], vocabulary: usize) {
        // NaN must stay NaN.
        let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
        for (e, f) in expected.chunks(vocabulary).zip(found.chunks(vocabulary)) {
            self.off = e.iter().zip(f).fold(self.off, |m, (e, f)| larger(m, (e - f).abs()));
            self.largest = e.iter().fold(self.largest, |m, e| larger(m, e.abs()));
            self.rows += 1;
            self.same += usize::from(likeliest(e) == likeliest(f));
        }
    }
}

fn likeliest(row: &[f32]) -> Option<usize> {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]))
}

/// Returns Σ factor · scale · B · A as one pair: the matrices beside each other.
fn sum(parts: &[(&LoraModule, f64)]) -> LoraModule {
    let r = parts.iter().map(|(m, _)| m.r).sum();
    let (out_features, in_features) = (parts[0].0.out_features, parts[0].0.in_features);
    let a = parts.iter().flat_map(|(m, _)| &m.a).copied().collect();
    let mut b = Vec::with_capacity(out_features * r);
    for row in 0..out_features {
        for (m, factor) in parts {
            let scale = m.scale * factor;
            b.extend(m.b[row * m.r..][..m.r].iter().map(|v| (f64::from(*v) * scale) as f32));
        }
    }
    LoraModule { a, b, r, in_features, out_features, scale: 1.0, magnitude: None }
}

/// The prompts as token ids; of a model without a tokenizer ids spread over the vocabulary.
fn prompts(model: &Path) -> Result<Vec<Vec<u32>>> {
    let directory = ModelDir::open(model)?;
    let architecture = Architecture::from_config(&directory.config).at(shown(model))?;
    let (vocabulary, length) = (architecture.vocab_size, TOKENS.min(architecture.max_positions));
    let spread =
        |i: usize| (0..length / 2 + 1).map(|j| ((i * 7919 + j * 104_729) % vocabulary) as u32).collect();
    if !model.join("tokenizer.json").exists() {
        return Ok((0..PROMPTS.len()).map(spread).collect());
    }
    let tokenizer = TextTokenizer::from_model_dir(model)?;
    let mut prompts = Vec::new();
    for text in PROMPTS {
        let mut ids = tokenizer.encode(text, true)?;
        ids.truncate(length);
        ids.retain(|id| (*id as usize) < vocabulary);
        prompts.push(ids);
    }
    prompts.retain(|ids| !ids.is_empty());
    Ok(prompts)
}

fn values(logits: &Tensor) -> Result<Vec<f32>> {
    logits.flatten_all().and_then(|t| t.to_vec1()).map_err(|e| Error::internal(e.to_string()))
}

fn shown(path: &Path) -> String {
    escape(&path.display().to_string())
}
