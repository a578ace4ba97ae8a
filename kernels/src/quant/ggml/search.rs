//! The searches for scales of the K forms.

/// Below this magnitude a group counts as zeros.
pub const NOTHING: f32 = 1e-15;

/// Rounds half to even, as adding and taking away 1.5 · 2^23 does.
#[inline(always)]
pub fn nearest(v: f32) -> i32 {
    v.round_ties_even() as i32
}

/// The grid of scales that [`with_minimum`] tries.
#[derive(Clone, Copy)]
pub struct Grid {
    /// Largest code.
    pub most: i32,
    /// Added to it at the first try.
    pub first: f32,
    /// Number of further tries, 0.1 apart.
    pub tries: i32,
}

/// Finds codes 0 to `most` of 32 values with `x ≈ scale · code − minimum`, minimum at least 0, so that the squared error weighted by
/// `weights` is small. Returns scale and minimum; codes go into `codes`.
/// For every scale of the grid the codes are rounded and then the best scale and minimum for these codes solved for.
pub fn with_minimum(x: &[f32; 32], weights: &[f32; 32], grid: Grid, codes: &mut [u8]) -> (f32, f32) {
    let (mut low, mut high) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (&v, &w) in x.iter().zip(weights).skip(1) {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
        sum_w += w;
        sum_x += w * v;
    }
    low = if low > 0.0 { 0.0 } else { low };
    if high == low {
        codes.fill(0);
        return (0.0, -low);
    }
    let most = grid.most as f32;
    let round = |inverse: f32, low: f32, rounded: &mut [f32; 32]| {
        for (r, &v) in rounded.iter_mut().zip(x) {
            *r = (inverse * (v - low)).round_ties_even().clamp(0.0, most);
        }
    };
    let error = |scale: f32, low: f32, rounded: &[f32; 32]| {
        let mut sum = 0.0;
        for ((&r, &v), &w) in rounded.iter().zip(x).zip(weights) {
            let off = scale * r + low - v;
            sum += w * (off * off);
        }
        sum
    };
    let (start, span) = (low, high - low);
    let inverse = most / span;
    let mut scale = 1.0 / inverse;
    let (mut best, mut rounded) = ([0.0; 32], [0.0; 32]);
    round(inverse, start, &mut best);
    let mut least = error(scale, low, &best);
    for step in 0..=grid.tries {
        let inverse = (grid.first + 0.1 * step as f32 + most) / (high - low);
        round(inverse, low, &mut rounded);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for ((&l, &v), &w) in rounded.iter().zip(x).zip(weights) {
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * v;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_low > 0.0 {
                this_low = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let this_error = error(this_scale, this_low, &rounded);
            if this_error < least {
                (least, scale, low) = (this_error, this_scale, this_low);
                best = rounded;
            }
        }
    }
    for (code, l) in codes.iter_mut().zip(best) {
        *code = l as u8;
    }
    (scale, -low)
}

/// Finds a scale for 16 values with `x ≈ scale · (code − 32)`, codes 0 to 63, errors weighted by x².
pub fn symmetric(x: &[f32]) -> f32 {
    const MOST: f32 = 32.0;
    let extreme = x.iter().fold(0.0, |most: f32, &v| if v.abs() > most.abs() { v } else { most });
    if extreme.abs() < NOTHING {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut sum_lx, mut sum_l2) = (0.0f32, 0.0f32);
        for &v in x {
            let l = (inverse * v).round_ties_even().clamp(-MOST, MOST - 1.0);
            let w = v * v;
            sum_lx += w * v * l;
            sum_l2 += w * l * l;
        }
        (sum_lx, sum_l2)
    };
    let (sum_lx, sum_l2) = sums(-MOST / extreme);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|step| *step != 0) {
        let (sum_lx, sum_l2) = sums(-(MOST + 0.1 * step as f32) / extreme);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}
