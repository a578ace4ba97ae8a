//! What decides an answer: seed and place, temperature and top-p, stop tokens and texts, the chat template.

use super::{data, ids, read_json, rows, run, testdata, text, trl_tokens, words};
use candle_core::DType;
use kto_formats::model_dir::ModelDir;
use kto_model::{base::BaseModel, generate::Generator};
use serde_json::{Value, json};

const PROMPTS: &[u8] = b"Once upon a time\nLily said\nThe dog\nOne day, a bird\nTom\n";

fn stories(flags: &str) -> String {
    let args = words(&format!("generate --model {} --text --max-new-tokens 40 {flags}", data("stories260k")));
    let output = run(&args, PROMPTS);
    assert_eq!(super::code(&output), 0, "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn a_seed_gives_the_same_draws_with_any_batch_and_threads() {
    let first = stories("--temperature 1 --seed 5");
    for flags in ["--batch 1", "--batch 2", "--threads 1", "--threads 3 --batch 4"] {
        assert_eq!(stories(&format!("--temperature 1 --seed 5 {flags}")), first, "{flags}");
    }
    assert_ne!(stories("--temperature 1 --seed 6"), first);
    let twice = run(
        &words(&format!(
            "generate --model {} --text --temperature 1 --max-new-tokens 40",
            data("stories260k")
        )),
        b"Tom\nTom\n",
    );
    let lines: Vec<String> = text(&twice.stdout).lines().map(str::to_string).collect();
    assert_ne!(lines[0], lines[1], "every row has draws of its own");
}

#[test]
fn tiny_top_p_and_tiny_temperature_are_greedy() {
    let greedy = stories("");
    assert_eq!(stories("--temperature 1 --top-p 0.000001"), greedy);
    assert_eq!(stories("--temperature 0.0001 --seed 9"), greedy);
    assert_ne!(stories("--temperature 1.5"), greedy);
}

/// Neighbours change the order of sums (products of few rows take another path), nothing else.
#[test]
fn logits_with_neighbours_are_those_alone() {
    let base = BaseModel::load(ModelDir::open(&testdata("stories260k")).unwrap(), DType::F32, 64).unwrap();
    let all = ids(&read_json(&testdata("stories260k/golden_ids_40.json")));
    let logits = |generator: &mut Generator, parts: &[(usize, &[u32])]| {
        generator.feed_batch(parts, false).unwrap().to_vec2::<f32>().unwrap()
    };
    for n in [2, 3, 7, 16, 33] {
        let mut batch = Generator::batch(&base, None, &vec![40; n]).unwrap();
        let mut single = Generator::new(&base, None, 40).unwrap();
        for i in 0..n {
            logits(&mut batch, &[(i, &all[..i + 1])]);
        }
        logits(&mut single, &[(0, &all[..n])]);
        let parts: Vec<(usize, &[u32])> = (0..n).map(|i| (i, &all[i + 1..i + 2])).collect();
        let together = logits(&mut batch, &parts);
        let alone = logits(&mut single, &[(0, &all[n..n + 1])]);
        let error = together[n - 1].iter().zip(&alone[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4, "{n} sequences: {error}");
    }
}

#[test]
fn a_stop_text_ends_an_answer_before_it() {
    let greedy = stories("").lines().next().unwrap().to_string();
    assert!(greedy.starts_with(", there was a little girl named Lily. She"), "{greedy}");
    let model = data("stories260k");
    let stop = |text: &str, max: &str| {
        let mut args = words(&format!("generate --model {model} --max-new-tokens {max}"));
        args.extend(["--stop".into(), text.into(), "--stop".into(), "never said".into()]);
        rows(&args, br#"{"prompt": "Once upon a time"}"#)[0].clone()
    };
    let row = stop("named Li", "40");
    assert_eq!(
        (row["completion"].as_str(), row["finish"].as_str()),
        (Some(", there was a little girl "), Some("stop"))
    );
    assert!(row["tokens"].as_u64().unwrap() < 20, "{row}");
    assert_eq!(stop("elephant", "9")["finish"], "length");
}

#[test]
fn answers_end_at_the_end_token_and_keep_the_columns() {
    let prompts = std::fs::read(testdata("demo/prompts.jsonl")).unwrap();
    let args = words(&format!("generate --model {}", data("demo/model")));
    let answers = rows(&args, &prompts);
    let asked: Vec<Value> = text(&prompts).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(answers.len(), asked.len());
    for (answer, asked) in answers.iter().zip(&asked) {
        assert_eq!((&answer["prompt"], &answer["answer"]), (&asked["prompt"], &asked["answer"]));
        assert_eq!(answer["finish"], "stop", "{answer}");
        assert!(!answer["completion"].as_str().unwrap().contains("<|"), "{answer}");
    }
    // The same question as text, as messages with an answer, and from a preference row.
    let question = asked[1]["prompt"][0]["content"].as_str().unwrap();
    let user = json!({"role": "user", "content": question});
    let assistant = json!({"role": "assistant", "content": "no"});
    for (flag, row) in [
        ("--chat", json!({"prompt": question})),
        ("--chat", json!({"messages": [user, assistant]})),
        ("-v", json!({"prompt": [user], "chosen": [assistant], "rejected": [assistant]})),
    ] {
        let found = rows(&[&args[..], &[flag.to_string()]].concat(), row.to_string().as_bytes());
        assert_eq!(found[0]["completion"], answers[1]["completion"], "{row}");
    }
    let begun = json!({"prompt": [user, {"role": "assistant", "content": "A painter"}]});
    let found = rows(&args, begun.to_string().as_bytes());
    assert_eq!(format!("A painter{}", found[0]["completion"].as_str().unwrap()), answers[1]["completion"]);
}

/// Prompts must have the ids that kto-tokenize gives them; TRL's are the standard.
#[test]
fn prompts_are_encoded_as_for_training() {
    let (model, tokens) = (data("trl/llama/model"), trl_tokens());
    let lines = std::fs::read_to_string(testdata("trl/llama/data.jsonl")).unwrap();
    let kept: Vec<String> = std::fs::read_to_string(testdata("trl/llama/tokenized.jsonl"))
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["id"].as_str().unwrap().to_string())
        .collect();
    let known: Vec<&str> =
        lines.lines().filter(|l| kept.iter().any(|id| l.contains(&format!("\"{id}\"")))).collect();
    let by_text =
        rows(&words(&format!("generate --model {model} --max-new-tokens 6")), known.join("\n").as_bytes());
    let prompts: Vec<String> =
        tokens.rows().map(|r| json!({"prompt_ids": r.prompt_ids}).to_string()).collect();
    let by_ids = rows(
        &words(&format!("generate --model {model} --max-new-tokens 6 --ids")),
        prompts.join("\n").as_bytes(),
    );
    assert_eq!((by_text.len(), by_ids.len()), (20, 20));
    let tokenizer =
        kto_formats::tokenizer::TextTokenizer::from_model_dir(&testdata("trl/llama/model")).unwrap();
    for (text, made) in by_text.iter().zip(&by_ids) {
        let decoded = tokenizer.decode(&ids(&made["completion_ids"])).unwrap();
        assert_eq!((&text["completion"], &text["tokens"]), (&json!(decoded), &made["tokens"]));
    }
}

#[test]
fn a_4_bit_model_generates_as_its_dense_form() {
    let model = ModelDir::open(&testdata("bnb/tiny_llama_bnb4")).unwrap();
    let base = BaseModel::load(model, DType::F32, 32).unwrap();
    let greedy = |logits: candle_core::Tensor| logits.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0];
    let mut generator = Generator::new(&base, None, 32).unwrap();
    let mut next = greedy(generator.feed(&[3, 9, 27], false).unwrap());
    let mut expected = Vec::new();
    for _ in 0..8 {
        expected.push(next);
        next = greedy(generator.feed(&[next], false).unwrap());
    }
    let args = words(&format!("generate --ids --max-new-tokens 8 --model {}", data("bnb/tiny_llama_bnb4")));
    let row = &rows(&args, br#"{"prompt_ids": [3, 9, 27]}"#)[0];
    let made = ids(&row["completion_ids"]);
    assert!(!made.is_empty() && expected.starts_with(&made), "{made:?} {expected:?}");
}
