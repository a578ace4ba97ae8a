//! What of an adapted weight stays as it is stored, and whether anything changes at all.
//!
//! In MLX's form a group whose values do not change keeps its codes, scale and bias: quantizing decoded values again would move
//! an eighth of them (4 bits), because the grid is found anew.

use kto_cli::{Error, Result};
use kto_formats::{mlx::AffineTensor, model_dir::ModelDir, tensors::float_size};
use kto_weights::{Changed, Form, Keep, Values, Weight};
use std::sync::atomic::{AtomicU64, Ordering};

/// Returns the hook for an adapted weight, if its form has one. `different` counts values that differ from the base.
pub fn hook<'a>(
    base: &'a ModelDir,
    name: &str,
    stored: Weight<'a>,
    form: Form,
    different: &'a AtomicU64,
) -> Result<Option<Box<Keep<'a>>>> {
    let name = base.tensors.require(name)?.name;
    Ok(match form {
        Form::Affine { bits, group, dtype } => {
            let Some(tensor) = AffineTensor::find(base, name)? else { return Ok(count(stored, different)) };
            let (packed, scales, biases) = (tensor.packed.data, tensor.scales.data, tensor.biases.data);
            let size = float_size(dtype).ok_or_else(|| Error::internal("scales that are no floats"))?;
            Some(Box::new(move |start, values, [p, s, b]| {
                let mut before = vec![0.0; values.len()];
                stored.read(start, &mut before);
                let mut changed = 0;
                for (i, (now, was)) in values.chunks(group).zip(before.chunks(group)).enumerate() {
                    if now != was {
                        changed += now.len() as u64;
                        continue;
                    }
                    let (at, bytes) = (start / group + i, group * bits / 8);
                    p[i * bytes..][..bytes].copy_from_slice(&packed[at * bytes..][..bytes]);
                    s[i * size..][..size].copy_from_slice(&scales[at * size..][..size]);
                    b[i * size..][..size].copy_from_slice(&biases[at * size..][..size]);
                }
                different.fetch_add(changed, Ordering::Relaxed);
            }))
        }
        Form::Float(dtype) if dtype == stored.dtype && !stored.quantized => {
            let data = base.tensors.require(name)?.data;
            Some(Box::new(move |start, values, [bytes, ..]| {
                let at = start * (bytes.len() / values.len().max(1));
                different.fetch_add(u64::from(*bytes != data[at..at + bytes.len()]), Ordering::Relaxed);
            }))
        }
        _ => count(stored, different),
    })
}

/// Counts values that differ before they are encoded.
fn count<'a>(stored: Weight<'a>, different: &'a AtomicU64) -> Option<Box<Keep<'a>>> {
    Some(Box::new(move |start, values, _| compare(&stored, start, values, different)))
}

fn compare(stored: &Weight, start: usize, values: &[f32], different: &AtomicU64) {
    let mut before = vec![0.0; values.len()];
    stored.read(start, &mut before);
    let changed = values.iter().zip(&before).filter(|(a, b)| a != b).count();
    different.fetch_add(changed as u64, Ordering::Relaxed);
}

/// Returns values that are counted as they are read, for files whose writer has no hook.
pub fn counted<'a>(
    values: Box<dyn Values + 'a>,
    stored: Weight<'a>,
    different: &'a AtomicU64,
) -> Changed<'a> {
    let change = Box::new(move |start, out: &mut [f32]| compare(&stored, start, out, different));
    Changed { values, change }
}
