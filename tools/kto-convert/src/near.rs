//! Nearly equal completions, by MinHash.
//!
//! The set of a text is its sequences of five words. Two records are nearly the same when the sets of prompt and completion
//! together, and those of the completions alone, both share more than a given part. Which records are compared at all is
//! decided by bands of the first signature; a record is compared with a few that came before it.
//! Source: Broder 1997; the banding of Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3.

use crate::filters::texts;
use kto_formats::record::Record;
use twox_hash::XxHash3_64;

/// Words of a sequence.
const WORDS: usize = 5;
/// Hashes of the whole record, and of the completion.
const WHOLE: usize = 128;
const SAID: usize = 64;
/// Bands of the first signature and the hashes of each: half of the pairs that share 0.7 meet in one.
pub const BANDS: usize = 16;
const ROWS: usize = WHOLE / BANDS;

/// The smallest hashes of a record's sets.
pub type Signature = [u32; WHOLE + SAID];

/// Bytes of a signature.
pub const BYTES: usize = size_of::<Signature>();

/// Returns the signature of a record.
pub fn signature(record: &Record) -> Box<Signature> {
    let mut signature = Box::new([u32::MAX; WHOLE + SAID]);
    let (whole, said) = signature.split_at_mut(WHOLE);
    for text in texts(&record.prompt) {
        sequences(text, |hash| note(whole, hash));
    }
    for text in texts(&record.completion) {
        sequences(text, |hash| {
            note(whole, hash ^ 1);
            note(said, hash);
        });
    }
    signature
}

/// Keys of the bands; records with a key in common are compared. Labels are kept apart.
pub fn bands(signature: &Signature, label: bool) -> impl Iterator<Item = u64> {
    signature[..WHOLE].chunks_exact(ROWS).enumerate().map(move |(band, rows)| {
        let mut bytes = [0; 4 * ROWS + 2];
        rows.iter()
            .zip(bytes.chunks_exact_mut(4))
            .for_each(|(row, out)| out.copy_from_slice(&row.to_le_bytes()));
        bytes[4 * ROWS] = band as u8;
        bytes[4 * ROWS + 1] = u8::from(label);
        XxHash3_64::oneshot(&bytes)
    })
}

/// The smaller of the two shares that two records have in common.
pub fn similarity(a: &Signature, b: &Signature) -> f64 {
    let share = |range: std::ops::Range<usize>| {
        let length = range.len() as f64;
        range.filter(|i| a[*i] == b[*i]).count() as f64 / length
    };
    share(0..WHOLE).min(share(WHOLE..WHOLE + SAID))
}

/// Gives the hash of every sequence of words, lower case, to `each`; of a shorter text the hash of all of it.
fn sequences(text: &str, mut each: impl FnMut(u64)) {
    let words: Vec<u64> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(|word| match word.bytes().any(|b| b.is_ascii_uppercase() || !b.is_ascii()) {
            true => XxHash3_64::oneshot(word.to_lowercase().as_bytes()),
            false => XxHash3_64::oneshot(word.as_bytes()),
        })
        .collect();
    let mix = |words: &[u64]| words.iter().fold(0_u64, |hash, word| mixed(hash.rotate_left(5) ^ word));
    if words.len() < WORDS {
        each(mix(&words));
    }
    words.windows(WORDS).for_each(|five| each(mix(five)));
}

/// SplitMix64's finish.
pub fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Lowers each hash of a signature. The i-th function is multiply-shift with an odd factor of its own.
fn note(hashes: &mut [u32], hash: u64) {
    let mut factor = 0x9e37_79b9_7f4a_7c15_u64;
    for least in hashes {
        *least = (*least).min((hash.wrapping_mul(factor) >> 32) as u32);
        factor = factor.wrapping_add(0x3c6e_f372_fe94_f82a);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kto_formats::record::Content;

    fn record(prompt: &str, completion: &str) -> Record {
        Record {
            prompt: Content::Text(prompt.into()),
            completion: Content::Text(completion.into()),
            label: true,
            tools: None,
            chat_template_kwargs: None,
            extra: serde_json::Map::new(),
        }
    }

    fn text(seed: u64, words: usize) -> Vec<String> {
        (0..words as u64).map(|i| format!("w{}", mixed(seed * 1000 + i) % 5000)).collect()
    }

    /// |A ∩ B| / |A ∪ B| of the word sequences.
    fn jaccard(a: &[String], b: &[String]) -> f64 {
        let set =
            |t: &[String]| t.windows(WORDS).map(|w| w.join(" ")).collect::<std::collections::BTreeSet<_>>();
        let (a, b) = (set(a), set(b));
        a.intersection(&b).count() as f64 / a.union(&b).count() as f64
    }

    #[test]
    fn the_estimate_is_near_the_truth() {
        for changed in [0, 2, 10, 40, 100] {
            let a = text(1, 400);
            let mut b = a.clone();
            for i in 0..changed {
                b[(i * 37) % 400] = format!("changed{i}");
            }
            let truth = jaccard(&a, &b);
            let (x, y) = (signature(&record("", &a.join(" "))), signature(&record("", &b.join(" "))));
            // Four standard deviations of the smaller sample.
            let error = 4.0 * (truth * (1.0 - truth) / SAID as f64).sqrt() + 0.02;
            let found = similarity(&x, &y);
            assert!((found - truth).abs() <= error, "{changed}: {found} for {truth}");
        }
    }

    #[test]
    fn one_prompt_does_not_make_two_answers_alike() {
        let prompt = text(1, 1000).join(" ");
        let (a, b) = (text(2, 60).join(" "), text(3, 60).join(" "));
        let one = signature(&record(&prompt, &a));
        assert!(similarity(&one, &signature(&record(&prompt, &b))) < 0.1);
        let case = signature(&record(&prompt, &format!("{}!", a.to_uppercase())));
        assert!(similarity(&one, &case) > 0.99);
        assert!(bands(&one, true).eq(bands(&case, true)));
        assert!(bands(&one, true).zip(bands(&case, false)).all(|(a, b)| a != b));
    }
}
