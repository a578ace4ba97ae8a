use kto_kernels::random::{below, key, mix, uniform};

#[test]
fn mix_is_splitmix64() {
    // The first outputs of the published generator from state 0: its state rises by the constant before each.
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let outputs = [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f];
    for (i, expected) in outputs.into_iter().enumerate() {
        assert_eq!(mix(GAMMA.wrapping_mul(i as u64)), expected);
    }
}

#[test]
fn keys_tell_order_and_number_of_parts_apart() {
    let keys = [key(&[]), key(&[0]), key(&[0, 0]), key(&[1]), key(&[1, 2]), key(&[2, 1]), key(&[1, 2, 0])];
    for (i, a) in keys.iter().enumerate() {
        assert!(keys[..i].iter().all(|b| a != b), "key {i}");
    }
}

/// Fails unless the mean of `n` draws of variance `variance` lies within five standard deviations of `expected`.
fn assert_mean(what: &str, sum: f64, n: f64, expected: f64, variance: f64) {
    assert!((sum / n - expected).abs() <= 5.0 * (variance / n).sqrt(), "{what}: mean {}", sum / n);
}

#[test]
fn draws_are_uniform_and_neighbours_independent() {
    const N: u64 = 100_000;
    for stream in [0, 1, u64::MAX, key(&[3, 4])] {
        let draws: Vec<f64> = (0..N).map(|i| uniform(stream, i)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        assert_mean("mean", draws.iter().sum(), N as f64, 0.5, 1.0 / 12.0);
        assert_mean("square", draws.iter().map(|u| u * u).sum(), N as f64, 1.0 / 3.0, 4.0 / 45.0);
        let products = draws.windows(2).map(|w| (w[0] - 0.5) * (w[1] - 0.5)).sum();
        assert_mean("next draw", products, N as f64 - 1.0, 0.0, 1.0 / 144.0);
        let other = draws.iter().zip(0..).map(|(u, i)| (u - 0.5) * (uniform(stream ^ 1, i) - 0.5)).sum();
        assert_mean("next stream", other, N as f64, 0.0, 1.0 / 144.0);
    }
}

#[test]
fn below_reaches_every_number_equally_often() {
    const N: u64 = 70_000;
    let mut counts = [0f64; 7];
    for i in 0..N {
        counts[below(5, i, 7) as usize] += 1.0;
    }
    for count in counts {
        assert_mean("number", count, N as f64, 1.0 / 7.0, 6.0 / 49.0);
    }
    assert!((0..100).all(|i| below(5, i, 1) == 0));
    assert!((0..100).all(|i| below(5, i, u64::MAX) < u64::MAX));
}
