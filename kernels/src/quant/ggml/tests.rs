//! Properties of the ggml forms; that the bytes are ggml's is checked by scripts/oracle/gguf_peers.py against llama.cpp.

use super::{search::side_by_side, *};
use candle_core::Device;
use std::path::Path;

const ALL: [Ggml; 7] = [Ggml::Q4_0, Ggml::Q5_0, Ggml::Q5_1, Ggml::Q8_0, Ggml::Q4K, Ggml::Q5K, Ggml::Q6K];

fn round_trip(form: Ggml, values: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0xAA; form.planes(values.len())[0]];
    assert!(form.encode(values, [&mut bytes, &mut [], &mut []]));
    let mut back = vec![f32::NAN; values.len()];
    form.decode([&bytes, &[], &[]], &mut back);
    back
}

/// About normal, with a few large values.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 7u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.03).collect()
}

#[test]
fn errors_are_what_the_bits_allow() {
    let values = noise(256 * 64);
    let rms = |v: &mut dyn Iterator<Item = f32>| (v.map(|x| f64::from(x * x)).sum::<f64>()).sqrt();
    let norm = rms(&mut values.iter().copied());
    for (form, bound) in ALL.into_iter().zip([0.09, 0.045, 0.04, 0.006, 0.075, 0.037, 0.019]) {
        let back = round_trip(form, &values);
        let error = rms(&mut back.iter().zip(&values).map(|(b, v)| b - v)) / norm;
        assert!(error < bound && error > bound / 4.0, "{form:?}: {error}");
    }
}

#[test]
fn zeros_stay_zeros_and_constants_are_near() {
    for form in ALL {
        assert!(round_trip(form, &[0.0; 512]).iter().all(|v| *v == 0.0), "{form:?}");
        for constant in [0.75f32, -0.3, 1e-2] {
            let back = round_trip(form, &[constant; 256]);
            assert!(
                back.iter().all(|v| (v - constant).abs() < 0.13 * constant.abs()),
                "{form:?}: {} for {constant}",
                back[0]
            );
        }
    }
}

#[test]
fn values_beyond_half_precision_are_told() {
    let mut bytes = vec![0; 512];
    for form in ALL {
        let bytes = &mut bytes[..form.planes(256)[0]];
        assert!(!form.encode(&[1e9; 256].map(|v: f32| -v), [bytes, &mut [], &mut []]), "{form:?}");
    }
}

/// Blocks of the gguf package (scripts/oracle/gguf_blocks.py): every form that is read decodes to its values, bit for bit.
#[test]
fn blocks_decode_as_the_gguf_package_does() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/gguf/blocks.safetensors");
    let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let written = ["Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"];
    let read = [
        ("Q4_1", ReadOnly::Q4_1),
        ("Q2_K", ReadOnly::Q2K),
        ("Q3_K", ReadOnly::Q3K),
        ("IQ4_NL", ReadOnly::Iq4Nl),
        ("IQ4_XS", ReadOnly::Iq4Xs),
    ];
    let check = |name: &str, decode: &dyn Fn(&[u8], &mut [f32])| {
        let bytes: Vec<u8> = golden[name].flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f32> = golden[&format!("{name}.values")].flatten_all().unwrap().to_vec1().unwrap();
        let mut out = vec![f32::NAN; values.len()];
        decode(&bytes, &mut out);
        let differs = out.iter().zip(&values).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{name}");
    };
    for (name, form) in written.into_iter().zip(ALL) {
        check(name, &|bytes, out| form.decode([bytes, &[], &[]], out));
    }
    for (name, form) in read {
        check(name, &|bytes, out| form.decode(bytes, out));
    }
    assert_eq!(golden.len(), 2 * (written.len() + read.len()));
}

/// The searches run over all groups of a block side by side; what they find for one is what they find for it alone.
#[test]
fn groups_beside_each_other_do_not_meet() {
    let mut values = noise(256);
    values[32..64].fill(0.25); // one value
    values[64..96].fill(0.0);
    values[96..128].iter_mut().for_each(|v| *v = v.abs()); // no minimum
    values[128..160].iter_mut().for_each(|v| *v *= 1e-6);
    let weights: Vec<f32> = values.iter().map(|v| 0.1 + v.abs()).collect();
    let grid = search::Grid { most: 15.0, first: -1.0, tries: 20 };
    let together = search::with_minimum::<8, 32>(&side_by_side(&values), &side_by_side(&weights), grid);
    for (g, (x, w)) in values.chunks(32).zip(weights.chunks(32)).enumerate() {
        let alone = search::with_minimum::<1, 32>(&side_by_side(x), &side_by_side(w), grid);
        assert_eq!((together.scale[g], together.minimum[g]), (alone.scale[0], alone.minimum[0]), "group {g}");
        assert!(together.codes.iter().zip(alone.codes).all(|(all, one)| all[g] == one[0]), "group {g}");
    }
    let together = search::symmetric::<16, 16>(&side_by_side(&values));
    for (g, x) in values.chunks(16).enumerate() {
        assert_eq!(together[g], search::symmetric::<1, 16>(&side_by_side(x))[0], "group {g}");
    }
}

/// As f32::round, also one bit below a half.
#[test]
fn eight_bits_round_halves_away_from_zero() {
    let mut values = [0.0f32; 32];
    values[..7].copy_from_slice(&[127.0, 0.5, -0.5, 0.499_999_97, -1.5, 2.5, 126.499_99]);
    let mut bytes = [0; 34];
    assert!(Ggml::Q8_0.encode(&values, [&mut bytes, &mut [], &mut []]));
    assert_eq!(bytes[2..9].iter().map(|b| *b as i8).collect::<Vec<_>>(), [127, 1, -1, 0, -2, 3, 126]);
}
