//! A row that makes loss and gradient overflow: what is named, what is listed, and that nothing of it is learnt.

use crate::{
    cli::{Bench, stderr, write},
    golden::Case,
};
use kto_formats::{
    adapter::Adapter,
    safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata},
    tensors::TensorStore,
    tokens::{TokenRow, TokenSet, prompt_hash},
};
use serde_json::Value;

/// A token that no golden row has. In the model below queries after it overflow.
pub const POISON: u32 = 22;
/// The row whose prompt ends with it, counted from 0.
pub const ROW: usize = 6;

/// Gives the bench a model whose queries overflow for [`POISON`] and stay as they are for all other tokens, and rows of which one has
/// it.
pub fn poison(b: &mut Bench) {
    let copy = b.dir.path().join("poisoned");
    std::fs::create_dir(&copy).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(b.model.join(name), copy.join(name)).unwrap();
    }
    let store = TensorStore::open_file(&b.model.join("model.safetensors")).unwrap();
    let specs = store.views().map(|v| TensorSpec::new(v.name, v.dtype, v.shape)).collect();
    let mut writer = SafetensorsWriter::new(&copy.join("model.safetensors"), specs, &pt_metadata()).unwrap();
    // Dimension 5 of the stream belongs to the token alone, and the first block's queries read it with a weight that overflows.
    const WIDTH: usize = 64;
    for view in store.views() {
        let mut values = view.to_f32().unwrap();
        match view.name {
            "model.embed_tokens.weight" => {
                values.chunks_exact_mut(WIDTH).for_each(|row| row[5] = 0.0);
                let row = &mut values[POISON as usize * WIDTH..][..WIDTH];
                row.fill(0.0);
                row[5] = 1.0;
            }
            "model.layers.0.self_attn.q_proj.weight" => {
                values.chunks_exact_mut(WIDTH).for_each(|row| row[5] = 3e38);
            }
            _ => {}
        }
        writer.write(view.name, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
    b.model = copy;
    write(&poisoned_rows(), &b.data);
}

/// The golden rows, one of them with the token at the end of its prompt.
pub fn poisoned_rows() -> TokenSet {
    let golden = Case::open("llama").tokens();
    let mut tokens = TokenSet::new(golden.meta.clone());
    for (i, row) in golden.rows().enumerate() {
        let mut prompt = row.prompt_ids.to_vec();
        assert!(!prompt.contains(&POISON) && !row.completion_ids.contains(&POISON));
        if i == ROW {
            prompt.push(POISON);
        }
        tokens.push(TokenRow { prompt_ids: &prompt, prompt_hash: prompt_hash(&prompt), ..row });
    }
    tokens
}

fn lines(b: &Bench, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(b.out().join(name)).unwrap_or_default();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn poisoned() -> Bench {
    let mut b = Bench::new();
    poison(&mut b);
    b
}

const FLAGS: [&str; 4] = ["--epochs", "2", "--lr", "1e-3"];

#[test]
fn a_run_stops_names_the_row_and_saves_the_step_before() {
    let (b, skipping) = (poisoned(), poisoned());
    let output = b.train(&FLAGS);
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(65), "{err}");
    let listed = lines(&b, "nonfinite.jsonl");
    assert_eq!(listed.len(), 1);
    let step = listed[0]["step"].as_u64().unwrap();
    assert!((1..=5).contains(&step), "{step}");
    let before = if step > 1 { format!("; step {} is saved", step - 1) } else { String::new() };
    let text = format!("step {step}: the loss is not finite (row {}){before}, its rows are listed", ROW + 1);
    assert!(err.contains(&text) && err.contains("--on-nonfinite skip"), "{err}");
    let row = &listed[0]["rows"][0];
    assert_eq!((listed[0]["rows"].as_array().unwrap().len(), row["row"].as_u64()), (1, Some(ROW as u64 + 1)));
    let golden = poisoned_rows();
    assert_eq!(row["label"].as_bool(), Some(golden.row(ROW).label));
    assert_eq!(row["prompt_tokens"].as_u64(), Some(golden.row(ROW).prompt_ids.len() as u64));
    assert!(row["logps"].is_null() && row["reference_logps"].is_null(), "{row}");
    assert_eq!(lines(&b, "metrics.jsonl").len() as u64, step - 1);
    assert!(!b.out().join("adapter").exists());
    // It can be gone on with, and then it is the run that had skipped from the start.
    let more = ["-q", "--on-nonfinite", "skip"];
    let resumed = b.train(&[&FLAGS[..], &more, &["--resume"]].concat());
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(skipping.train(&[&FLAGS[..], &more].concat()).status.success());
    for name in ["adapter/adapter_model.safetensors", "metrics.jsonl", "nonfinite.jsonl"] {
        let read = |b: &Bench| std::fs::read(b.out().join(name)).unwrap();
        assert!(read(&b) == read(&skipping), "{name}");
    }
}

#[test]
fn a_skipped_step_is_counted_and_has_no_effect() {
    let b = poisoned();
    let output = b.train(
        &[&FLAGS[..], &["--on-nonfinite", "skip", "--checkpoint-every", "1", "--keep-last", "99"]].concat(),
    );
    let err = stderr(&output);
    assert!(output.status.success(), "{err}");
    let (metrics, listed) = (lines(&b, "metrics.jsonl"), lines(&b, "nonfinite.jsonl"));
    assert_eq!((metrics.len(), listed.len()), (10, 2), "one step of each of two epochs");
    assert!(
        err.contains("skipped: the loss is not finite (row 7)") && err.contains("2 steps skipped"),
        "{err}"
    );
    let skipped: Vec<&Value> = metrics.iter().filter(|l| l["loss"].is_null()).collect();
    assert_eq!(skipped.len(), 2);
    for (line, listed) in skipped.iter().zip(&listed) {
        assert_eq!((&line["step"], &line["count/nonfinite"]), (&listed["step"], &Value::from(1)));
        assert!(line["grad_norm"].is_null() && line["learning_rate"].is_f64(), "{line}");
        let step = line["step"].as_u64().unwrap();
        if step == 1 {
            continue;
        }
        let state = |step: u64| {
            let path = b.out().join(format!("checkpoints/step-{step:08}/state.safetensors"));
            std::fs::read(path).unwrap()
        };
        assert!(state(step) == state(step - 1), "adapter and moments are as they were");
        assert!(step == 10 || state(step) != state(step + 1));
    }
    assert!(metrics.iter().filter(|l| !l["loss"].is_null()).all(|l| l.get("count/nonfinite").is_none()));
    Adapter::read(&b.out().join("adapter")).unwrap();
    let run: Value = serde_json::from_slice(&std::fs::read(b.out().join("run.json")).unwrap()).unwrap();
    assert_eq!(run["result"]["skipped"], 2);
}

#[test]
fn an_evaluation_that_is_not_finite_is_never_the_best() {
    let b = poisoned();
    let eval = crate::evaluation::held_out(&b, &poisoned_rows());
    write(&Case::open("llama").tokens(), &b.data);
    let flags = [
        "--max-steps",
        "8",
        "--eval-every",
        "2",
        "--eval-data",
        &eval,
        "--early-stop-patience",
        "2",
        "--load-best",
    ];
    let output = b.train(&flags);
    assert!(output.status.success() && stderr(&output).contains("loss not finite"), "{}", stderr(&output));
    let evaluated = lines(&b, "eval.jsonl");
    assert_eq!(evaluated.len(), 2);
    assert!(
        evaluated.iter().all(|l| l["eval_loss"].is_null() && l["eval_kl_raw"].is_null()),
        "{evaluated:?}"
    );
    assert!(!b.out().join("best").exists() && b.out().join("adapter").exists());
}
