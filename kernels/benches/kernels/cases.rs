//! The kernels, their shapes and the least work that they can do.

use candle_core::{Device, Tensor};
use kto_kernels::{
    AdamW, AttentionGradients, AttentionInputs, AttentionLayout, AttentionOutputs, DropoutKey, Factor,
    HeadShape, Onto, Product, RopeTable, ScoreRule, Segment, adamw_step,
    adamw8::{self, Moments8, adamw8_step},
    add, add_bias, attention, attention_backward, dropout, first_non_finite, gather_rows, logprob_stats,
    logprob_unit_gradient, matmul, multiply,
    quant::nf4,
    rms_norm, rms_norm_backward, rope, scale_in_place, scale_rows, scatter_add_rows, sum_of_squares, swiglu,
    swiglu_backward,
};
use std::hint::black_box;

// Token rows of a pack, width, MLP width, vocabulary, LoRA rank of the step that the benchmarks train.
const T: usize = 1024;
const C: usize = 576;
const I: usize = 1536;
const V: usize = 49152;
const R: usize = 16;
/// Rows of logits that exist at a time.
const HEAD_ROWS: usize = 128;
const HEADS: HeadShape = HeadShape { heads: 9, kv_heads: 3, dim: 64 };

/// The least work of a call.
pub enum Work {
    /// Operations of matrix products.
    Flops(f64),
    /// Bytes that have to be read or written.
    Bytes(usize),
}

/// A kernel with its operands.
pub struct Case {
    pub name: String,
    pub shape: String,
    pub work: Work,
    pub run: Box<dyn FnMut()>,
}

fn case(name: &str, shape: impl Into<String>, work: Work, run: impl FnMut() + 'static) -> Case {
    Case { name: name.into(), shape: shape.into(), work, run: Box::new(run) }
}

/// Numbers in −1 … 1, the same in every run.
fn tensor(rows: usize, columns: usize) -> Tensor {
    let values: Vec<f32> =
        (0..rows * columns).map(|i| ((i * 2_654_435_761) % 2001) as f32 / 1000.0 - 1.0).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

fn vector(n: usize) -> Tensor {
    tensor(1, n).flatten_all().unwrap()
}

/// Keeps the compiler from leaving a result out.
fn touch<T>(result: &T) {
    black_box(result);
}

/// All cases, matrix products first.
pub fn all() -> Vec<Case> {
    [products(), attentions(), rows(), head(), updates()].into_iter().flatten().collect()
}

/// A square product.
pub fn square(n: usize) -> Case {
    product("matmul", n, n, n)
}

fn product(name: &str, m: usize, k: usize, n: usize) -> Case {
    let (a, b) = (tensor(m, k), tensor(n, k));
    let work = Work::Flops(2.0 * (m * k * n) as f64);
    case(name, format!("{m}×{k}×{n}"), work, move || touch(&matmul(&a, &b.t().unwrap()).unwrap()))
}

fn products() -> Vec<Case> {
    let mut cases = vec![
        square(1024),
        product("matmul x·Wᵀ, q and o", T, C, C),
        product("matmul x·Wᵀ, k and v", T, C, 192),
        product("matmul x·Wᵀ, gate and up", T, C, I),
        product("matmul x·Wᵀ, down", T, I, C),
        product("matmul x·Wᵀ, head", HEAD_ROWS, C, V),
        product("matmul x·Aᵀ (LoRA)", T, C, R),
        product("matmul xA·Bᵀ (LoRA)", T, R, I),
    ];
    let (dy, w) = (tensor(T, I), tensor(I, C));
    let work = || Work::Flops(2.0 * (T * C * I) as f64);
    cases.push(case("matmul dy·W, gate and up", format!("{T}×{I}×{C}"), work(), move || {
        touch(&matmul(&dy, &w).unwrap());
    }));
    let (out, x, w) = (tensor(T, I), tensor(T, C), tensor(I, C));
    cases.push(case(
        "multiply, onto itself, x·Wᵀ, gate and up",
        format!("{T}×{C}×{I}"),
        work(),
        move || {
            multiply(&out, Onto::Itself, &[Product::scaled(&x, Factor::Transposed(&w), 1e-3)]).unwrap();
        },
    ));
    let (out, g, x) = (tensor(R, C), tensor(T, R), tensor(T, C));
    let work = Work::Flops(2.0 * (T * C * R) as f64);
    cases.push(case("multiply, onto itself, gᵀ·x (dA)", format!("{R}×{T}×{C}"), work, move || {
        let gt = g.t().unwrap();
        multiply(&out, Onto::Itself, &[Product::scaled(&gt, Factor::Plain(&x), 1e-3)]).unwrap();
    }));
    cases
}

/// A pack: its layout, its rows, and the scores that its queries need.
struct Pack {
    layout: AttentionLayout,
    rows: usize,
    seen: f64,
}

/// Prompts, each with as many branches.
fn pack(prompts: usize, prompt_len: usize, branches: usize, branch_len: usize) -> Pack {
    let (mut segments, mut groups, mut at, mut seen) = (Vec::new(), Vec::new(), 0, 0);
    for _ in 0..prompts {
        let (prompt, first) = (at, segments.len());
        for branch in 0..=branches {
            let (queries, prefix_len) = if branch == 0 { (prompt_len, 0) } else { (branch_len, prompt_len) };
            segments.push(Segment { query: at, queries, prefix: prompt, prefix_len, own: at, offset: 0 });
            seen += queries * prefix_len + queries * (queries + 1) / 2;
            at += queries;
        }
        groups.push(first..segments.len());
    }
    Pack { layout: AttentionLayout { segments, groups }, rows: at, seen: seen as f64 }
}

fn attentions() -> Vec<Case> {
    // Two prompts with two completions and, forward only, two KL completions each; then rows that share nothing.
    let long = [1024, 4096, 8192].map(|n| [false, true].map(|back| attention_case(pack(1, n, 0, 0), back)));
    let packs = [attention_case(pack(2, 256, 4, 96), false), attention_case(pack(2, 256, 2, 96), true)];
    packs.into_iter().chain(long.into_iter().flatten()).collect()
}

fn attention_case(pack: Pack, back: bool) -> Case {
    let Pack { layout, rows, seen } = pack;
    let width = HEADS.heads * HEADS.dim;
    let (q, k) = (tensor(rows, width), tensor(rows, HEADS.kv_heads * HEADS.dim));
    let (v, d) = (k.affine(0.5, 0.1).unwrap(), tensor(rows, width));
    let (out, stats) = (tensor(rows, width), tensor(rows, 2 * HEADS.heads));
    let (dq, dk, dv) = (tensor(rows, width), k.copy().unwrap(), v.copy().unwrap());
    // Scores and weighted values; on the way back scores once more, then four products of the same size.
    let (name, products) = if back { ("attention_backward", 5.0) } else { ("attention", 2.0) };
    let shape = format!("{rows} rows, {} prompts, 9/3 heads", layout.groups.len());
    case(name, shape, Work::Flops(2.0 * products * seen * width as f64), move || {
        let inputs = AttentionInputs {
            q: &q,
            k: &k,
            v: &v,
            layout: &layout,
            shape: HEADS,
            rule: ScoreRule::plain(HEADS),
        };
        let outputs = AttentionOutputs { out: &out, stats: &stats };
        if back {
            let gradients = AttentionGradients { dq: &dq, dk: &dk, dv: &dv };
            attention_backward(gradients, &d, outputs, inputs).unwrap();
        } else {
            attention(outputs, inputs).unwrap();
        }
    })
}

fn bytes(elements: usize) -> Work {
    Work::Bytes(4 * elements)
}

/// Operations on rows of activations.
fn rows() -> Vec<Case> {
    let (x, y, w) = (tensor(T, C), tensor(T, C), vector(C));
    let (g, u, d) = (tensor(T, I), tensor(T, I), tensor(T, I));
    let out = tensor(T, C);
    // Turned in place again and again: zeros stay what they are, others would become too small to be ordinary numbers.
    let (zg, zu, zd) = (g.zeros_like().unwrap(), g.zeros_like().unwrap(), g.zeros_like().unwrap());
    let table = RopeTable::new(64, 1e5, T);
    let positions: Vec<u32> = (0..T as u32).collect();
    let index: Vec<u32> = (0..T as u32).map(|i| i * 7 % T as u32).collect();
    let keys: Vec<u64> = (0..T as u64).collect();
    let factors = vec![0.999; T];
    let narrow = format!("{T}×{C}");
    let wide = format!("{T}×{I}");
    let mut cases = Vec::new();
    let mut push = |name: &str, shape: &str, streams: usize, run: Box<dyn FnMut()>| {
        let elements = streams * if shape == wide { T * I } else { T * C };
        cases.push(Case { name: name.into(), shape: shape.into(), work: bytes(elements), run });
    };
    macro_rules! row {
        ($name:literal, $shape:expr, $streams:literal, [$($t:ident),*], $call:expr) => {{
            $(let $t = $t.clone();)*
            push($name, $shape, $streams, Box::new(move || touch(&$call.unwrap())));
        }};
    }
    row!("rms_norm", &narrow, 2, [out, x, w], rms_norm(&out, &x, &w, 1e-5));
    row!("rms_norm_backward", &narrow, 4, [out, x, y, w], rms_norm_backward(&out, &y, &x, &w, 1e-5));
    row!("rope", &narrow, 2, [x, positions], rope(&x, &table, &positions, false));
    row!("swiglu", &wide, 3, [d, g, u], swiglu(&d, &g, &u));
    row!("swiglu_backward", &wide, 6, [zg, zu, zd], swiglu_backward(&zd, &zg, &zu));
    row!("add", &narrow, 3, [x, y], add(&x, &y));
    row!("add_bias", &narrow, 2, [x, w], add_bias(&x, &w));
    row!("scale_in_place", &narrow, 2, [x], scale_in_place(&x, 0.999));
    row!("scale_rows", &narrow, 2, [x, factors], scale_rows(&x, &factors));
    row!("gather_rows", &narrow, 2, [x, index], gather_rows(&x, &index));
    row!("scatter_add_rows", &narrow, 3, [out, x, index], scatter_add_rows(&out, &x, &index));
    row!("dropout", &narrow, 2, [x, keys], dropout(&x, DropoutKey { p: 0.1, key: 7 }, &keys));
    row!("sum_of_squares", &wide, 1, [g], sum_of_squares(&g));
    row!("first_non_finite", &wide, 1, [g], first_non_finite(&g));
    cases
}

/// What follows the product with the vocabulary.
fn head() -> Vec<Case> {
    let logits = tensor(HEAD_ROWS, V);
    let targets: Vec<u32> = (0..HEAD_ROWS as u32).map(|i| i * 377).collect();
    let shape = format!("{HEAD_ROWS}×{V}");
    let (x, t) = (logits.clone(), targets.clone());
    let stats = logprob_stats(&logits, &targets).unwrap();
    vec![
        case("logprob_stats", &shape, bytes(HEAD_ROWS * V), move || touch(&logprob_stats(&x, &t).unwrap())),
        case("logprob_unit_gradient", &shape, bytes(2 * HEAD_ROWS * V), move || {
            logprob_unit_gradient(&logits, &targets, &stats).unwrap();
        }),
    ]
}

/// The optimizer and 4-bit weights.
fn updates() -> Vec<Case> {
    let (n, rows, columns) = (5 << 20, 4096, 4096);
    let (p, m, v, g) = (vector(n), vector(n), vector(n).abs().unwrap(), vector(n));
    let (p8, g8, moments) = (vector(n), g.clone(), Moments8::zeros(&p).unwrap());
    let update = |step| AdamW {
        lr: 1e-6,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        step,
        gradient_scale: 1.0,
    };
    let packed = vec![0x5au8; rows * columns / 2];
    let absmax = vec![0.05f32; rows * columns / nf4::BLOCK];
    let mut out = vec![0.0f32; rows * columns];
    let moved = packed.len() + 4 * absmax.len() + 4 * out.len();
    vec![
        case("adamw_step", format!("{n}"), bytes(7 * n), move || {
            adamw_step(&p, &m, &v, &g, update(3)).unwrap()
        }),
        case("adamw8_step", format!("{n}"), Work::Bytes(16 * n + 16 * n / adamw8::BLOCK), move || {
            adamw8_step(&p8, &moments, &g8, update(3)).unwrap()
        }),
        case("nf4 dequantize", format!("{rows}×{columns}"), Work::Bytes(moved), move || {
            nf4::dequantize(&packed, &absmax, &mut out);
            black_box(&out);
        }),
    ]
}
