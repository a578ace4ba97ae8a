//! The masked softmax of attention scores against its formula in f64.

use crate::{Arg, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{
    Dense, ScoreRule, Segment,
    gpu::{Grid, Softmax},
};
use std::ops::Range;

/// (heads, queries, prefix, offset, launch)
const CASES: [(usize, usize, usize, usize, Grid); 7] = [
    (1, 1, 0, 0, grid(1, 1)),
    (2, 7, 0, 0, grid(3, 32)),
    (3, 5, 65, 0, grid(15, 64)),
    (1, 63, 1, 2, grid(4, 33)),
    (4, 3, 257, 60, grid(2, 257)),
    (2, 65, 0, 0, grid(7, 128)),
    (1, 2, 1030, 1, grid(2, 1024)),
];

/// Behind what a row sees there is NaN: it must not be read. The gaps between rows must stay as they are.
struct Case {
    p: Softmax,
    grid: Grid,
    scores: Vec<f32>,
    slopes: Vec<f32>,
}

impl Case {
    fn new(
        (heads, queries, prefix_len, offset, grid): (usize, usize, usize, usize, Grid),
        rule: ScoreRule,
        element: Dense,
    ) -> Self {
        let segment = Segment { query: 0, queries, prefix: 0, prefix_len, own: prefix_len, offset };
        let columns = (prefix_len + offset + queries) as u32;
        let p = Softmax::of_segment(&segment, heads, rule, (columns + 3, columns + 1));
        let n = p.rows as usize * p.in_stride as usize;
        let mut new = Self { p, grid, scores: noise(element, n, 7), slopes: noise(element, n, 8) };
        for i in 0..n {
            let (row, column) = (i / p.in_stride as usize, i % p.in_stride as usize);
            if !new.seen(row).contains(&column) {
                (new.scores[i], new.slopes[i]) = (f32::NAN, f32::NAN);
            }
        }
        new
    }

    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.p.first as usize + row % self.p.queries as usize;
        let window = if self.p.window == 0 { end } else { self.p.window as usize };
        end.saturating_sub(window)..end
    }

    fn elements(&self) -> usize {
        self.p.rows as usize * self.p.out_stride as usize
    }

    /// Calls `f(row of the input, row of the result)` for every row; the result is NaN in the gaps.
    fn rows(&self, input: &[f32], mut f: impl FnMut(usize, &[f32], &mut [f64])) -> Vec<f64> {
        let mut out = vec![f64::NAN; self.elements()];
        let rows = input.chunks(self.p.in_stride as usize).zip(out.chunks_mut(self.p.out_stride as usize));
        for (i, (x, y)) in rows.enumerate() {
            y[..self.p.columns as usize].fill(0.0);
            let seen = self.seen(i);
            f(i, &x[seen.clone()], &mut y[seen]);
        }
        out
    }

    /// Returns the score made of a product, and its derivative.
    fn score(&self, x: f32) -> (f64, f64) {
        let (scale, cap) = (f64::from(self.p.scale), f64::from(self.p.cap));
        let s = f64::from(x) * scale;
        if cap == 0.0 {
            return (s, scale);
        }
        let t = (s / cap).tanh();
        (cap * t, scale * (1.0 - t * t))
    }

    fn probabilities(&self) -> Vec<f64> {
        self.rows(&self.scores, |_, x, y| {
            y.iter_mut().zip(x).for_each(|(y, x)| *y = self.score(*x).0.exp());
            let sum: f64 = y.iter().sum();
            y.iter_mut().for_each(|y| *y /= sum);
        })
    }

    fn gradient(&self, probabilities: &[f32]) -> Vec<f64> {
        let stride = self.p.out_stride as usize;
        self.rows(&self.slopes, |i, x, y| {
            let p = &probabilities[i * stride + self.seen(i).start..];
            let s = &self.scores[i * self.p.in_stride as usize + self.seen(i).start..];
            let dot: f64 = x.iter().zip(p).map(|(x, p)| f64::from(*x) * f64::from(*p)).sum();
            for (((y, x), p), s) in y.iter_mut().zip(x).zip(p).zip(s) {
                *y = f64::from(*p) * (f64::from(*x) - dot) * self.score(*s).1;
            }
        })
    }
}

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for case in CASES {
            // Scores in the type of the module, and in f32 whatever it is.
            let plain = ScoreRule { scale: 0.5, window: None, cap: None };
            for rule in [plain, ScoreRule { window: Some(3), cap: Some(0.75), ..plain }] {
                check_case(m, element, (element, ""), &Case::new(case, rule, element))?;
                check_case(m, element, (Dense::F32, "_of_f32"), &Case::new(case, rule, Dense::F32))?;
            }
        }
    }
    Ok(())
}

/// `source`: type of the scores, and the end of the kernels' names.
fn check_case(m: &dyn Machine, element: Dense, source: (Dense, &str), c: &Case) -> Result<()> {
    let (source, suffix) = source;
    let kernel = |name: &str| named(&format!("{name}{suffix}"), element);
    let what = |name: &str| {
        let shape = (c.p.rows as usize, c.p.columns as usize);
        case(&format!("{name}{suffix}"), element, shape.0, shape.1, c.grid)
    };
    // The exponent's rounding and the exponential's two, those of sum and quotient.
    let tolerance = (depth(c.p.columns as usize, c.grid) + 16.0) * U32;
    let mut found = results(element, c.elements());
    let scores = buffer(source, &c.scores);
    launch(m, &kernel("softmax"), c.grid, &mut [Arg::Out(&mut found), Arg::In(&scores)], &c.p)?;
    close(&what("softmax"), element, &found, &c.probabilities(), tolerance)?;

    let p = decode(element, found.content());
    let mut ds = results(element, c.elements());
    let slopes = buffer(source, &c.slopes);
    let args = &mut [Arg::Out(&mut ds), Arg::In(&slopes), Arg::In(&found), Arg::In(&scores)];
    launch(m, &kernel("softmax_backward"), c.grid, args, &c.p)?;
    close(&what("softmax_backward"), element, &ds, &c.gradient(&p), tolerance)
}
