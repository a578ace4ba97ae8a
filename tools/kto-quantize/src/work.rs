//! The two passes over the weights.
//!
//! The first pass reads every value once: it refuses NaN and infinity before anything is written, and finds the scales,
//! because a file's header comes first and states the length of text that contains their mean. The second pass writes.
//! Held in memory: one piece of a tensor, the scales of one tensor, and four bytes per 16,384 values of the whole model.

use crate::Plan;
use kto_cli::{Context, Error, Kind, Result, Ui, escape, signal};
use kto_formats::{
    bnb::{self, QuantState},
    model_dir::QUANTIZED_FROM,
    safetensors_out::{TensorSpec, pt_metadata},
    shards::{Shards, Sink},
    tensors::{TensorStore, check_finite, float_size},
};
use kto_kernels::quant::{dynamic_map, nf4};
use std::{collections::BTreeMap, path::Path};

/// Values that are worked on at a time: a multiple of the block size.
const PIECE: usize = 1 << 22;

const _: () = assert!(
    bnb::BLOCK == nf4::BLOCK && bnb::NESTED_BLOCK == nf4::NESTED_BLOCK && PIECE.is_multiple_of(nf4::BLOCK)
);

/// What the first pass found out about one weight.
struct Scales {
    state: QuantState,
    /// Largest magnitude of each block of (scale − offset); empty without double quantization.
    nested: Vec<f32>,
}

/// The result of the first pass.
pub struct Measured<'a> {
    plan: &'a Plan,
    scales: BTreeMap<&'a str, Scales>,
    /// Where each tensor goes.
    pub shards: Shards,
}

/// First pass. Errors: 65 for a value that is not finite, with tensor and index.
pub fn measure<'a>(plan: &'a Plan, ui: &Ui) -> Result<Measured<'a>> {
    let progress = ui.progress(plan.values(), "values");
    let mut scales = BTreeMap::new();
    for name in &plan.quantize {
        let view = plan.model.tensors.require(name)?;
        let absmax = absmax(&plan.model.tensors, name, |n| progress.add(n))?;
        let nested = plan.double_quant.then(|| nf4::double_quantize(&absmax));
        let state = QuantState::nf4(view.dtype, view.shape, nested.as_ref().map(|n| n.offset));
        scales.insert(name.as_str(), Scales { state, nested: nested.map(|n| n.absmax).unwrap_or_default() });
    }
    for name in &plan.copy {
        check_copy(&plan.model.tensors, name)?;
    }
    let groups = plan.model.tensors.views().map(|view| match scales.get(view.name) {
        Some(scales) => bnb::specs(view.name, &scales.state),
        None => vec![TensorSpec::new(view.name, view.dtype, view.shape)],
    });
    let shards = Shards::plan(groups.collect(), plan.max_shard);
    Ok(Measured { plan, scales, shards })
}

impl Measured<'_> {
    /// Second pass: writes the weights into `dir`.
    pub fn write(&self, dir: &Path, ui: &Ui) -> Result<()> {
        let progress = ui.progress(self.shards.bytes(), "bytes");
        let mut metadata = pt_metadata();
        metadata.insert(QUANTIZED_FROM.into(), self.plan.model.fingerprint());
        // Codes of the scales, between the tensor that makes them and the one that holds them.
        let mut waiting: Option<(String, Vec<u8>)> = None;
        self.shards.write(dir, &metadata, |spec, sink| {
            let mut sink = |bytes: &[u8]| {
                progress.add(bytes.len() as u64);
                sink(bytes)
            };
            self.produce(spec, &mut waiting, &mut sink)
        })
    }

    /// Passes on the bytes of one tensor of the result.
    fn produce(
        &self,
        spec: &TensorSpec,
        waiting: &mut Option<(String, Vec<u8>)>,
        sink: &mut Sink,
    ) -> Result<()> {
        let store = &self.plan.model.tensors;
        if let Some(scales) = self.scales.get(spec.name.as_str()) {
            *waiting = Some((spec.name.clone(), self.packed(&spec.name, scales, sink)?));
            return Ok(());
        }
        let part = bnb::PARTS.iter().find_map(|p| Some((spec.name.strip_suffix(p)?, *p)));
        let Some((scales, (weight, part))) = part.and_then(|p| Some((self.scales.get(p.0)?, p))) else {
            return copy(store, &spec.name, sink);
        };
        match part {
            ".quant_map" => sink(&floats(&nf4::CODE)),
            ".nested_quant_map" => sink(&floats(dynamic_map::signed())),
            ".nested_absmax" => sink(&floats(&scales.nested)),
            ".absmax" if scales.state.nested.is_none() => sink(&floats(&absmax(store, weight, |_| {})?)),
            ".absmax" => match waiting.take() {
                Some((name, codes)) if name == weight => sink(&codes),
                _ => Err(Error::internal(format!("scales of \"{}\" before its codes", escape(weight)))),
            },
            _ => sink(scales.state.to_json().as_bytes()),
        }
    }

    /// Passes on the packed codes of a weight and returns the codes of its scales.
    fn packed(&self, name: &str, scales: &Scales, sink: &mut Sink) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(scales.state.values().div_ceil(nf4::BLOCK));
        pieces(&self.plan.model.tensors, name, |_, values| {
            let part = nf4::quantize_nf4(values);
            all.extend_from_slice(&part.absmax);
            sink(&part.packed)
        })?;
        let Some((_, offset)) = scales.state.nested else { return Ok(Vec::new()) };
        let nested = nf4::double_quantize(&all);
        if nested.offset != offset || nested.absmax != scales.nested {
            let name = escape(name);
            return Err(Error::new(Kind::Io, format!("tensor \"{name}\" changed while it was read")));
        }
        Ok(nested.codes)
    }
}

/// Returns the scales of a weight; 65 for a value that is not finite.
fn absmax(store: &TensorStore, name: &str, done: impl Fn(u64)) -> Result<Vec<f32>> {
    let mut absmax = vec![0.0; store.require(name)?.len().div_ceil(nf4::BLOCK)];
    pieces(store, name, |start, values| {
        check_finite(name, start, values).at(store.place_of(name))?;
        let blocks = &mut absmax[start / nf4::BLOCK..][..values.len().div_ceil(nf4::BLOCK)];
        nf4::block_absmax(values, blocks);
        done(values.len() as u64);
        Ok(())
    })?;
    Ok(absmax)
}

/// Calls `work(index of the first value, values)` for every piece of a float tensor and releases what was read.
fn pieces(store: &TensorStore, name: &str, mut work: impl FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
    let view = store.require(name)?;
    let size = float_size(view.dtype).unwrap_or(4);
    let mut values = vec![0.0; PIECE.min(view.len())];
    let mut start = 0;
    while start < view.len() {
        stop_if_asked()?;
        let piece = &mut values[..PIECE.min(view.len() - start)];
        view.read_f32(start, piece)?;
        work(start, piece)?;
        store.release_part(name, start * size..(start + piece.len()) * size);
        start += piece.len();
    }
    Ok(())
}

fn check_copy(store: &TensorStore, name: &str) -> Result<()> {
    match float_size(store.require(name)?.dtype) {
        Some(_) => {
            pieces(store, name, |start, values| check_finite(name, start, values).at(store.place_of(name)))
        }
        None => Ok(()),
    }
}

fn copy(store: &TensorStore, name: &str, sink: &mut Sink) -> Result<()> {
    let data = store.require(name)?.data;
    for (i, part) in data.chunks(4 * PIECE).enumerate() {
        stop_if_asked()?;
        sink(part)?;
        store.release_part(name, i * 4 * PIECE..i * 4 * PIECE + part.len());
    }
    Ok(())
}

fn stop_if_asked() -> Result<()> {
    signal::pending().map_or(Ok(()), |kind| Err(Error::new(kind, "stopped; nothing was written")))
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
