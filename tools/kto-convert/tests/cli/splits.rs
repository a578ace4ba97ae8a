//! Properties of the splits on many generated pairs: nothing is lost, nothing of a completion gets into a prompt.

use super::{run, text};
use serde_json::{Value, json};

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// Texts that a careless split trips over.
const PIECES: [&str; 14] = [
    " ",
    "I",
    " am",
    " amber",
    "\n",
    "\n\n",
    " é",
    "e\u{301}",
    " Human:",
    " Assistant:",
    "日本",
    "\u{1f914}",
    "\t",
    " blue.",
];

/// A small generator: the tests need variety, not quality.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
    fn words(&mut self, most: usize) -> String {
        (0..=self.below(most)).map(|_| PIECES[self.below(PIECES.len())]).collect()
    }
}

/// Converts pairs; returns per pair the two (prompt, completion) or `None` where the tool refused.
fn convert(pairs: &[(String, String)]) -> Vec<Option<[(String, String); 2]>> {
    let rows = pairs.iter().enumerate();
    let input: String =
        rows.map(|(i, (c, r))| format!("{}\n", json!({"id": i, "chosen": c, "rejected": r}))).collect();
    let output =
        run(&["-q", "--on-error", "skip", "--empty", "keep", "--dialogues", "text"], input.as_bytes());
    let mut out = vec![None; pairs.len()];
    let lines: Vec<Value> = text(&output.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for pair in lines.chunks(2) {
        let side =
            |v: &Value| (v["prompt"].as_str().unwrap().into(), v["completion"].as_str().unwrap().into());
        assert_eq!((&pair[0]["label"], &pair[1]["label"]), (&json!(true), &json!(false)));
        out[pair[0]["id"].as_u64().unwrap() as usize] = Some([side(&pair[0]), side(&pair[1])]);
    }
    out
}

#[test]
fn dialogues_give_back_their_completions_whole() {
    let mut random = Random(1);
    let mut pairs = Vec::new();
    let mut expected = Vec::new();
    for _ in 0..2000 {
        let turns: String = (0..=random.below(3))
            .map(|_| format!("{HUMAN} {}{ASSISTANT} {}", random.words(4), random.words(4)))
            .collect();
        let prompt = format!("{turns}{HUMAN} {}{ASSISTANT}", random.words(4));
        // Both begin alike more often than not, as real completions do.
        let begin = random.words(3);
        let (c, r) = (format!(" {begin}{}", random.words(3)), format!(" {begin}{}", random.words(3)));
        pairs.push((format!("{prompt}{c}"), format!("{prompt}{r}")));
        expected.push(Some([(prompt.clone(), c), (prompt, r)]));
    }
    for (found, expected) in convert(&pairs).iter().zip(&expected) {
        assert_eq!(found, expected);
    }
}

#[test]
fn plain_texts_are_never_cut_inside_a_word() {
    let mut random = Random(2);
    let pairs: Vec<(String, String)> = (0..3000)
        .map(|_| {
            let begin = random.words(6);
            (format!("{begin}{}", random.words(4)), format!("{begin}{}", random.words(4)))
        })
        .collect();
    let out = convert(&pairs);
    let mut split = 0;
    for ((chosen, rejected), sides) in pairs.iter().zip(&out) {
        let Some([a, b]) = sides else { continue };
        split += 1;
        assert_eq!(
            (&format!("{}{}", a.0, a.1), &format!("{}{}", b.0, b.1)),
            (chosen, rejected),
            "nothing is lost"
        );
        assert_eq!(a.0, b.0, "one prompt");
        for (prompt, completion) in [a, b] {
            let blank_after = completion.chars().next().is_some_and(char::is_whitespace);
            assert!(prompt.ends_with('\n') || blank_after, "{prompt:?} | {completion:?}");
            assert!(
                !prompt.trim().is_empty() && !completion.trim().is_empty(),
                "{prompt:?} | {completion:?}"
            );
        }
    }
    assert!(split > 1000, "most of them can be split: {split}");
}
