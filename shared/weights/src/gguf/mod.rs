//! A model as one GGUF file for llama.cpp: names, types, settings and tokenizer in its terms, then the weights.
//!
//! Called by kto-quantize and kto-merge. Supported are the decoders whose tensors llama.cpp has under fixed names
//! ([`names`]). Deliberately absent: splitting, importance matrices, tokenizers other than byte-level and byte-fallback BPE.

mod names;
mod settings;
mod tokenizer;
mod types;

pub use types::{FileType, label, parse};

use crate::{Errors, Form, Values, encode};
use kto_cli::{Context, Error, Result, Ui, atomic::AtomicFile, escape};
use kto_formats::{
    gguf::{GgufTensor, GgufValue, header},
    model_dir::ModelDir,
};
use names::Family;
use safetensors::Dtype;
use std::ops::Range;

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
    /// Of queries and keys of Llama: the number of heads, whose rows are interleaved.
    heads: Option<usize>,
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
        let mut keys = settings::keys(&model.config, &family, file).at(place())?;
        keys.push(("kto.quantized_from".into(), GgufValue::String(model.fingerprint())));
        keys.extend(tokenizer::keys(&model.path, family.vocabulary, ui)?);
        let tied = !weights.iter().any(|(name, ..)| name == "lm_head.weight");
        let mut tensors = Vec::new();
        for (weight, shape, dtype) in weights {
            let (name, heads) = family.tensor(weight)?;
            let rows = shape.first().copied().unwrap_or(0);
            if heads.is_some_and(|heads| heads == 0 || rows == 0 || rows % (2 * heads) != 0) {
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
                    let text = format!("\"{}\" becomes {}: {why}", escape(weight), types::label(other));
                    ui.warn(text);
                    other
                }
            };
            tensors.push(Tensor { weight: weight.clone(), name, shape: shape.clone(), form, heads });
        }
        Ok(Self { keys, tensors })
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

    /// Writes all of `file`, which the caller makes final. `values` gives the values of a weight.
    pub fn write<'a>(
        &self,
        file: &AtomicFile,
        ui: &Ui,
        values: &dyn Fn(&str) -> Result<Box<dyn Values + 'a>>,
        mut report: Option<&mut Report>,
    ) -> Result<()> {
        let made = header(&self.keys, &self.announced());
        file.write_at(&made.bytes, 0)?;
        let progress = ui.progress(made.size, "bytes");
        let mut end = made.bytes.len() as u64;
        for (tensor, offset) in self.tensors.iter().zip(&made.offsets) {
            let values = values(&tensor.weight)?;
            let values = match tensor.heads {
                Some(heads) => Box::new(Interleaved::new(values, heads)) as Box<dyn Values>,
                None => values,
            };
            let mut at = *offset;
            let codec = tensor.form.codec(values.columns());
            let errors =
                encode(&tensor.weight, &*values, &*codec, None, report.is_some(), &mut |_, bytes| {
                    file.write_at(bytes, at)?;
                    at += bytes.len() as u64;
                    progress.add(bytes.len() as u64);
                    Ok(())
                })?;
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

/// Rows of queries or keys in the order of llama.cpp's Llama: of each head the two halves take turns, because it rotates neighbouring
/// elements where transformers rotates halves.
struct Interleaved<'a> {
    values: Box<dyn Values + 'a>,
    columns: usize,
    /// Rows of a head.
    rows: usize,
}

impl<'a> Interleaved<'a> {
    fn new(values: Box<dyn Values + 'a>, heads: usize) -> Self {
        // Of a bias every element is a row.
        let columns = if values.columns() == values.len() { 1 } else { values.columns() };
        let rows = values.len() / columns.max(1) / heads.max(1);
        Self { values, columns, rows }
    }
}

impl Values for Interleaved<'_> {
    fn len(&self) -> usize {
        self.values.len()
    }
    fn columns(&self) -> usize {
        self.values.columns()
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        let columns = self.columns;
        for (i, row) in out.chunks_mut(columns).enumerate() {
            let (head, j) = ((start / columns + i) / self.rows, (start / columns + i) % self.rows);
            let from = head * self.rows + j % 2 * (self.rows / 2) + j / 2;
            self.values.read(from * columns, row);
        }
    }
    // Rows are read in another order than they lie; they go with the rest of the file.
    fn done(&self, range: Range<usize>) {
        if range.end == self.len() {
            self.values.done(0..range.end);
        }
    }
}

#[cfg(test)]
mod tests;
