//! A model's tensors on the way into safetensors files of bounded size, with the index that readers expect.
//!
//! A file is finished, forced to the disk and named before the next one begins; a run that goes on passes over those that are finished.
//! Held in memory: one piece of a tensor, and of a double-quantized one the scales.

use crate::{
    Errors, Form, Values,
    encode::{Keep, encode, placed},
    form::{Origin, floats},
};
use kto_cli::{Error, Kind, Result, Ui, atomic, escape, signal};
use kto_formats::{
    bnb::{NESTED_BLOCK, QuantState},
    python_json,
    safetensors_out::{TensorSpec, file_bytes},
    safetensors_placed::PlacedWriter,
    tensors::{TensorStore, TensorView, check_finite_bytes},
};
use kto_kernels::quant::nf4;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, ops::Range, path::Path};

/// Bytes that are copied at a time: with more, the kernel takes them over at a third of the speed.
const COPY: usize = 2 << 20;
/// Largest file of weights where nothing is said, in bytes: that of transformers.
pub const MAX_SHARD: u64 = 5_000_000_000;

/// Bytes of an index without its lines, with the totals at their longest.
const INDEX: u64 = 160;

/// What a tensor of the result holds.
pub enum Content<'a> {
    /// The bytes of tensors as they are.
    Copy(Vec<TensorView<'a>>, &'a TensorStore),
    /// Values in a form.
    Encoded {
        /// The form.
        form: Form,
        /// Where the values come from.
        values: Box<dyn Values + 'a>,
        /// What stays as it is stored.
        keep: Option<Box<Keep<'a>>>,
    },
}

/// A tensor of the result with all its parts, which stay in one file.
pub struct Item<'a> {
    /// The weight's name.
    pub name: String,
    /// Its decoded shape.
    pub shape: Vec<usize>,
    /// What it holds.
    pub content: Content<'a>,
    /// Messages about its values begin with this.
    pub place: String,
}

/// Which item goes into which file.
pub struct Layout<'a> {
    items: Vec<Item<'a>>,
    /// Name, and the range of items.
    files: Vec<(String, Range<usize>)>,
    bytes: u64,
}

/// Hears of a tensor that has been encoded: its item and errors.
pub type Written<'a> = dyn FnMut(&Item, &Errors) -> Result<()> + 'a;

impl<'a> Item<'a> {
    fn tensors(&self) -> Result<Vec<(TensorSpec, Option<Origin>)>> {
        match &self.content {
            Content::Copy(views, _) => {
                Ok(views.iter().map(|v| (TensorSpec::new(v.name, v.dtype, v.shape), None)).collect())
            }
            Content::Encoded { form, .. } => Ok(form
                .tensors(&self.name, &self.shape)?
                .into_iter()
                .map(|(spec, origin)| (spec, Some(origin)))
                .collect()),
        }
    }

    fn bytes(&self) -> Result<u64> {
        Ok(self.tensors()?.iter().map(|(spec, _)| spec.bytes()).sum())
    }
}

impl<'a> Layout<'a> {
    /// Distributes items, in order, over files of at most `max_bytes` of data; an item larger than that makes a larger file.
    pub fn plan(items: Vec<Item<'a>>, max_bytes: u64) -> Result<Self> {
        let (mut starts, mut filled, mut bytes) = (vec![0], 0, 0);
        for (i, item) in items.iter().enumerate() {
            let size = item.bytes()?;
            if filled > 0 && filled + size > max_bytes {
                starts.push(i);
                filled = 0;
            }
            filled += size;
            bytes += size;
        }
        let count = starts.len();
        let name = |i: usize| match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let end = |i: usize| starts.get(i + 1).copied().unwrap_or(items.len());
        let files = starts.iter().enumerate().map(|(i, start)| (name(i), *start..end(i))).collect();
        Ok(Self { items, files, bytes })
    }

    /// Returns the items.
    pub fn items(&self) -> &[Item<'a>] {
        &self.items
    }

    /// Returns the number of files.
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// Returns the bytes of all tensors; a few more than will be written where lengths depend on the values.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the bytes that `directory` still lacks: files of weights and the index.
    pub fn room(&self, directory: &atomic::AtomicDir, metadata: &BTreeMap<String, String>) -> Result<u64> {
        let mut room = if self.files.len() > 1 { INDEX } else { 0 };
        for (name, range) in &self.files {
            let (fixed, late) = self.specs(range.clone())?;
            let all = [fixed, late].concat();
            if !directory.is_finished(name) {
                room += file_bytes(&all, metadata);
            }
            if self.files.len() > 1 {
                // A line of the index: quotes, colon, comma and indent.
                room += all.iter().map(|spec| (spec.name.len() + name.len() + 12) as u64).sum::<u64>();
            }
        }
        Ok(room)
    }

    /// Writes every file that `directory` does not hold yet, and the index if there are several. With `report` every encoded tensor is
    /// decoded again and measured, so all are written. From the first file on the directory is kept for a later run.
    pub fn write(
        &self,
        directory: &atomic::AtomicDir,
        metadata: &BTreeMap<String, String>,
        ui: &Ui,
        mut report: Option<&mut Written>,
    ) -> Result<()> {
        let progress = ui.progress(self.bytes, "bytes");
        let mut kept = 0;
        for (name, range) in &self.files {
            let path = directory.path().join(name);
            if report.is_none() && directory.is_finished(name) {
                kept += 1;
                for item in &self.items[range.clone()] {
                    progress.skip(item.bytes()?);
                }
                continue;
            }
            let hashed = directory.wants_hashes();
            let writer =
                self.write_file(&path, range, metadata, hashed, &mut report, &|n| progress.add(n))?;
            if let Some(hash) = writer.finish(|finished| directory.finish(name, finished))? {
                directory.note_hash(path, hash);
            }
            directory.keep(true);
        }
        if kept > 0 {
            ui.note(format_args!("{kept} of {} files were there from an earlier run", self.files.len()));
        }
        if self.files.len() > 1 {
            let index = self.index(directory.path())?;
            atomic::write(&directory.path().join("model.safetensors.index.json"), index.as_bytes())?;
        }
        Ok(())
    }

    /// The tensors of a file: those of known length, and those whose length depends on the values.
    fn specs(&self, range: Range<usize>) -> Result<(Vec<TensorSpec>, Vec<TensorSpec>)> {
        let (mut fixed, mut late) = (Vec::new(), Vec::new());
        for item in &self.items[range] {
            for (spec, origin) in item.tensors()? {
                let to = if matches!(origin, Some(Origin::State(_))) { &mut late } else { &mut fixed };
                to.push(spec);
            }
        }
        Ok((fixed, late))
    }

    /// Writes all of a file but its name.
    fn write_file(
        &self,
        path: &Path,
        range: &Range<usize>,
        metadata: &BTreeMap<String, String>,
        hashed: bool,
        report: &mut Option<&mut Written>,
        done: &dyn Fn(u64),
    ) -> Result<PlacedWriter> {
        let (fixed, late) = self.specs(range.clone())?;
        let mut writer = PlacedWriter::new(path, fixed, &late, metadata, hashed)?;
        for item in &self.items[range.clone()] {
            match &item.content {
                Content::Copy(views, store) => {
                    let copied = views.iter().try_for_each(|view| copy(view, store, &mut writer, done));
                    placed(copied, &item.place)?;
                }
                Content::Encoded { form, values, keep } => {
                    let keep = keep.as_deref();
                    let errors = put(item, *form, &**values, keep, report.is_some(), &mut writer, done);
                    let errors = placed(errors, &item.place)?;
                    if let Some(report) = report {
                        report(item, &errors)?;
                    }
                }
            }
        }
        Ok(writer)
    }

    fn index(&self, dir: &Path) -> Result<String> {
        let (mut map, mut total) = (Map::new(), 0);
        for (file, _) in &self.files {
            // That our own file cannot be read back is a failure of the disk.
            let store = TensorStore::open_file(&dir.join(file)).map_err(|e| e.with_kind(Kind::Io))?;
            for view in store.views() {
                total += view.data.len() as u64;
                map.insert(view.name.into(), json!(file));
            }
        }
        let parameters: u64 =
            self.items.iter().map(|i| i.shape.iter().map(|d| *d as u64).product::<u64>()).sum();
        let index = json!({
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": Value::Object(map),
        });
        Ok(python_json::pretty_sorted(&index) + "\n")
    }
}

fn copy(view: &TensorView, store: &TensorStore, writer: &mut PlacedWriter, done: &dyn Fn(u64)) -> Result<()> {
    let values = COPY / (view.dtype.bitsize() / 8).max(1);
    for (i, part) in view.data.chunks(COPY).enumerate() {
        signal::check()?;
        check_finite_bytes(view, i * values, part)?;
        writer.append(view.name, part)?;
        store.release_part(view.name, i * COPY..i * COPY + part.len());
        done(part.len() as u64);
    }
    Ok(())
}

/// Encodes one tensor into its parts.
fn put(
    item: &Item,
    form: Form,
    values: &dyn Values,
    keep: Option<&Keep>,
    measure: bool,
    writer: &mut PlacedWriter,
    done: &dyn Fn(u64),
) -> Result<Errors> {
    let tensors = form.tensors(&item.name, &item.shape)?;
    let name_of = |plane: usize| {
        tensors
            .iter()
            .find(|(_, o)| matches!(o, Origin::Plane(p) if *p == plane))
            .map(|(spec, _)| spec.name.clone())
    };
    let names = [0, 1, 2].map(name_of);
    let codec = form.codec(values.columns());
    let mut scales = Vec::new();
    let errors = encode(&item.name, values, &*codec, keep, measure, &mut |plane, bytes| {
        done(bytes.len() as u64);
        match &names[plane] {
            Some(name) => writer.append(name, bytes),
            None => {
                scales.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
                Ok(())
            }
        }
    })?;
    let nested = (!scales.is_empty()).then(|| nf4::double_quantize(&scales));
    let missing = || Error::internal(format!("tensor \"{}\": no scales", escape(&item.name)));
    for (spec, origin) in &tensors {
        match origin {
            Origin::Plane(_) => {}
            Origin::Bytes(bytes) => writer.append(&spec.name, bytes)?,
            Origin::NestedCodes => writer.append(&spec.name, &nested.as_ref().ok_or_else(missing)?.codes)?,
            Origin::NestedScales => {
                writer.append(&spec.name, &floats(&nested.as_ref().ok_or_else(missing)?.absmax))?;
            }
            Origin::State(state) => {
                let offset = nested.as_ref().map(|n| (NESTED_BLOCK, n.offset));
                let text = QuantState { nested: offset, ..state.clone() }.to_json().into_bytes();
                writer.late(TensorSpec::new(spec.name.clone(), Dtype::U8, [text.len()]), text);
            }
        }
    }
    Ok(errors)
}
