//! `--resume` with other flags or files: what decides the result is refused by name, the rest may change.

use crate::{
    cli::{Bench, rows, stderr, write},
    golden::Case,
};
use kto_formats::{model_dir::ModelDir, tensors::TensorStore};
use std::path::{Path, PathBuf};

/// A run of two of six steps with everything that a plan can hold, saved.
fn paused() -> (Bench, Vec<String>) {
    let b = Bench::new();
    let held_out = b.dir.path().join("heldout.kto.arrow");
    write(&Case::open("llama").tokens(), &held_out);
    let flags =
        ["--max-steps", "6", "--checkpoint-every", "1", "--eval-data", &held_out.display().to_string()];
    let flags: Vec<String> = flags.into_iter().map(String::from).collect();
    let output = train(&b, &flags, &["-q", "--max-time", "0.001s"]);
    assert!(output.status.success(), "{}", stderr(&output));
    (b, flags)
}

fn train(b: &Bench, flags: &[String], more: &[&str]) -> std::process::Output {
    let all: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
    b.train(&all)
}

#[test]
fn every_changed_field_of_the_plan_is_refused_by_name() {
    let (b, flags) = paused();
    let adapter = Case::open("llama").file("adapter_init").display().to_string();
    let other = b.dir.path().join("other.kto.arrow");
    write(&rows(&[&[1, 5], &[1, 6], &[1, 7]], 384), &other);
    let other = other.display().to_string();
    let before = std::fs::read_to_string(b.out().join("run.json")).unwrap();
    for (change, field) in [
        (&["--lr", "1e-4"][..], "lr was 5e-6, is 0.0001"),
        (&["--beta", "0.2"], "beta was 0.1, is 0.2"),
        (&["--desirable-weight", "2"], "desirable_weight"),
        (&["--undesirable-weight", "2"], "undesirable_weight"),
        (&["--loss", "apo-zero"], "loss was \"kto\", is \"apo-zero\""),
        (&["--schedule", "cosine"], "schedule"),
        (&["--warmup-steps", "2"], "warmup_steps"),
        (&["--warmup-ratio", "0.5"], "warmup_steps"),
        (&["--weight-decay", "0.1"], "weight_decay"),
        (&["--max-grad-norm", "2"], "max_grad_norm"),
        (&["--lora-r", "8"], "lora_r"),
        (&["--lora-alpha", "8"], "lora_alpha"),
        (&["--lora-dropout", "0.1"], "lora_dropout"),
        (&["--target-modules", "q_proj"], "target_modules"),
        (&["--exclude-modules", "q_proj"], "exclude_modules was null"),
        (&["--layers-to-transform", "0"], "layers_to_transform was null, is [0]"),
        (&["--rank-pattern", "q_proj=2"], "rank_pattern was null"),
        (&["--alpha-pattern", "q_proj=2"], "alpha_pattern was null"),
        (&["--use-rslora"], "use_rslora was false"),
        (&["--use-dora"], "use_dora was false"),
        (&["--init-lora-weights", "gaussian"], "init_lora_weights was null"),
        (&["--init-adapter", &adapter], "init_adapter was \"fresh\""),
        (&["--seed", "7"], "seed was 42, is 7"),
        (&["--preset", "trl"], "preset"),
        (&["--eval-every", "2"], "eval_every"),
        (&["--early-stop-patience", "9"], "early_stop_patience was null, is 9"),
        (&["--load-best"], "load_best"),
    ] {
        let output = train(&b, &flags, &[change, &["--resume"]].concat());
        let err = stderr(&output);
        assert_eq!(output.status.code(), Some(78), "{change:?}: {err}");
        assert!(err.contains("cannot resume: ") && err.contains(field), "{change:?}: {err}");
    }
    // Flags that are in the list already are given anew.
    let with = |name: &str, value: &str| {
        let mut flags = flags.clone();
        let at = flags.iter().position(|f| f == name).unwrap();
        flags[at + 1] = value.into();
        flags
    };
    for (flags, field) in
        [(with("--max-steps", "7"), "total_steps was 6, is 7"), (with("--eval-data", &other), "eval_data")]
    {
        let output = train(&b, &flags, &["--resume=strict"]);
        assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
        assert!(stderr(&output).contains(field), "{}", stderr(&output));
    }
    assert_eq!(
        std::fs::read_to_string(b.out().join("run.json")).unwrap(),
        before,
        "a refusal changes nothing"
    );
    assert!(train(&b, &flags, &["-q", "--resume"]).status.success());
}

#[test]
fn other_rows_another_batch_and_another_base_are_refused() {
    let (mut b, flags) = paused();
    let (data, model) = (b.data.clone(), b.model.clone());
    let refused = |b: &Bench, field: &str| {
        let output = train(b, &flags, &["--resume"]);
        assert_eq!(output.status.code(), Some(78), "{field}: {}", stderr(&output));
        assert!(stderr(&output).contains(field), "{}", stderr(&output));
    };
    b.data = b.dir.path().join("shorter.kto.arrow");
    let mut tokens = Case::open("llama").tokens();
    tokens.meta.max_length -= 1;
    write(&tokens, &b.data);
    refused(&b, "max_length was 96, is 95");
    write(&rows(&[&[1, 5], &[1, 6], &[1, 7]], 384), &b.data);
    refused(&b, "data was ");
    b.data = data;
    b.model = changed_model(&b, &model);
    refused(&b, "base was ");
    b.model = model;
    let all: Vec<&str> = flags.iter().map(String::as_str).chain(["--resume"]).collect();
    let output = b.train_in_batches("5", &all);
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("batch was 4, is 5"), "{}", stderr(&output));
}

/// A copy of a model.
fn copied_model(b: &Bench, model: &Path) -> PathBuf {
    let copy = b.dir.path().join("changed");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(model).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

/// The fingerprint has samples of both ends of each tensor; what a run goes on with is known to the last bit.
#[test]
fn a_base_that_differs_by_a_bit_in_the_middle_of_a_tensor_is_refused() {
    let (mut b, flags) = paused();
    b.model = copied_model(&b, &b.model);
    let path = b.model.join("model.safetensors");
    let store = TensorStore::open_file(&path).unwrap();
    let print = ModelDir::open(&b.model).unwrap().fingerprint();
    let (_, range) = store.bytes("model.embed_tokens.weight").unwrap();
    assert!(range.len() > 66 << 10, "{range:?}");
    let resume = |how: &str| train(&b, &flags, &["--max-time", "0.001s", how]);
    // Another file with the same bytes, then the same file after somebody has touched it.
    assert!(resume("--resume").status.success());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    assert!(resume("--resume").status.success());
    let time = std::fs::metadata(&path).unwrap().modified().unwrap();
    let mut other = bytes.clone();
    other[range.start + (33 << 10)] ^= 1;
    let write = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        // The time of the last write can be set back; that of the last change cannot.
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    };
    write(&other);
    assert_eq!(ModelDir::open(&b.model).unwrap().fingerprint(), print, "the samples do not see it");
    for how in ["--resume", "--resume=strict"] {
        let output = resume(how);
        assert_eq!(output.status.code(), Some(78), "{how}: {}", stderr(&output));
        assert!(stderr(&output).contains("cannot resume: base_weights was "), "{}", stderr(&output));
    }
    write(&bytes);
    assert!(resume("--resume").status.success());
    // What only --resume=strict sees: the same file by all that the system says, with other bytes.
    let manifest = b.out().join("run.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let (_, hash) = text.split_once("\"base_weights\": \"").unwrap();
    std::fs::write(&manifest, text.replace(&hash[..64], &"0".repeat(64))).unwrap();
    let output = resume("--resume=strict");
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("base_weights was \"00"), "{}", stderr(&output));
    std::fs::write(&manifest, text).unwrap();
    assert!(train(&b, &flags, &["-q", "--resume=strict"]).status.success());
}

/// make asks too: a run that is finished is not the one of another base.
#[test]
fn if_changed_sees_a_bit_in_the_middle_of_a_tensor() {
    let mut b = Bench::new();
    b.model = copied_model(&b, &b.model);
    let flags = ["-q", "--max-steps", "1", "--if-changed"];
    assert!(b.train(&flags).status.success() && b.train(&flags).status.success());
    let path = b.model.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let (_, range) = TensorStore::open_file(&path).unwrap().bytes("model.embed_tokens.weight").unwrap();
    bytes[range.start + (33 << 10)] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let output = b.train(&flags);
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("base_weights was "), "{}", stderr(&output));
    assert!(b.train(&[&flags[..], &["--force"]].concat()).status.success());
}

/// A copy of a model with one number changed.
fn changed_model(b: &Bench, model: &Path) -> PathBuf {
    let copy = copied_model(b, model);
    let path = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&1.5f32.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    copy
}

#[test]
fn what_does_not_decide_the_result_may_change() {
    let (b, flags) = paused();
    let (whole, whole_flags) = paused();
    assert!(train(&whole, &whole_flags, &["-q", "--resume"]).status.success());
    let mut flags = flags;
    let at = flags.iter().position(|f| f == "--checkpoint-every").unwrap();
    flags[at + 1] = "1h".into();
    let more = [
        "-q",
        "--resume=strict",
        "--threads",
        "1",
        "--keep-last",
        "5",
        "--keep-every",
        "2",
        "--on-nonfinite",
        "skip",
    ];
    let output = train(&b, &flags, &more);
    assert!(output.status.success(), "{}", stderr(&output));
    for name in ["adapter/adapter_model.safetensors", "metrics.jsonl", "eval.jsonl"] {
        let read = |b: &Bench| std::fs::read(b.out().join(name)).unwrap();
        assert!(read(&b) == read(&whole), "{name}");
    }
}
