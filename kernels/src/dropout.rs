//! Inverted dropout whose mask is a pure function of its key and place: nothing to save, nothing to replay.

use crate::{
    parallel::for_rows,
    random::mix,
    real::Real,
    tensor::{matrix, read, with_type},
};
use candle_core::{Result, Tensor, bail};

/// What the mask of one application depends on.
#[derive(Clone, Copy, Debug)]
pub struct DropoutKey {
    /// Probability of a zero, in [0, 1).
    pub p: f64,
    /// Mixed from the seed, the step, the layer and the module.
    pub key: u64,
}

/// Returns `x` with elements zeroed with probability `p` and the others divided by `1 − p`. Shapes: x (T, C).
/// `rows[i]` names row `i` independently of the pack that it sits in. The backward pass is the same call on the gradient.
pub fn dropout(x: &Tensor, key: DropoutKey, rows: &[u64]) -> Result<Tensor> {
    let (t, c) = x.dims2()?;
    if rows.len() != t {
        bail!("dropout: {} row keys for {t} rows", rows.len());
    }
    if !(0.0..1.0).contains(&key.p) {
        bail!("dropout: probability {} is outside [0, 1)", key.p);
    }
    let keep = 1.0 - key.p;
    // 32 random bits a draw: an element survives when they lie below this bound.
    let bound = (keep * 4_294_967_296.0) as u64;
    with_type!(x, T => {
        let rx = read(x);
        let x_ = rx.slice::<T>()?;
        let mut out = vec![T::ZERO; t * c];
        for_rows(&mut out, c, |i, y| {
            let row = mix(key.key ^ mix(rows[i]));
            for (j, y) in y.iter_mut().enumerate() {
                if mix(row.wrapping_add(j as u64)) >> 32 < bound {
                    *y = x_[i * c + j] / T::of(keep);
                }
            }
        });
        matrix(out, t, c, x)
    })
}
