//! Packs for the tests of attention: what they hold, the layout that says so, and who sees whom by meaning alone.

use crate::support::*;
use candle_core::{Result, Tensor};
use kto_kernels::{
    AttentionGradients, AttentionInputs, AttentionLayout, AttentionOutputs, HeadShape, ScoreRule, Segment,
    attention, attention_backward,
};
use std::{collections::HashMap, ops::Range};

/// A prompt and the completions that continue it.
pub(crate) struct Family {
    /// Rows of the prompt; 0 for none.
    pub prompt: usize,
    /// How many of the prompt's last rows are queries.
    pub asked: usize,
    /// Rows of every branch.
    pub branches: &'static [usize],
}

/// A pack: its layout and, built without it, which query sees which key.
pub(crate) struct Pack {
    pub layout: AttentionLayout,
    /// Query rows.
    pub tq: usize,
    /// Key rows.
    pub tk: usize,
    /// (Tq, Tk), row-major.
    pub sees: Vec<bool>,
}

/// Place of a token: family, branch (none in the prompt), position in the prompt or branch.
#[derive(Clone, Copy)]
struct Token {
    family: usize,
    branch: Option<usize>,
    position: usize,
}

impl Token {
    fn sees(self, key: Token) -> bool {
        self.family == key.family
            && match (self.branch, key.branch) {
                (Some(_), None) => true,
                (mine, other) => mine == other && key.position <= self.position,
            }
    }
}

/// Rows of one prompt or branch, and which of them are queries.
struct Run {
    family: usize,
    branch: Option<usize>,
    rows: usize,
    asked: Range<usize>,
}

impl Pack {
    /// Lays families out one after another, prompt first; queries in the same order without the unasked rows.
    pub fn new(families: &[Family]) -> Pack {
        let mut runs = Vec::new();
        for (family, f) in families.iter().enumerate() {
            runs.push(Run { family, branch: None, rows: f.prompt, asked: f.prompt - f.asked..f.prompt });
            let branches = f.branches.iter().enumerate();
            runs.extend(branches.map(|(b, n)| Run { family, branch: Some(b), rows: *n, asked: 0..*n }));
        }
        Pack::of(&runs)
    }

    /// Lays (prompt, branches with whether they are trained) out as the engine does: trained branches behind their prompts,
    /// then all others; first the trained rows are queries of all keys, then the rest. With `heads` only rows are asked
    /// that predict a token: the last of a prompt, all but the last of a branch.
    pub fn parts(families: &[(usize, &[(usize, bool)])], heads: bool) -> [Pack; 2] {
        let mut order = Vec::new();
        for pass in [true, false] {
            for (family, (prompt, branches)) in families.iter().enumerate() {
                if branches.iter().any(|b| b.1) == pass {
                    order.push((pass, family, None, *prompt));
                }
                let own = branches.iter().enumerate().filter(|(_, b)| b.1 == pass);
                order.extend(own.map(|(b, (rows, _))| (pass, family, Some(b), *rows)));
            }
        }
        [true, false].map(|part| {
            let run = |(pass, family, branch, rows): &(bool, usize, Option<usize>, usize)| {
                let asked = match (*pass == part, heads, branch) {
                    (false, ..) => 0..0,
                    (true, false, _) => 0..*rows,
                    (true, true, None) => rows - 1..*rows,
                    (true, true, Some(_)) => 0..rows - 1,
                };
                Run { family: *family, branch: *branch, rows: *rows, asked }
            };
            Pack::of(&order.iter().map(run).collect::<Vec<_>>())
        })
    }

    fn of(runs: &[Run]) -> Pack {
        let (mut keys, mut queries) = (Vec::new(), Vec::new());
        let mut layout = AttentionLayout::default();
        let (mut prompts, mut last) = (HashMap::new(), None);
        for Run { family, branch, rows, asked } in runs {
            let tokens = |rows: Range<usize>| {
                rows.map(|position| Token { family: *family, branch: *branch, position }).collect::<Vec<_>>()
            };
            if branch.is_none() {
                prompts.insert(*family, (keys.len(), *rows));
            }
            let prefix = prompts.get(family).filter(|p| branch.is_some() && p.1 > 0);
            let (prefix, prefix_len) = prefix.copied().unwrap_or_default();
            if !asked.is_empty() {
                let at = layout.segments.len();
                let (query, queries) = (queries.len(), asked.len());
                let (own, offset) = (keys.len(), asked.start);
                layout.segments.push(Segment { query, queries, prefix, prefix_len, own, offset });
                match layout.groups.last_mut().filter(|_| last == Some(*family)) {
                    Some(group) => group.end = at + 1,
                    None => layout.groups.push(at..at + 1),
                }
                last = Some(*family);
            }
            queries.extend(tokens(asked.clone()));
            keys.extend(tokens(0..*rows));
        }
        let sees = queries.iter().flat_map(|q| keys.iter().map(|k| q.sees(*k))).collect();
        Pack { layout, tq: queries.len(), tk: keys.len(), sees }
    }

    /// Random q, k, v and gradient of the output.
    pub fn tensors(&self, shape: HeadShape, seed: u64) -> [Tensor; 4] {
        let (cq, ck) = (shape.heads * shape.dim, shape.kv_heads * shape.dim);
        [
            normal(self.tq, cq, seed),
            normal(self.tk, ck, seed + 1),
            normal(self.tk, ck, seed + 2),
            normal(self.tq, cq, seed + 3),
        ]
    }
}

/// Returns room for the statistics of the softmax.
pub(crate) fn stats(q: &Tensor, shape: HeadShape) -> Tensor {
    Tensor::full(f64::NAN, (q.dims()[0], 2 * shape.heads.min(1 << 20)), q.device())
        .unwrap()
        .to_dtype(q.dtype())
        .unwrap()
}

/// Returns the output of attention.
pub(crate) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<Tensor> {
    let inputs = AttentionInputs { q, k, v, layout, shape, rule: ScoreRule::plain(shape) };
    written(q, |out| attention(AttentionOutputs { out, stats: &stats(q, shape) }, inputs))
}

/// Returns the gradients of q, k and v.
pub(crate) fn attend_backward(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<(Tensor, Tensor, Tensor)> {
    let [dq, dk, dv] = [q, k, v].map(|x| written(x, |_| Ok(())).unwrap());
    let gradients = AttentionGradients { dq: &dq, dk: &dk, dv: &dv };
    let (out, stats) = (written(q, |_| Ok(()))?, stats(q, shape));
    let (inputs, outputs) = (
        AttentionInputs { q, k, v, layout, shape, rule: ScoreRule::plain(shape) },
        AttentionOutputs { out: &out, stats: &stats },
    );
    attention(outputs, inputs)?;
    attention_backward(gradients, dout, outputs, inputs)?;
    Ok((dq, dk, dv))
}

/// Head shapes with and without grouping.
pub(crate) const SHAPES: [HeadShape; 7] = [
    HeadShape { heads: 1, kv_heads: 1, dim: 8 },
    HeadShape { heads: 4, kv_heads: 2, dim: 8 },
    HeadShape { heads: 6, kv_heads: 2, dim: 16 },
    HeadShape { heads: 3, kv_heads: 1, dim: 16 },
    HeadShape { heads: 2, kv_heads: 2, dim: 16 },
    HeadShape { heads: 8, kv_heads: 2, dim: 8 },
    HeadShape { heads: 3, kv_heads: 3, dim: 5 },
];

/// Packs as training makes them, from one plain sequence to several shared prompts of which only some rows are asked.
pub(crate) fn packs() -> Vec<Pack> {
    let plain = ODD.map(|n| Pack::new(&[Family { prompt: n, asked: n, branches: &[] }]));
    let shared = [
        Pack::new(&[Family { prompt: 7, asked: 7, branches: &[1, 63] }]),
        Pack::new(&[
            Family { prompt: 65, asked: 1, branches: &[64, 65, 7] },
            Family { prompt: 0, asked: 0, branches: &[63] },
            Family { prompt: 63, asked: 0, branches: &[1] },
            Family { prompt: 130, asked: 66, branches: &[] },
        ]),
        Pack::new(&[
            Family { prompt: 1, asked: 1, branches: &[130, 1] },
            Family { prompt: 64, asked: 64, branches: &[7, 7, 7] },
            Family { prompt: 0, asked: 0, branches: &[7, 65] },
        ]),
        Pack::new(&[Family { prompt: 257, asked: 3, branches: &[129] }]),
    ];
    // Two trained families, of which one shares its prompt with a branch of the rest, and a family without trained branches.
    let families: [(usize, &[(usize, bool)]); 3] = [
        (65, &[(97, true), (33, false), (2, true)]),
        (7, &[(1, false), (130, false)]),
        (17, &[(4, true), (1, true)]),
    ];
    let parts = [false, true].into_iter().flat_map(|heads| Pack::parts(&families, heads));
    plain.into_iter().chain(shared).chain(parts).collect()
}
