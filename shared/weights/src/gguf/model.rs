//! A GGUF file as a model of transformers: configuration, and weights under their names there as floats.
//!
//! Called by kto-quantize. Invariant: the weights are those that the configuration asks for, each once, of the shape that it has; what is
//! more or less is refused by name before anything is read.

use super::{
    names::{Change, Family, Kind},
    rope, rows,
    rows::Way,
    settings, types,
    types::Stored,
};
use crate::Values;
use kto_cli::{Context, Error, Result, Ui, escape};
use kto_formats::{
    gguf::{GgufEntry, GgufReader, GgufValue, kind},
    model_dir::{MERGED_FROM, QUANTIZED_FROM},
};
use kto_kernels::quant::Codec;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, ops::Range, path::Path};

/// A weight of the model.
pub struct GgufWeight {
    /// Its name in transformers.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    entry: GgufEntry,
    stored: Stored,
    change: Change,
}

/// An open model.
pub struct GgufModel {
    /// The file.
    pub file: GgufReader,
    /// config.json, without its dtype.
    pub config: Map<String, Value>,
    /// The weights, by name.
    pub weights: Vec<GgufWeight>,
}

impl GgufModel {
    /// Opens a file and checks everything but the values. Errors: 66 when it cannot be read, 65 by name for what is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let file = GgufReader::open(path)?;
        let place = file.place();
        let (config, weights) = read(&file).at(place)?;
        Ok(Self { file, config, weights })
    }

    /// Returns the dtype in which the values lose nothing that matters: that of the matrices; F16 where they are quantized, because their scales are.
    pub fn dtype(&self) -> Dtype {
        let matrices = self.weights.iter().filter(|w| w.shape.len() == 2);
        let mut all = matrices.map(|w| match w.stored {
            Stored::Float(dtype) => dtype,
            _ => Dtype::F16,
        });
        let first = all.next().unwrap_or(Dtype::F32);
        if all.all(|dtype| dtype == first) { first } else { self.mixed() }
    }

    fn mixed(&self) -> Dtype {
        let quantized = |w: &GgufWeight| !matches!(w.stored, Stored::Float(_));
        if self.weights.iter().any(quantized) { Dtype::F16 } else { Dtype::F32 }
    }

    /// Returns the bytes of all weights in the file.
    pub fn bytes(&self) -> u64 {
        self.weights.iter().map(|w| w.entry.range.len() as u64).sum()
    }

    /// Returns the identity of the model, with that of what it was made from where the file says it.
    pub fn fingerprint(&self) -> String {
        let own = self.file.fingerprint();
        let hexadecimal = |part: &str| part.len() == 64 && part.bytes().all(|b| b.is_ascii_hexdigit());
        match self.file.text(QUANTIZED_FROM).filter(|text| text.split('+').all(hexadecimal)) {
            Some(source) => format!("{own}+{source}"),
            None => own,
        }
    }

    /// Returns the list of what was merged into the model, where the file has one.
    pub fn merged_from(&self) -> Option<&str> {
        let is_list = |text: &&str| serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_array());
        self.file.text(MERGED_FROM).filter(is_list)
    }

    /// Returns the files of the tokenizer, by name, as far as they can be made; says what cannot.
    pub fn tokenizer(&self, ui: &Ui) -> Result<Vec<(String, Vec<u8>)>> {
        super::vocabulary::files(&self.file, &self.config, ui).at(self.file.place())
    }

    /// Returns generation_config.json.
    pub fn generation(&self) -> Value {
        let mut fields = json!({"_from_model_config": true});
        let id = |key: &str| token_id(&self.file, key);
        if let Some(bos) = id("bos") {
            fields["bos_token_id"] = json!(bos);
        }
        if let Some(pad) = id("padding") {
            fields["pad_token_id"] = json!(pad);
        }
        // The end of a turn ends an answer too.
        let mut ends: Vec<u32> = [id("eos"), id("eot")].into_iter().flatten().collect();
        ends.dedup();
        match ends[..] {
            [] => {}
            [one] => fields["eos_token_id"] = json!(one),
            _ => fields["eos_token_id"] = json!(ends),
        }
        fields
    }

    /// Returns the values of a weight.
    pub fn values(&self, weight: &GgufWeight) -> Box<dyn Values + '_> {
        let columns = weight.shape.last().copied().unwrap_or(1);
        let length = weight.shape.iter().product();
        let block =
            Blocks { file: &self.file, entry: weight.entry.clone(), stored: weight.stored, columns, length };
        rows::changed(Box::new(block), weight.change, Way::OutOf)
    }
}

/// Returns the id of a named token.
pub fn token_id(file: &GgufReader, name: &str) -> Option<u32> {
    match file.get(&format!("tokenizer.ggml.{name}_token_id")) {
        Some(GgufValue::U32(id)) => Some(*id),
        _ => None,
    }
}

fn read(file: &GgufReader) -> Result<(Map<String, Value>, Vec<GgufWeight>)> {
    let kind = Kind::of_file(file)?;
    let embedding = file.tensors().get("token_embd.weight").map(|entry| &entry.shape[..]);
    let &[rows, _] = embedding.unwrap_or_default() else {
        return Err(Error::data("no matrix \"token_embd.weight\""));
    };
    let (family, mut config) = settings::read(file, rows, &|name| file.tensors().contains_key(name))?;
    for (field, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        config.insert(field.into(), token_id(file, key).map_or(Value::Null, |id| json!(id)));
    }
    let mut weights = BTreeMap::new();
    for (name, entry) in file.tensors() {
        if [rope::FREQUENCIES, rope::SHORT, rope::LONG].contains(&name.as_str()) {
            continue;
        }
        let weight = weight(&family, name, entry)?;
        weights.insert(weight.name.clone(), weight);
    }
    check(&family, kind, &config, &weights)?;
    Ok((config, weights.into_values().collect()))
}

fn weight(family: &Family, name: &str, entry: &GgufEntry) -> Result<GgufWeight> {
    let shown = escape(name);
    let Some((weight, change)) = family.weight(name) else {
        let text = format!("tensor \"{shown}\" is none of a decoder \"{}\"", family.kind.model_type);
        return Err(Error::data(text));
    };
    let Some(stored) = types::stored(entry.kind) else {
        let known = kind(entry.kind).map_or("unknown", |kind| kind.name);
        return Err(Error::data(format!("tensor \"{shown}\": type {known} is not read"))
            .with_hint(format!("types that are read: {}", types::readable())));
    };
    // Rows of several dimensions are never used; a vector is never quantized.
    let shape = entry.shape.clone();
    if shape.len() > 2 || (shape.len() == 1 && !matches!(stored, Stored::Float(_))) {
        return Err(Error::data(format!("tensor \"{shown}\" has the shape {shape:?}")));
    }
    if !rows::fits(change, shape[0]) {
        return Err(Error::data(format!("tensor \"{shown}\": {} rows are no heads", shape[0])));
    }
    Ok(GgufWeight { name: weight, shape, entry: entry.clone(), stored, change })
}

/// The weights that the configuration asks for. Of blocks beyond what the file can hold only the first.
fn expected(
    family: &Family,
    kind: &Kind,
    config: &Map<String, Value>,
    most_blocks: usize,
) -> BTreeMap<String, Vec<usize>> {
    let size = |field: &str| config.get(field).and_then(Value::as_u64).unwrap_or(0) as usize;
    let flag = |field: &str| config.get(field) == Some(&Value::Bool(true));
    let (hidden, inner) = (size("hidden_size"), size("intermediate_size"));
    let dim = if kind.own_head_dim { size("head_dim") } else { hidden / family.heads };
    let (q, kv) = (family.heads * dim, family.kv_heads * dim);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut expect = |module: String, shape: Vec<usize>, bias: bool| {
        if bias {
            expected.insert(format!("{module}.bias"), vec![shape[0]]);
        }
        expected.insert(format!("{module}.weight"), shape);
    };
    expect("model.embed_tokens".into(), vec![family.vocabulary, hidden], false);
    expect("model.norm".into(), vec![hidden], kind.layer_norm);
    if !flag("tie_word_embeddings") {
        expect("lm_head".into(), vec![family.vocabulary, hidden], false);
    }
    let attention = flag("attention_bias");
    let queries = attention || flag("use_qkv_bias") || kind.model_type == "qwen2";
    for block in 0..family.blocks.min(most_blocks) {
        for (module, _) in kind.modules() {
            let (shape, bias) = match module.rsplit('.').next().unwrap_or(module) {
                "q_proj" => (vec![q, hidden], queries),
                "k_proj" | "v_proj" => (vec![kv, hidden], queries),
                "qkv_proj" => (vec![q + 2 * kv, hidden], false),
                "o_proj" => (vec![hidden, q], attention),
                "gate_proj" | "up_proj" => (vec![inner, hidden], flag("mlp_bias")),
                "gate_up_proj" => (vec![2 * inner, hidden], false),
                "down_proj" => (vec![hidden, inner], flag("mlp_bias")),
                "q_norm" | "k_norm" => (vec![dim], false),
                _ => (vec![hidden], kind.layer_norm),
            };
            expect(format!("model.layers.{block}.{module}"), shape, bias);
        }
    }
    expected
}

/// Every weight that the configuration asks for, and no other.
fn check(
    family: &Family,
    kind: &Kind,
    config: &Map<String, Value>,
    weights: &BTreeMap<String, GgufWeight>,
) -> Result<()> {
    let expected = expected(family, kind, config, weights.len() + 1);
    for (name, shape) in &expected {
        let found = weights.get(name).map(|weight| &weight.shape);
        let name = family.tensor(name).map_or_else(|_| name.clone(), |(name, _)| name);
        match found {
            None => return Err(Error::data(format!("no tensor \"{name}\""))),
            Some(found) if found != shape => {
                return Err(Error::data(format!(
                    "tensor \"{name}\" has shape {found:?}, expected {shape:?}"
                )));
            }
            Some(_) => {}
        }
    }
    match weights.keys().find(|name| !expected.contains_key(*name)) {
        None => Ok(()),
        Some(name) => {
            let name = family.tensor(name).map_or_else(|_| name.clone(), |(name, _)| name);
            let text = format!("tensor \"{name}\" is none of a decoder \"{}\"", kind.model_type);
            Err(Error::data(text))
        }
    }
}

/// A tensor of the file as floats.
struct Blocks<'a> {
    file: &'a GgufReader,
    entry: GgufEntry,
    stored: Stored,
    columns: usize,
    length: usize,
}

impl Values for Blocks<'_> {
    fn len(&self) -> usize {
        self.length
    }
    fn columns(&self) -> usize {
        self.columns
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        let (values, bytes) = self.stored.block();
        let from = start / values * bytes;
        let data = &self.file.bytes(&self.entry)[from..from + out.len() / values * bytes];
        match self.stored {
            Stored::Float(Dtype::F32) => fill(out, data, f32::from_le_bytes),
            Stored::Float(Dtype::F16) => fill(out, data, |b| half::f16::from_le_bytes(b).to_f32()),
            Stored::Float(_) => fill(out, data, |b| half::bf16::from_le_bytes(b).to_f32()),
            Stored::Written(form) => form.decode([data, &[], &[]], out),
            Stored::ReadOnly(form) => form.decode(data, out),
        }
    }
    fn done(&self, range: Range<usize>) {
        let (values, bytes) = self.stored.block();
        let at = |value: usize| self.entry.range.start + value / values * bytes;
        self.file.release(at(range.start)..at(range.end));
    }
}

fn fill<const N: usize>(out: &mut [f32], data: &[u8], read: impl Fn([u8; N]) -> f32) {
    out.iter_mut().zip(data.as_chunks::<N>().0).for_each(|(o, bytes)| *o = read(*bytes));
}
