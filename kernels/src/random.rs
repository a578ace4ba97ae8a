//! Counter-based random numbers: every draw is a pure function of what it is for, so nothing has to be saved or replayed.

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection that spreads every bit.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Folds several numbers, in order, into one key.
pub fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |k, part| mix(k ^ mix(*part)))
}

/// Returns draw `i` of the stream `key`, uniform in [0, 1).
pub fn uniform(key: u64, i: u64) -> f64 {
    (mix(key.wrapping_add(mix(i))) >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns draw `i` of the stream `key`, uniform in `0..n` (`n` above 0).
pub fn below(key: u64, i: u64, n: u64) -> u64 {
    ((mix(key.wrapping_add(mix(i))) as u128 * n as u128) >> 64) as u64
}
