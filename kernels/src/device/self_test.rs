//! A short proof that a GPU computes what the processor computes: whole operations on odd sizes, in f32.

use super::{
    AttentionGradients, AttentionInputs, AttentionOutputs, Device, Factor, FrozenWeight, Gate, Onto, Product,
    Tensor, attention, attention_backward, gated, layer_norm, logprobs, multiply, rms_norm, soft_cap,
};
use crate::{
    AttentionLayout, Dense, HeadShape, Nf4Parts, Nf4Scales, ScoreRule, Segment, Stored, Weight,
    gpu::{Gpu, Machine, Packed, products::Frozen},
    quant::nf4::CODE,
    random,
};
use candle_core::{DType, Result, bail};
use std::sync::Arc;

const ROWS: usize = 37;
const WIDTH: usize = 64;
const WIDE: usize = 130;
const SHAPE: HeadShape = HeadShape { heads: 4, kv_heads: 2, dim: WIDTH / 4 };
/// Largest difference to the processor: some hundred roundings of values near 1.
const TOLERANCE: f64 = 1e-4;

/// Computes on a device and on the processor. Errors: what differs, or what the device says.
pub fn self_test(machine: Arc<dyn Machine>) -> Result<()> {
    let gpu = Gpu::new(machine, 256 << 20);
    let host = results(&Device::Host(DType::F32))?;
    let device = results(&Device::Gpu(gpu, Dense::F32))?;
    for ((name, a), (_, b)) in device.iter().zip(&host) {
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let difference = (a - b).abs();
            if difference.is_nan() || difference > TOLERANCE {
                bail!("self-test: {name}[{i}] is {a}, expected {b}");
            }
        }
    }
    Ok(())
}

fn noise(device: &Device, rows: usize, columns: usize, salt: u64) -> Result<Tensor> {
    let value = |i: usize| random::uniform(salt, i as u64) as f32 - 0.5;
    let values: Vec<f32> = (0..rows * columns).map(value).collect();
    let tensor = candle_core::Tensor::from_vec(values, (rows, columns), &candle_core::Device::Cpu)?;
    device.bring(&tensor)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_host()?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// An NF4 matrix (WIDE, WIDTH).
fn weight(device: &Device) -> Result<FrozenWeight> {
    let byte = |i: usize| (random::key(&[3, i as u64]) >> 20) as u8;
    let scale = |i: usize| (random::uniform(4, i as u64) as f32).to_le_bytes();
    let parts = Nf4Parts {
        packed: (0..WIDE * WIDTH / 2).map(byte).collect::<Vec<u8>>().into(),
        code: CODE,
        scales: Nf4Scales::Plain(Dense::F32, (0..WIDE).flat_map(scale).collect::<Vec<u8>>().into()),
        block: WIDTH,
        round: Dense::Bf16,
    };
    let stored = Arc::new(Stored::nf4(parts, WIDE, WIDTH)?);
    let Device::Gpu(gpu, element) = device else { return Ok(FrozenWeight::Host(Weight::Stored(stored))) };
    let packed = Packed::new(vec![stored], *element);
    let mut run = vec![0; packed.bytes()];
    packed.write(&mut run);
    let memory = Arc::new(gpu.take(run.len())?);
    gpu.machine().upload(memory.address(), &run)?;
    let matrix = packed.matrix(&memory, 0, || Ok(Arc::new(gpu.take(packed.widened_bytes(0))?)))?;
    Ok(FrozenWeight::Gpu(Frozen::Whole(matrix)))
}

/// What a device computes, by name.
fn results(device: &Device) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let mut all = Vec::new();
    let x = noise(device, ROWS, WIDTH, 1)?;
    let norm = device.bring(&candle_core::Tensor::ones(WIDTH, DType::F32, &candle_core::Device::Cpu)?)?;
    let normed = device.matrix(ROWS, WIDTH)?;
    rms_norm(&normed, &x, &norm, 1e-5)?;
    all.push(("rms_norm", values(&normed)?));
    layer_norm(&normed, &x, &norm, &norm, 1e-5)?;
    all.push(("layer_norm", values(&normed)?));
    let weight = weight(device)?;
    let (wide, active) = (device.matrix(ROWS, WIDE)?, device.matrix(ROWS, WIDE)?);
    multiply(&wide, Onto::Zero, &[Product::new(&x, Factor::Linear(&weight))])?;
    all.push(("product with an NF4 weight", values(&wide)?));
    let up = noise(device, ROWS, WIDE, 2)?;
    for (name, kind) in [("swiglu", Gate::Silu), ("geglu", Gate::Gelu)] {
        gated(kind, &active, &wide, &up)?;
        all.push((name, values(&active)?));
    }
    let segment =
        |query, queries, prefix_len, own| Segment { query, queries, prefix: 0, prefix_len, own, offset: 0 };
    let segments = vec![segment(0, 20, 0, 0), segment(20, 9, 20, 20), segment(29, 8, 20, 29)];
    let layout = AttentionLayout { segments, groups: std::iter::once(0..3).collect() };
    let keys = SHAPE.kv_heads * SHAPE.dim;
    let (k, v) = (noise(device, ROWS, keys, 5)?, noise(device, ROWS, keys, 6)?);
    let (out, stats) = (device.matrix(ROWS, WIDTH)?, device.matrix(ROWS, 2 * SHAPE.heads)?);
    let (dq, dk, dv) = (device.matrix(ROWS, WIDTH)?, device.matrix(ROWS, keys)?, device.matrix(ROWS, keys)?);
    let dout = noise(device, ROWS, WIDTH, 7)?;
    let plain = ScoreRule::plain(SHAPE);
    for rule in [plain, ScoreRule { window: Some(11), cap: Some(0.5), ..plain }] {
        let inputs = AttentionInputs { q: &x, k: &k, v: &v, layout: &layout, shape: SHAPE, rule };
        let outputs = AttentionOutputs { out: &out, stats: &stats };
        attention(outputs, inputs)?;
        all.push(("attention", values(&out)?));
        attention_backward(AttentionGradients { dq: &dq, dk: &dk, dv: &dv }, &dout, outputs, inputs)?;
        for (name, gradient) in
            [("queries' gradient", &dq), ("keys' gradient", &dk), ("values' gradient", &dv)]
        {
            all.push((name, values(gradient)?));
        }
    }
    let logits = device.logits(ROWS, WIDE)?;
    multiply(&logits, Onto::Zero, &[Product::new(&x, Factor::Linear(&weight))])?;
    soft_cap(&logits, 2.0)?;
    let targets: Vec<u32> = (0..ROWS as u32).map(|i| i * 3 % WIDE as u32).collect();
    let (stats, unit) = logprobs(device, &logits, &targets, (true, Some(2.0)))?;
    all.push(("log-probabilities", stats.iter().map(|s| s.logp).collect()));
    if let Some(unit) = unit {
        all.push(("gradient of the head", values(&unit)?));
    }
    Ok(all)
}
