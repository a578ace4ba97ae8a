//! Packs for the tests of attention: what they hold, the layout that says so, and who sees whom by meaning alone.

use crate::support::*;
use candle_core::{Result, Tensor};
use kto_kernels::{AttentionGradients, AttentionLayout, HeadShape, Segment, attention, attention_backward};

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

impl Pack {
    /// Lays families out one after another, prompt first; queries in the same order without the unasked rows.
    pub fn new(families: &[Family]) -> Pack {
        let (mut keys, mut queries) = (Vec::new(), Vec::new());
        let mut layout = AttentionLayout::default();
        for (family, f) in families.iter().enumerate() {
            let (first, group) = (keys.len(), layout.segments.len());
            let mut push = |branch: Option<usize>, rows: usize, asked: usize, prefix_len: usize| {
                let tokens: Vec<Token> =
                    (0..rows).map(|position| Token { family, branch, position }).collect();
                if asked > 0 {
                    layout.segments.push(Segment {
                        query: queries.len(),
                        queries: asked,
                        prefix: if prefix_len > 0 { first } else { 0 },
                        prefix_len,
                        own: keys.len(),
                        offset: rows - asked,
                    });
                }
                queries.extend_from_slice(&tokens[rows - asked..]);
                keys.extend(tokens);
            };
            push(None, f.prompt, f.asked, 0);
            for (branch, rows) in f.branches.iter().enumerate() {
                push(Some(branch), *rows, *rows, f.prompt);
            }
            layout.groups.push(group..layout.segments.len());
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

/// Returns the output of attention.
pub(crate) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<Tensor> {
    written(q, |out| attention(out, q, k, v, layout, shape))
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
    attention_backward(&gradients, dout, q, k, v, layout, shape)?;
    Ok((dq, dk, dv))
}

/// Head shapes with and without grouping.
pub(crate) const SHAPES: [HeadShape; 6] = [
    HeadShape { heads: 1, kv_heads: 1, dim: 8 },
    HeadShape { heads: 4, kv_heads: 2, dim: 8 },
    HeadShape { heads: 6, kv_heads: 2, dim: 16 },
    HeadShape { heads: 3, kv_heads: 1, dim: 16 },
    HeadShape { heads: 2, kv_heads: 2, dim: 16 },
    HeadShape { heads: 8, kv_heads: 2, dim: 8 },
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
    plain.into_iter().chain(shared).collect()
}
