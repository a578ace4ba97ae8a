//! The searches for scales of the K forms, for all groups of a block side by side: a lane sums its group in the order of ggml.

/// Below this magnitude a group counts as zeros.
pub const NOTHING: f32 = 1e-15;

/// Values of N groups: the first of each, the second of each, and so on.
pub type Groups<const N: usize, const VALUES: usize> = [[f32; N]; VALUES];

/// Lays out N groups that lie one behind the other.
#[inline(always)]
pub fn side_by_side<const N: usize, const VALUES: usize>(x: &[f32]) -> Groups<N, VALUES> {
    let mut groups = [[0.0; N]; VALUES];
    for (lane, group) in x.as_chunks::<VALUES>().0.iter().take(N).enumerate() {
        for (values, v) in groups.iter_mut().zip(group) {
            values[lane] = *v;
        }
    }
    groups
}

/// Returns `f` of every lane.
#[inline(always)]
pub fn each<const N: usize>(f: impl Fn(usize) -> f32) -> [f32; N] {
    let mut lanes = [0.0; N];
    // No for_each: what is not inlined knows nothing of the wider instructions.
    for (lane, out) in lanes.iter_mut().enumerate() {
        *out = f(lane);
    }
    lanes
}

/// The grid of scales that [`with_minimum`] tries.
#[derive(Clone, Copy)]
pub struct Grid {
    /// Largest code.
    pub most: f32,
    /// Added to it at the first try.
    pub first: f32,
    /// Number of further tries, 0.1 apart.
    pub tries: i32,
}

/// What [`with_minimum`] finds for N groups.
pub struct Found<const N: usize, const VALUES: usize> {
    pub scale: [f32; N],
    pub minimum: [f32; N],
    pub codes: Groups<N, VALUES>,
}

/// Finds codes 0 to `most` with `x ≈ scale · code − minimum`, minimum at least 0, so that the squared error weighted by `weights` is
/// small. For every scale of the grid the codes are rounded and then the best scale and minimum for these codes solved for.
#[inline(always)]
pub fn with_minimum<const N: usize, const VALUES: usize>(
    x: &Groups<N, VALUES>,
    weights: &Groups<N, VALUES>,
    grid: Grid,
) -> Found<N, VALUES> {
    let most = grid.most;
    let (mut low, mut high, mut sum_w) = (x[0], x[0], weights[0]);
    let mut sum_x: [f32; N] = each(|g| weights[0][g] * x[0][g]);
    for (v, w) in x.iter().zip(weights).skip(1) {
        low = each(|g| if v[g] < low[g] { v[g] } else { low[g] });
        high = each(|g| if v[g] > high[g] { v[g] } else { high[g] });
        sum_w = each(|g| sum_w[g] + w[g]);
        sum_x = each(|g| sum_x[g] + w[g] * v[g]);
    }
    low = each(|g| if low[g] > 0.0 { 0.0 } else { low[g] });
    let first = low;
    let inverse: [f32; N] = each(|g| most / (high[g] - low[g]));
    let mut scale = inverse.map(|inverse| 1.0 / inverse);
    let mut best = [[0.0; N]; VALUES];
    for (l, v) in best.iter_mut().zip(x) {
        *l = each(|g| nearest(inverse[g] * (v[g] - low[g]), 0.0, most));
    }
    let mut least = error(x, weights, &scale, &low, &best);
    for step in 0..=grid.tries {
        let inverse: [f32; N] = each(|g| (grid.first + 0.1 * step as f32 + most) / (high[g] - low[g]));
        let mut codes = [[0.0; N]; VALUES];
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; N], [0.0; N], [0.0; N]);
        for ((l, v), w) in codes.iter_mut().zip(x).zip(weights) {
            *l = each(|g| nearest(inverse[g] * (v[g] - low[g]), 0.0, most));
            sum_l = each(|g| sum_l[g] + w[g] * l[g]);
            sum_l2 = each(|g| sum_l2[g] + w[g] * l[g] * l[g]);
            sum_xl = each(|g| sum_xl[g] + w[g] * l[g] * v[g]);
        }
        let determinant: [f32; N] = each(|g| sum_w[g] * sum_l2[g] - sum_l[g] * sum_l[g]);
        let solved: [f32; N] = each(|g| (sum_l2[g] * sum_x[g] - sum_l[g] * sum_xl[g]) / determinant[g]);
        let this_low: [f32; N] = each(|g| if solved[g] > 0.0 { 0.0 } else { solved[g] });
        let this_scale: [f32; N] = each(|g| match solved[g] > 0.0 {
            true => sum_xl[g] / sum_l2[g],
            false => (sum_w[g] * sum_xl[g] - sum_x[g] * sum_l[g]) / determinant[g],
        });
        let this_error = error(x, weights, &this_scale, &this_low, &codes);
        let better: [bool; N] = std::array::from_fn(|g| determinant[g] > 0.0 && this_error[g] < least[g]);
        if better.contains(&true) {
            let choose = |new: &[f32; N], old: &[f32; N]| each(|g| if better[g] { new[g] } else { old[g] });
            least = choose(&this_error, &least);
            scale = choose(&this_scale, &scale);
            low = choose(&this_low, &low);
            for (best, codes) in best.iter_mut().zip(&codes) {
                *best = choose(codes, best);
            }
        }
    }
    // A group of one value: codes 0 and the value as the minimum.
    let is_flat = |g: usize| first[g] == high[g];
    for l in &mut best {
        *l = each(|g| if is_flat(g) { 0.0 } else { l[g] });
    }
    Found {
        scale: each(|g| if is_flat(g) { 0.0 } else { scale[g] }),
        minimum: each(|g| if is_flat(g) { -first[g] } else { -low[g] }),
        codes: best,
    }
}

/// Rounds to the nearest of the integers from `least` to `most`, ties to even.
#[inline(always)]
pub fn nearest(v: f32, least: f32, most: f32) -> f32 {
    v.round_ties_even().clamp(least, most)
}

/// The weighted squared error of scale · code + low.
#[inline(always)]
fn error<const N: usize, const VALUES: usize>(
    x: &Groups<N, VALUES>,
    weights: &Groups<N, VALUES>,
    scale: &[f32; N],
    low: &[f32; N],
    codes: &Groups<N, VALUES>,
) -> [f32; N] {
    let mut sum = [0.0; N];
    for ((l, v), w) in codes.iter().zip(x).zip(weights) {
        let off: [f32; N] = each(|g| scale[g] * l[g] + low[g] - v[g]);
        sum = each(|g| sum[g] + w[g] * (off[g] * off[g]));
    }
    sum
}

/// Largest magnitude of a code of [`symmetric`].
const MOST: f32 = 32.0;

/// Finds scales with `x ≈ scale · (code − 32)`, codes 0 to 63, errors weighted by x².
#[inline(always)]
pub fn symmetric<const N: usize, const VALUES: usize>(x: &Groups<N, VALUES>) -> [f32; N] {
    let mut extreme = [0.0f32; N];
    for v in x {
        extreme = each(|g| if v[g].abs() > extreme[g].abs() { v[g] } else { extreme[g] });
    }
    let (sum_lx, sum_l2) = sums(x, extreme.map(|extreme| -MOST / extreme));
    let mut scale: [f32; N] = each(|g| if sum_l2[g] == 0.0 { 0.0 } else { sum_lx[g] / sum_l2[g] });
    let mut best: [f32; N] = each(|g| scale[g] * sum_lx[g]);
    for step in (-9..=9).filter(|step| *step != 0) {
        let (sum_lx, sum_l2) = sums(x, extreme.map(|extreme| -(MOST + 0.1 * step as f32) / extreme));
        let better = |g: usize| sum_l2[g] > 0.0 && sum_lx[g] * sum_lx[g] > best[g] * sum_l2[g];
        let new: [f32; N] = each(|g| if better(g) { sum_lx[g] / sum_l2[g] } else { scale[g] });
        best = each(|g| if better(g) { new[g] * sum_lx[g] } else { best[g] });
        scale = new;
    }
    each(|g| if extreme[g].abs() < NOTHING { 0.0 } else { scale[g] })
}

/// The weighted sums of value · code and of code², for codes that are rounded with these inverse scales.
#[inline(always)]
fn sums<const N: usize, const VALUES: usize>(
    x: &Groups<N, VALUES>,
    inverse: [f32; N],
) -> ([f32; N], [f32; N]) {
    let (mut sum_lx, mut sum_l2) = ([0.0; N], [0.0; N]);
    for v in x {
        let l: [f32; N] = each(|g| nearest(inverse[g] * v[g], -MOST, MOST - 1.0));
        sum_lx = each(|g| sum_lx[g] + v[g] * v[g] * v[g] * l[g]);
        sum_l2 = each(|g| sum_l2[g] + v[g] * v[g] * l[g] * l[g]);
    }
    (sum_lx, sum_l2)
}
