//! Numbers made by transformers and TRL.

use super::{data, floats, ids, read_json, rows, testdata, text, token_set, trl_tokens, words};
use candle_core::{DType, Tensor};
use kto_formats::{model_dir::ModelDir, tensors::TensorStore, tokenizer::TextTokenizer};
use kto_model::{base::BaseModel, generate::Generator};
use serde_json::json;

const STORIES: &str = "stories260k";

fn stories() -> BaseModel {
    BaseModel::load(ModelDir::open(&testdata(STORIES)).unwrap(), DType::F32, 64).unwrap()
}

fn golden_ids() -> Vec<u32> {
    ids(&read_json(&testdata("stories260k/golden_ids_40.json")))
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    let base = stories();
    let store = TensorStore::open_file(&testdata("stories260k/golden_logits_40.safetensors")).unwrap();
    let golden = store.require("logits").unwrap().to_f32().unwrap();
    let golden = Tensor::from_vec(golden, (40, 512), &candle_core::Device::Cpu).unwrap();
    let largest: f32 = golden.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
    let all = Generator::new(&base, None, 40).unwrap().feed(&golden_ids(), true).unwrap();
    let error = largest_difference(&all, &golden);
    assert!(error <= 1e-4 * largest, "largest difference {error}, largest logit {largest}");
}

#[test]
fn one_token_at_a_time_gives_the_logits_of_all_at_once() {
    let (base, ids) = (stories(), golden_ids());
    let all = Generator::new(&base, None, 40).unwrap().feed(&ids, true).unwrap();
    for split in [&[1usize; 40][..], &[5, 1, 1, 30, 3]] {
        let mut generator = Generator::new(&base, None, 40).unwrap();
        let mut start = 0;
        let mut parts = Vec::new();
        for n in split {
            parts.push(generator.feed(&ids[start..start + n], true).unwrap());
            start += n;
        }
        let error = largest_difference(&all, &Tensor::cat(&parts, 0).unwrap());
        // Logits reach 22; products of one row and of many are summed in different orders.
        assert!(error <= 1e-4, "largest difference {error}");
    }
}

#[test]
fn greedy_text_is_the_golden_text() {
    let model = data(STORIES);
    let (prompt, rest) = (&golden_ids()[..5], &golden_ids()[5..]);
    let args = words(&format!("generate --model {model} --max-new-tokens 35"));
    let by_text = &rows(&args, br#"{"prompt": "Once upon a time", "id": 3}"#)[0];
    let tokenizer = TextTokenizer::from_model_dir(&testdata(STORIES)).unwrap();
    let whole = tokenizer.decode(&golden_ids()[1..]).unwrap();
    assert_eq!(format!("Once upon a time{}", by_text["completion"].as_str().unwrap()), whole.trim_start());
    assert_eq!(
        (&by_text["finish"], &by_text["tokens"], &by_text["id"]),
        (&json!("length"), &json!(35), &json!(3))
    );
    let args = words(&format!("generate --model {model} --max-new-tokens 35 --ids"));
    let by_ids = &rows(&args, json!({"prompt_ids": prompt}).to_string().as_bytes())[0];
    assert_eq!(ids(&by_ids["completion_ids"]), rest);
    let args = words(&format!("generate --model {model} --max-new-tokens 35 --text"));
    let plain = super::run(&args, b"Once upon a time");
    assert_eq!(text(&plain.stdout), format!("{}\n", by_text["completion"].as_str().unwrap()));
}

#[test]
fn log_probabilities_are_those_of_trl() {
    let batch = read_json(&testdata("trl/llama/first_batch.json"));
    let (model, adapter) = (data("trl/llama/model"), data("trl/llama/adapter_init"));
    let args = words(&format!("score --model {model} --adapter {adapter} --no-kl"));
    let scores = rows(&args, &super::bytes(&trl_tokens()));
    assert_eq!(scores.len(), 20);
    let golden =
        [("logps", "policy_logps_f64"), ("reference_logps", "ref_logps_f64"), ("reward", "rewards_f64")];
    for (ours, theirs) in golden {
        for (i, expected) in floats(&batch[theirs]).into_iter().enumerate() {
            let found = scores[i][ours].as_f64().unwrap();
            // TRL's own float32 is 3e-7 of the sum away from float64.
            let tolerance = if ours == "reward" { 1e-5 } else { 1e-6 * expected.abs() };
            assert!((found - expected).abs() <= tolerance, "row {i}: {ours} {found}, TRL {expected}");
        }
    }
}

/// TRL's KL pairs are a rotation inside the micro-batch; as rows of their own they must score the same.
#[test]
fn mismatched_pairs_score_as_in_trl() {
    let batch = read_json(&testdata("trl/llama/first_batch.json"));
    let own = trl_tokens();
    let pair = |i: usize| {
        let (prompt, completion) = (own.row(i).prompt_ids.to_vec(), own.row((i + 3) % 4).completion_ids);
        (prompt, completion.to_vec(), true)
    };
    let set = token_set(&(0..4).map(pair).collect::<Vec<_>>(), 384, 96);
    let (model, adapter) = (data("trl/llama/model"), data("trl/llama/adapter_init"));
    let args = words(&format!("score --model {model} --adapter {adapter} --no-kl"));
    let scores = rows(&args, &super::bytes(&set));
    for (ours, theirs) in [("logps", "policy_KL_logps_f64"), ("reference_logps", "ref_KL_logps_f64")] {
        for (score, expected) in scores.iter().zip(floats(&batch[theirs])) {
            assert!((score[ours].as_f64().unwrap() - expected).abs() <= 1e-6 * expected.abs());
        }
    }
}
