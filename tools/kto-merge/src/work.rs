//! One pass over the weights: read a piece, add the adapter's share, round, pass on.
//!
//! Held in memory: the adapter and one piece of a tensor.

use crate::Plan;
use kto_cli::{Context, Error, Result, Ui, signal};
use kto_formats::{
    adapter::LoraPair,
    bnb::Nf4Tensor,
    safetensors_out::TensorSpec,
    shards::{Shards, Sink},
    tensors::{TensorView, check_finite, float_size, push_floats},
};
use rayon::prelude::*;
use std::path::Path;

/// Values that are worked on at a time, at least one row.
const PIECE: usize = 1 << 22;
/// Columns of a row whose sums stay in the first-level cache.
const TILE: usize = 1024;

/// Writes the merged weights into `dir`. Errors: 65 for a value that is not finite, in the base or after rounding.
pub fn write(plan: &Plan, shards: &Shards, dir: &Path, ui: &Ui) -> Result<()> {
    let progress = ui.progress(shards.bytes(), "bytes");
    shards.write(dir, &plan.metadata, |spec, sink| {
        let mut sink = |bytes: &[u8]| {
            progress.add(bytes.len() as u64);
            sink(bytes)
        };
        produce(plan, spec, &mut sink)
    })
}

/// Passes on the bytes of one tensor of the result.
fn produce(plan: &Plan, spec: &TensorSpec, sink: &mut Sink) -> Result<()> {
    let store = &plan.base.tensors;
    let view = store.require(&spec.name)?;
    let weight = Nf4Tensor::find(store, &spec.name).at(store.place_of(&spec.name))?;
    let pair = plan.pair(&spec.name);
    if weight.is_none() && pair.is_none() && view.dtype == spec.dtype {
        return copy(plan, &view, sink);
    }
    let columns = spec.shape.last().copied().unwrap_or(1).max(1);
    let length: usize = spec.shape.iter().product();
    let piece = (PIECE / columns).max(1) * columns;
    let mut values = vec![0.0; piece.min(length)];
    let mut bytes = Vec::new();
    let stored = float_size(view.dtype).unwrap_or(1);
    for start in (0..length).step_by(piece) {
        stop_if_asked()?;
        let values = &mut values[..piece.min(length - start)];
        match &weight {
            Some(weight) => dequantize(weight, start, values)?,
            None => view.read_f32(start, values)?,
        }
        if let Some(pair) = pair {
            add_product(values, start / columns, pair, plan.adapter.config.scale() as f32);
        }
        bytes.clear();
        push_floats(spec.dtype, values, &mut bytes)?;
        check_rounded(spec, start, values, &bytes).at(store.place_of(&spec.name))?;
        sink(&bytes)?;
        match &weight {
            Some(_) => store.release_part(&spec.name, start / 2..(start + values.len()) / 2),
            None => store.release_part(&spec.name, start * stored..(start + values.len()) * stored),
        }
    }
    Ok(())
}

/// Adds scale · B · A to whole rows of a weight, beginning with row `first`. Shapes: rows (n, in), B (out, R), A (R, in).
/// Every element is summed by one thread in the order of R: the result does not depend on the number of threads.
fn add_product(rows: &mut [f32], first: usize, pair: &LoraPair, scale: f32) {
    let (r, columns) = (pair.r, pair.in_features);
    rows.par_chunks_mut(columns).enumerate().for_each(|(i, row)| {
        let b = &pair.b[(first + i) * r..][..r];
        for (tile, out) in row.chunks_mut(TILE).enumerate() {
            let mut sums = [0.0f32; TILE];
            let sums = &mut sums[..out.len()];
            for (k, &factor) in b.iter().enumerate() {
                let a = &pair.a[k * columns + tile * TILE..][..out.len()];
                sums.iter_mut().zip(a).for_each(|(s, &v)| *s += factor * v);
            }
            out.iter_mut().zip(&*sums).for_each(|(w, &s)| *w += scale * s);
        }
    });
}

/// Decodes a piece of a 4-bit weight on all threads.
fn dequantize(weight: &Nf4Tensor, start: usize, out: &mut [f32]) -> Result<()> {
    let task = weight.state.block * 1024;
    out.par_chunks_mut(task)
        .enumerate()
        .try_for_each(|(i, part)| weight.dequantize_range(start + i * task, part))
}

/// Refuses NaN and infinity, also those that rounding to a narrower dtype makes.
fn check_rounded(spec: &TensorSpec, start: usize, values: &[f32], bytes: &[u8]) -> Result<()> {
    check_finite(&spec.name, start, values)?;
    let shape = [values.len()];
    let rounded = TensorView { name: &spec.name, dtype: spec.dtype, shape: &shape, data: bytes };
    check_finite(&spec.name, start, &rounded.to_f32()?).map_err(|e| {
        Error::data(format!("{e} after rounding to {}", spec.dtype)).with_hint("--dtype bf16 or --dtype f32")
    })
}

fn copy(plan: &Plan, view: &TensorView, sink: &mut Sink) -> Result<()> {
    let step = 4 * PIECE;
    let floats = float_size(view.dtype);
    let mut values = Vec::new();
    for (i, part) in view.data.chunks(step).enumerate() {
        stop_if_asked()?;
        if let Some(size) = floats {
            values.resize(part.len() / size, 0.0);
            view.read_f32(i * step / size, &mut values)?;
            check_finite(view.name, i * step / size, &values).at(plan.base.tensors.place_of(view.name))?;
        }
        sink(part)?;
        plan.base.tensors.release_part(view.name, i * step..i * step + part.len());
    }
    Ok(())
}

fn stop_if_asked() -> Result<()> {
    signal::pending().map_or(Ok(()), |kind| Err(Error::new(kind, "stopped; nothing was written")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_that_of_f64_on_odd_sizes() {
        for (out, columns, r) in [(1, 1, 1), (3, 7, 2), (5, 1025, 3), (2, 2048, 16)] {
            let wave = |n: usize, seed: usize| -> Vec<f32> {
                (0..n).map(|i| ((i * 7 + seed) as f32).sin()).collect()
            };
            let pair = LoraPair {
                a: wave(r * columns, 1),
                b: wave(out * r, 2),
                r,
                in_features: columns,
                out_features: out,
            };
            let base = wave(out * columns, 3);
            let mut merged = base.clone();
            add_product(&mut merged, 0, &pair, 0.25);
            // The rows from the second one on, as a piece of their own.
            let mut piece = base[(out - 1) * columns..].to_vec();
            add_product(&mut piece, out - 1, &pair, 0.25);
            assert_eq!(piece, merged[(out - 1) * columns..]);
            for (i, w) in merged.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let sum: f64 = (0..r)
                    .map(|k| f64::from(pair.b[row * r + k]) * f64::from(pair.a[k * columns + column]))
                    .sum();
                let expected = f64::from(base[i]) + 0.25 * sum;
                assert!((f64::from(*w) - expected).abs() < 1e-6 * r as f64, "{out}x{columns} r {r}: {i}");
            }
        }
    }
}
