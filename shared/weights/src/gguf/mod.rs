//! A model as one GGUF file for llama.cpp: names, types, settings and tokenizer in its terms, then the weights. And the way back.
//!
//! Called by kto-quantize and kto-merge. Supported are the decoders whose tensors llama.cpp has under fixed names. Of both directions: names
//! and order of tensors (`names`, `rows`), settings (`settings`, `rope`), types (`types`), rules of tokenizers (`splitting`). Into a file: this module and
//! `tokenizer`; out of it: `model` and `vocabulary`. Deliberately absent: splitting, importance matrices, tokenizers other than
//! byte-level and byte-fallback BPE.

mod model;
mod names;
mod rope;
mod rows;
mod settings;
mod splitting;
mod tokenizer;
mod types;
mod vocabulary;

pub use model::{GgufModel, GgufWeight};
pub use types::{FileType, label, parse};

use crate::{
    Errors, Form, Held, Values,
    encode::{encode, placed},
};
use kto_cli::{Context, Error, Result, Ui, atomic::AtomicFile, escape};
use kto_formats::{
    gguf::{GgufTensor, GgufValue, header},
    model_dir::{MERGED_FROM, ModelDir, QUANTIZED_FROM},
};
use names::{Change, Family};
use rows::Way;
use safetensors::Dtype;
use std::collections::BTreeMap;

/// A tensor of the file.
pub struct Tensor {
    /// The weight's name in the model.
    pub weight: String,
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its form.
    pub form: Form,
    /// How its values are in the file.
    change: Change,
    /// The values of a tensor that is no weight.
    given: Option<Vec<f32>>,
}

/// What the file will hold.
pub struct Gguf {
    keys: Vec<(String, GgufValue)>,
    /// The tensors, in the order of the file.
    pub tensors: Vec<Tensor>,
}

/// What is asked of a weight by its name, beyond the type of the file.
pub type Wish<'a> = dyn Fn(&str) -> Result<Option<Form>> + 'a;

/// Hears of every tensor that was written and how far its values are off.
pub type Report<'a> = dyn FnMut(&Tensor, &Errors) -> Result<()> + 'a;

/// Gives the values of a weight, and the name of the file that holds them.
pub type Lookup<'f, 'a> = dyn Fn(&str) -> Result<(Box<dyn Values + 'a>, String)> + 'f;

impl Gguf {
    /// Decides what the file holds. `weights` are names, shapes and dtypes; `wish` may give a weight another form. Errors (65): a decoder or
    /// tokenizer that llama.cpp's files have no name for, or that is not known here.
    pub fn new(
        model: &ModelDir,
        weights: &[(String, Vec<usize>, Dtype)],
        file: FileType,
        wish: &Wish,
        ui: &Ui,
    ) -> Result<Self> {
        let place = || escape(&model.path.join("config.json").display().to_string());
        let family = Family::of(&model.config).at(place())?;
        let settings = settings::write(&model.config, &family, file).at(place())?;
        let mut keys = settings.keys;
        keys.push((QUANTIZED_FROM.into(), GgufValue::String(model.fingerprint())));
        if let Some(list) = model.tensors.metadata().get(MERGED_FROM) {
            keys.push((MERGED_FROM.into(), GgufValue::String(list.clone())));
        }
        keys.extend(tokenizer::keys(&model.path, family.vocabulary, ui)?);
        let tied = !weights.iter().any(|(name, ..)| name == "lm_head.weight");
        let mut tensors = Vec::new();
        // Tensors that do not fit into the type of the file, by what they become and why.
        let mut instead: BTreeMap<(&str, String), Vec<&String>> = BTreeMap::new();
        for (name, values) in settings.tensors {
            tensors.push(Tensor {
                weight: name.into(),
                name: name.into(),
                shape: vec![values.len()],
                form: Form::Float(Dtype::F32),
                change: Change::None,
                given: Some(values),
            });
        }
        for (weight, shape, dtype) in weights {
            let (name, change) = family.tensor(weight)?;
            let rows = shape.first().copied().unwrap_or(0);
            if !rows::fits(change, rows) {
                let text =
                    format!("\"{}\": {rows} rows are no heads as config.json has them", escape(weight));
                return Err(Error::data(format!("{}: {text}", place())));
            }
            let form = match wish(weight)? {
                Some(form) => form,
                None => types::form(&name, shape, *dtype, file, &family, tied),
            };
            let form = match form.unfit(shape) {
                None => form,
                Some(why) => {
                    let other = types::instead(form, shape);
                    instead.entry((types::label(other), why)).or_default().push(weight);
                    other
                }
            };
            let made = |name| Tensor {
                weight: weight.clone(),
                name,
                shape: shape.clone(),
                form,
                change,
                given: None,
            };
            // llama.cpp knows no tied head of this decoder.
            if tied && family.kind.layer_norm && name == "token_embd.weight" {
                tensors.push(made("output.weight".into()));
            }
            tensors.push(made(name));
        }
        settings.notes.iter().for_each(|note| ui.warn(note));
        for ((label, why), names) in instead {
            let first = escape(names[0]);
            ui.warn(match names.len() {
                1 => format!("\"{first}\" becomes {label}: {why}"),
                n => format!("\"{first}\" and {} others become {label}: {why}", n - 1),
            });
        }
        Ok(Self { keys, tensors })
    }

    /// Says that the weights are those of the model with adapters merged into it: `list` is what a safetensors file has under
    /// [`MERGED_FROM`]. They are no quantization of the model any more.
    pub fn merged(&mut self, list: &str) {
        self.keys.retain(|(key, _)| ![QUANTIZED_FROM, MERGED_FROM].contains(&key.as_str()));
        self.keys.push((MERGED_FROM.into(), GgufValue::String(list.into())));
    }

    fn announced(&self) -> Vec<GgufTensor> {
        let announce = |t: &Tensor| GgufTensor {
            name: t.name.clone(),
            shape: t.shape.clone(),
            kind: types::number(t.form),
            bytes: t.form.bytes(&t.shape),
        };
        self.tensors.iter().map(announce).collect()
    }

    /// Returns the size of the file.
    pub fn size(&self) -> u64 {
        header(&self.keys, &self.announced()).size
    }

    /// Writes all of `file`, which the caller makes final. Errors (65): a value that is not finite or too
    /// large for its form.
    pub fn write<'a>(
        &self,
        file: &AtomicFile,
        ui: &Ui,
        values: &Lookup<'_, 'a>,
        mut report: Option<&mut Report>,
    ) -> Result<()> {
        let made = header(&self.keys, &self.announced());
        file.write_at(&made.bytes, 0)?;
        let progress = ui.progress(made.size, "bytes");
        let mut end = made.bytes.len() as u64;
        for (tensor, offset) in self.tensors.iter().zip(&made.offsets) {
            let (values, place): (Box<dyn Values>, _) = match &tensor.given {
                Some(values) => (Box::new(Held { values, columns: values.len() }), None),
                None => {
                    let (values, place) = values(&tensor.weight)?;
                    (rows::changed(values, tensor.change, Way::Into), Some(place))
                }
            };
            let mut at = *offset;
            let codec = tensor.form.codec(values.columns());
            let errors =
                encode(&tensor.weight, &*values, &*codec, None, report.is_some(), &mut |_, bytes| {
                    file.write_at(bytes, at)?;
                    at += bytes.len() as u64;
                    progress.add(bytes.len() as u64);
                    Ok(())
                });
            let errors = match place {
                Some(place) => placed(errors, &place)?,
                None => errors?,
            };
            end = at;
            if let Some(report) = &mut report {
                report(tensor, &errors)?;
            }
        }
        if end < made.size {
            file.write_at(&vec![0; (made.size - end) as usize], end)?;
        }
        if !self.tensors.is_empty() && made.offsets.last().is_some_and(|offset| end < *offset) {
            return Err(Error::internal("a GGUF file shorter than its header says"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
