//! Scores: the summary against the rows, KL partners, references, 4-bit models.

use super::{bytes, code, data, read_json, rows, run, testdata, text, token_set, trl_tokens, words};
use candle_core::DType;
use kto_formats::{
    adapter::{Adapter, AdapterMeta},
    lora::LoraModule,
    model_dir::ModelDir,
    tensors::TensorStore,
};
use kto_model::{base::BaseModel, generate::Generator};
use serde_json::Value;

pub fn trl(flags: &str) -> Vec<String> {
    let (model, adapter) = (data("trl/llama/model"), data("trl/llama/adapter_init"));
    words(&format!("score --model {model} --adapter {adapter} {flags}"))
}

pub(super) fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"))
}

#[test]
fn the_summary_is_that_of_the_rows() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s.json");
    let scores = rows(&trl(&format!("--summary {} --beta 0.3", file.display())), &bytes(&trl_tokens()));
    let summary = read_json(&file);
    let mean = |key: &str, wanted: Option<bool>| {
        let of: Vec<f64> = scores
            .iter()
            .filter(|r| wanted.is_none_or(|w| r["label"] == w))
            .map(|r| number(r, key))
            .collect();
        of.iter().sum::<f64>() / of.len() as f64
    };
    let near = |key: &str, expected: f64| {
        let found = number(&summary, key);
        assert!((found - expected).abs() < 1e-9 * expected.abs().max(1.0), "{key}: {found}, {expected}");
    };
    near("rows", 20.0);
    near("kl_raw", mean("kl", None));
    near("kl", mean("kl", None).max(0.0));
    near("rewards/chosen", mean("reward", Some(true)));
    near("rewards/margins", mean("reward", Some(true)) - mean("reward", Some(false)));
    near("beta", 0.3);
    let sign = |r: &Value| if r["label"] == true { 1.0 } else { -1.0 };
    let right = scores.iter().filter(|r| number(r, "reward") * sign(r) > 0.0).count();
    near("rewards/accuracies", right as f64 / 20.0);
    let tokens: f64 = scores.iter().map(|r| number(r, "tokens")).sum();
    near("tokens", tokens);
    near("perplexity", (-mean("logps", None) * 20.0 / tokens).exp());
    for (i, row) in scores.iter().enumerate() {
        assert_eq!(number(row, "row"), (i + 1) as f64);
        assert!(
            (number(row, "reward") - 0.3 * (number(row, "logps") - number(row, "reference_logps"))).abs()
                < 1e-12
        );
        assert!(
            (number(row, "kl") - (number(row, "kl_logps") - number(row, "kl_reference_logps"))).abs() < 1e-12
        );
    }
}

#[test]
fn partners_come_from_other_prompts_and_from_the_seed() {
    let own = trl_tokens();
    let partners = |flags: &str| {
        let scores = rows(&trl(flags), &bytes(&own));
        scores.iter().map(|r| number(r, "kl_from") as usize - 1).collect::<Vec<_>>()
    };
    let first = partners("");
    assert!(first.iter().enumerate().all(|(i, p)| own.row(i).prompt_ids != own.row(*p).prompt_ids));
    assert_eq!(first, partners("--seed 42 --threads 1"));
    assert_ne!(first, partners("--seed 43"));
    // A mismatched pair scores as the same pair does as a row of its own.
    let pair = (own.row(0).prompt_ids.to_vec(), own.row(first[0]).completion_ids.to_vec(), true);
    let alone = &rows(&trl("--no-kl"), &bytes(&token_set(&[pair], 384, 96)))[0];
    let scores = rows(&trl(""), &bytes(&own));
    assert!((number(alone, "logps") - number(&scores[0], "kl_logps")).abs() < 1e-4);
    assert!(alone.get("kl").is_none());
}

#[test]
fn references_can_be_the_base_an_adapter_or_a_model() {
    let input = bytes(&trl_tokens());
    let by_base = rows(&trl("--no-kl"), &input);
    let by_model = rows(&trl(&format!("--no-kl --reference {}", data("trl/llama/model"))), &input);
    assert_eq!(by_base, by_model);
    let same = rows(&trl(&format!("--no-kl --reference {}", data("trl/llama/adapter_init"))), &input);
    assert!(same.iter().all(|r| number(r, "reward") == 0.0));
    let model = data("trl/llama/model");
    let swapped = rows(
        &words(&format!("score --no-kl --model {model} --reference {}", data("trl/llama/adapter_init"))),
        &input,
    );
    for (a, b) in by_base.iter().zip(&swapped) {
        assert_eq!((&a["logps"], &a["reference_logps"]), (&b["reference_logps"], &b["logps"]));
    }
    let bare = rows(&words(&format!("score --model {model}")), &input);
    assert!(bare.iter().zip(&by_base).all(|(a, b)| a["logps"] == b["reference_logps"] && a["reward"] == 0.0));
}

/// The sweep of packs and the cache of generation are two ways to one number, also with quantized weights.
#[test]
fn quantized_models_score_as_their_logits_say() {
    for model in ["bnb/tiny_llama_bnb4", "bnb/tiny_llama_int8"] {
        scores_as_its_logits_say(model);
    }
}

fn scores_as_its_logits_say(model: &str) {
    let (prompt, completion) = (vec![7u32, 1, 200, 31], vec![5u32, 99, 180]);
    let base = BaseModel::load(ModelDir::open(&testdata(model)).unwrap(), DType::F32, 8).unwrap();
    let all = [&prompt[..], &completion].concat();
    let logits = Generator::new(&base, None, 8).unwrap().feed(&all, true).unwrap().to_vec2::<f32>().unwrap();
    let logp = |row: &[f32], id: u32| {
        let total: f64 = row.iter().map(|v| (*v as f64).exp()).sum();
        row[id as usize] as f64 - total.ln()
    };
    let expected: f64 = completion.iter().enumerate().map(|(i, id)| logp(&logits[3 + i], *id)).sum();
    let set = token_set(&[(prompt, completion, true)], 256, 16);
    let args = words(&format!("score --model {} --no-kl", data(model)));
    let found = number(&rows(&args, &bytes(&set))[0], "logps");
    assert!((found - expected).abs() < 1e-4, "{found} {expected}");
}

/// The log-probabilities of transformers with an adapter of PEFT, some of rows that have outgrown LongRoPE's first length.
#[test]
fn families_of_another_form_score_as_transformers_does() {
    for name in ["phi3", "phi3-longrope", "phi4-mini", "stablelm"] {
        let model = testdata(&format!("families/{name}"));
        let golden = TensorStore::open_file(&model.join("golden.safetensors")).unwrap();
        let floats = |name: &str| golden.require(name).unwrap().to_f32().unwrap();
        let ids = |name: String| -> Vec<u32> {
            let bytes = golden.require(&name).unwrap().data;
            bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let rows_of = [0, 1].map(|i| (ids(format!("{i}.prompt")), ids(format!("{i}.completion")), i == 0));
        let mut adapter = Adapter::read(&testdata("trl/llama/adapter_init")).unwrap();
        (adapter.config.r, adapter.config.lora_alpha) = (2, 3.0);
        let modules = golden.names().filter_map(|n| n.strip_prefix("lora/")?.strip_suffix(".lora_A.weight"));
        let pair = |module: &str| {
            let [a, b] = ["A", "B"].map(|side| floats(&format!("lora/{module}.lora_{side}.weight")));
            let (in_features, out_features) = (a.len() / 2, b.len() / 2);
            LoraModule { a, b, r: 2, in_features, out_features, scale: 1.5, magnitude: None }
        };
        adapter.tensors = modules.map(|module| (module.to_string(), pair(module))).collect();
        let dir = tempfile::tempdir().unwrap();
        adapter.write(dir.path(), AdapterMeta::default()).unwrap();
        let (model, adapter) = (model.display(), dir.path().display());
        let args = words(&format!("score --model {model} --adapter {adapter} --no-kl"));
        let found = rows(&args, &bytes(&token_set(&rows_of, 48, 64)));
        for key in ["logps", "reference_logps"] {
            for (row, expected) in found.iter().zip(floats(key)) {
                let off = (number(row, key) - f64::from(expected)).abs();
                assert!(off < 1e-5 * f64::from(expected).abs(), "{name} {key}: {row} {expected}");
            }
        }
    }
}

#[test]
fn pairs_of_one_prompt_are_ranked() {
    let (a, b) = (vec![5u32, 6], vec![8u32]);
    let set = token_set(
        &[
            (a.clone(), vec![9, 10], true),
            (a.clone(), vec![11], false),
            (b.clone(), vec![12], true),
            (b, vec![13, 14], false),
            (a, vec![15], false),
        ],
        384,
        16,
    );
    let output = run(&trl("--summary - -q"), &bytes(&set));
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let scores = rows(&trl(""), &bytes(&set));
    let reward = |i: usize| number(&scores[i], "reward");
    let right = [(0, 1), (0, 4), (2, 3)].iter().filter(|(c, r)| reward(*c) > reward(*r)).count();
    assert_eq!((number(&summary, "pairs"), number(&summary, "pairs/accuracies")), (3.0, right as f64 / 3.0));
    assert!(output.stderr.is_empty());
}

#[test]
fn an_assertion_that_is_met_ends_with_1() {
    let input = bytes(&trl_tokens());
    let run = |flags: &[&str]| {
        run(&[trl("--no-kl --no-rows"), flags.iter().map(|f| f.to_string()).collect()].concat(), &input)
    };
    let good = run(&["--fail-if", "accuracy<0.1", "--fail-if", "rows != 20"]);
    assert_eq!((code(&good), good.stdout.len()), (0, 0), "{}", text(&good.stderr));
    let bad = run(&["--fail-if", "accuracy<0.1", "--fail-if", "accuracy <= 0.99"]);
    assert_eq!(code(&bad), 1);
    assert!(text(&bad.stderr).contains("--fail-if accuracy <= 0.99: rewards/accuracies is 0.55"));
    let quiet = run(&["-q", "--fail-if", "accuracy <= 0.99"]);
    assert_eq!(
        (code(&quiet), text(&quiet.stderr).as_str()),
        (1, "kto-eval: --fail-if accuracy <= 0.99: rewards/accuracies is 0.55\n")
    );
    for text in ["kl<9", "kl_raw<9", "loss<1"] {
        assert_eq!(code(&run(&["--fail-if", text])), 2, "--no-kl leaves it out: {text}");
    }
    assert_eq!(code(&run(&["--loss", "sft", "--fail-if", "loss<0"])), 0);
    assert_eq!(code(&run(&["--fail-if", "accuracy"])), 2);
    assert_eq!(code(&run(&["--fail-if", "acuracy<1"])), 2);
}

#[test]
fn a_failed_assertion_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (out, summary) = (dir.path().join("rows"), dir.path().join("summary"));
    let files = format!("--no-kl -o {} --summary {} --fail-if", out.display(), summary.display());
    let input = bytes(&trl_tokens());
    assert_eq!(code(&run(&trl(&format!("{files} rows==20")), &input)), 1);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(code(&run(&trl(&format!("{files} rows!=20")), &input)), 0);
    assert!(out.exists() && summary.exists());
}

#[test]
fn an_adapter_in_a_run_is_scored_with_the_runs_loss() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("adapter");
    std::fs::create_dir(&inner).unwrap();
    for file in std::fs::read_dir(testdata("trl/llama/adapter_init")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), inner.join(file.file_name())).unwrap();
    }
    let plan = |text: &str| std::fs::write(dir.path().join("run.json"), text).unwrap();
    let input = bytes(&trl_tokens());
    let model = data("trl/llama/model");
    let score = |adapter: &std::path::Path, flags: &str| {
        let flags = format!("--summary - --no-kl {flags}");
        run(&words(&format!("score --model {model} --adapter {} {flags}", adapter.display())), &input)
    };
    let summary = |adapter: &std::path::Path, flags: &str| {
        let output = score(adapter, flags);
        assert_eq!(code(&output), 0, "{}", text(&output.stderr));
        (serde_json::from_slice::<Value>(&output.stdout).unwrap(), text(&output.stderr))
    };
    assert_eq!(summary(&inner, "").0["beta"], 0.1);
    plan(
        r#"{"tool": "kto-train", "plan": {"loss": "apo-zero", "beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 1.0}}"#,
    );
    let (own, lines) = summary(&inner, "");
    assert!(own["beta"] == 0.5 && lines.contains("beta 0.5, loss "), "{lines}");
    assert_eq!(summary(dir.path(), "").0, own, "a run directory stands for its adapter");
    let (flags, _) = summary(&inner, "--beta 0.5 --loss apo-zero --desirable-weight 2");
    assert_eq!(flags, own);
    assert_eq!(summary(&inner, "--beta 0.2").0["beta"], 0.2);
    assert!(summary(&inner, "--loss kto").0.get("loss").is_none());
    plan(r#"{"tool": "kto-train", "plan": {"beta": -1}}"#);
    let bad = score(&inner, "");
    assert!(code(&bad) == 65 && text(&bad.stderr).contains("\"beta\" cannot be -1\nhint: --beta"));
    assert_eq!(code(&score(&inner, "--beta 1")), 0);
    plan("no JSON");
    let (by_default, lines) = summary(&inner, "");
    assert!(by_default["beta"] == 0.1 && lines.contains("warning: "), "{lines}");
}

#[test]
fn an_untrained_model_is_not_right_about_anything() {
    let line = format!("score --model {} --summary -", data("trl/llama/model"));
    let output = run(&words(&line), &bytes(&trl_tokens()));
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((number(&summary, "rewards/accuracies"), number(&summary, "kl")), (0.0, 0.0));
    assert!(text(&output.stderr).starts_with("kto-eval: warning: no --adapter and no --reference"));
}
