//! Which queries see which keys, and the proof that a layout fits its tensors.

use crate::tensor::same_type;
use candle_core::{Result, Tensor, bail};
use std::ops::Range;

/// A run of query rows and the keys that they see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row of the queries.
    pub query: usize,
    /// Number of query rows.
    pub queries: usize,
    /// First key row of the prefix, seen whole by every query.
    pub prefix: usize,
    /// Number of prefix rows; 0 for none.
    pub prefix_len: usize,
    /// First key row of the own segment.
    pub own: usize,
    /// Place of the first query in the own segment: query `i` sees the own keys `0..=offset + i`.
    pub offset: usize,
}

/// Which queries see which keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttentionLayout {
    /// The segments; their query rows do not overlap.
    pub segments: Vec<Segment>,
    /// Ranges of `segments` that share no key with another range (a prompt and its branches make one).
    pub groups: Vec<Range<usize>>,
}

/// Sizes of the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads H.
    pub heads: usize,
    /// Key-value heads Hkv, a divisor of H.
    pub kv_heads: usize,
    /// Head size D.
    pub dim: usize,
}

/// How a score is made of a query and a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreRule {
    /// Factor of q·k.
    pub scale: f64,
    /// Positions that a query sees, its own included; prefix and own segment count as one sequence.
    pub window: Option<usize>,
    /// A score s becomes cap · tanh(s / cap).
    pub cap: Option<f64>,
}

impl ScoreRule {
    /// Returns the rule of Llama: 1/√D, and nothing else.
    pub fn plain(shape: HeadShape) -> Self {
        Self { scale: 1.0 / (shape.dim as f64).sqrt(), window: None, cap: None }
    }
}

impl Segment {
    /// Own keys that the last query sees.
    pub(super) fn own_len(&self) -> usize {
        self.offset + self.queries
    }
    /// The two runs of keys as (first key row, number).
    fn runs(&self) -> [(usize, usize); 2] {
        // The place of a prefix that is not there means nothing and may be anywhere.
        let prefix = if self.prefix_len > 0 { self.prefix } else { self.own };
        [(prefix, self.prefix_len), (self.own, self.own_len())]
    }
}

/// Returns (Tq, Tk) after proving every row that the layout names to be inside, and queries and groups to be disjoint.
pub(super) fn check(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<(usize, usize)> {
    same_type(q, k)?;
    same_type(q, v)?;
    let HeadShape { heads, kv_heads, dim } = shape;
    let ((tq, cq), (tk, ck)) = (q.dims2()?, k.dims2()?);
    if kv_heads == 0
        || heads == 0
        || dim == 0
        || heads % kv_heads != 0
        || heads.checked_mul(dim) != Some(cq)
        || kv_heads.checked_mul(dim) != Some(ck)
        || v.dims2()? != (tk, ck)
    {
        bail!("attention: q {:?}, k {:?}, v {:?} for {shape:?}", q.shape(), k.shape(), v.shape());
    }
    let mut taken = vec![false; tq];
    // Sums that wrap around would pass for small ones, and unsafe code relies on this check.
    let fits = |first: usize, n: usize, rows: usize| first.checked_add(n).is_some_and(|end| end <= rows);
    for s in &layout.segments {
        let own_fits = s.offset.checked_add(s.queries).is_some_and(|n| fits(s.own, n, tk));
        let inside = own_fits && fits(s.query, s.queries, tq) && fits(s.prefix, s.prefix_len, tk);
        if !inside || s.queries == 0 {
            bail!("attention: {s:?} is outside {tq} queries and {tk} keys");
        }
        for taken in &mut taken[s.query..][..s.queries] {
            if std::mem::replace(taken, true) {
                bail!("attention: two segments share a query row");
            }
        }
    }
    let mut owner = vec![usize::MAX; tk];
    let mut next = 0;
    for (g, group) in layout.groups.iter().enumerate() {
        if group.start != next || group.end < group.start || group.end > layout.segments.len() {
            bail!("attention: groups do not cover the segments");
        }
        next = group.end;
        for (first, n) in layout.segments[group.clone()].iter().flat_map(Segment::runs) {
            for owner in &mut owner[first..first + n] {
                if *owner != usize::MAX && *owner != g {
                    bail!("attention: two groups share a key row");
                }
                *owner = g;
            }
        }
    }
    if next != layout.segments.len() {
        bail!("attention: groups do not cover the segments");
    }
    Ok((tq, tk))
}
