//! Adapters of every kind from the flags to the files: what is written is what was asked for, is read back, and goes on after an interruption.

use crate::{
    cli::{Bench, refused, stderr},
    golden::Case,
};
use kto_formats::{
    adapter::{Adapter, AdapterConfig},
    lora::{Ecosystem, LoraSet},
    tensors::TensorStore,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, path::Path, process::Command};

pub fn settings(run: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(run.join("adapter/adapter_config.json")).unwrap()).unwrap()
}

pub fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap()
}

pub fn trained(b: &Bench, more: &[&str]) {
    let output = b.train(&[&["-q", "--max-steps", "3", "--lr", "1e-3"], more].concat());
    assert!(output.status.success(), "{more:?}: {}", stderr(&output));
}

/// Every flag at once.
const ALL: [&str; 14] = [
    "--use-dora",
    "--use-rslora",
    "--lora-r",
    "3",
    "--target-modules",
    "q_proj,v_proj,down_proj",
    "--layers-to-transform",
    "1",
    "--rank-pattern",
    "down_proj=5",
    "--alpha-pattern",
    "^model.layers.1.self_attn.q_proj=7",
    "--exclude-modules",
    r".*\.v_.*",
];

#[test]
fn what_is_asked_for_is_written_as_peft_has_it() {
    let b = Bench::new();
    trained(&b, &ALL);
    let settings = settings(&b.out());
    for (field, expected) in [
        ("r", json!(3)),
        ("lora_alpha", json!(16)),
        ("use_dora", json!(true)),
        ("use_rslora", json!(true)),
        ("target_modules", json!(["q_proj", "v_proj", "down_proj"])),
        ("exclude_modules", json!(r".*\.v_.*")),
        ("layers_to_transform", json!([1])),
        ("rank_pattern", json!({"down_proj": 5})),
        ("alpha_pattern", json!({"^model.layers.1.self_attn.q_proj": 7})),
        ("init_lora_weights", json!(true)),
    ] {
        assert_eq!(settings[field], expected, "{field}");
    }
    let store = TensorStore::open_file(&b.out().join("adapter/adapter_model.safetensors")).unwrap();
    let shapes: Vec<(String, Vec<usize>)> = store
        .views()
        .map(|v| {
            (v.name.trim_start_matches("base_model.model.model.layers.1.").to_string(), v.shape.to_vec())
        })
        .collect();
    let expected = [
        ("mlp.down_proj.lora_A.weight", vec![5, 112]),
        ("mlp.down_proj.lora_B.weight", vec![64, 5]),
        ("mlp.down_proj.lora_magnitude_vector", vec![64]),
        ("self_attn.q_proj.lora_A.weight", vec![3, 64]),
        ("self_attn.q_proj.lora_B.weight", vec![64, 3]),
        ("self_attn.q_proj.lora_magnitude_vector", vec![64]),
    ];
    assert_eq!(shapes, expected.map(|(name, shape)| (name.to_string(), shape)));
    let adapter = Adapter::read(&b.out()).unwrap();
    let scale = |module: &str| adapter.tensors[&format!("model.layers.1.{module}")].scale;
    assert!((scale("self_attn.q_proj") - 7.0 / 3f64.sqrt()).abs() < 1e-12);
    assert!((scale("mlp.down_proj") - 16.0 / 5f64.sqrt()).abs() < 1e-12);
    // Lengths are trained: they begin as those of the base's rows.
    let before = Bench::new();
    let output = before.train(&[&["-q", "--max-steps", "1", "--lr", "0"], &ALL[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let start = Adapter::read(&before.out()).unwrap();
    for (module, m) in &adapter.tensors {
        let (a, b) = (&m.magnitude, &start.tensors[module].magnitude);
        assert!(a.is_some() && b.is_some() && a != b, "{module}");
    }
}

#[test]
fn it_goes_on_as_if_it_had_not_been_interrupted() {
    for flags in [&ALL[..], &["--rank-pattern", "q_proj=2", "--rank-pattern", "o_proj=9"]] {
        let (whole, b) = (Bench::new(), Bench::new());
        trained(&whole, flags);
        let first =
            b.train(&[&["-q", "--max-steps", "3", "--lr", "1e-3", "--max-time", "0.001s"], flags].concat());
        assert!(first.status.success() && !b.out().join("adapter").exists(), "{}", stderr(&first));
        trained(&b, &[flags, &["--resume=strict"]].concat());
        assert!(weights(&whole.out()) == weights(&b.out()), "{flags:?}");
        // Another form of the adapter is another run.
        let other = b.train(&["-q", "--max-steps", "3", "--lr", "1e-3", "--resume"]);
        refused(&other, 78, "rank_pattern was {");
    }
}

#[test]
fn a_result_is_a_start() {
    let b = Bench::new();
    trained(&b, &ALL);
    let first = b.out().display().to_string();
    let next = Bench::new();
    let flags = ["--init-adapter", &first, "--reference", "init-adapter"];
    let output = next.train(&[&["-q", "--max-steps", "1", "--lr", "0"], &flags[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(weights(&next.out()) == weights(&b.out()));
    assert_eq!(settings(&next.out()), settings(&b.out()));
    let dropped =
        next.train(&["-q", "--force", "--init-adapter", &first, "--lora-dropout", "0.1", "--max-steps", "1"]);
    assert!(dropped.status.success() && weights(&next.out()) != weights(&b.out()), "{}", stderr(&dropped));
    refused(&next.train(&["--force", "--init-adapter", &first, "--use-dora"]), 2, "--use-dora");
}

/// All starts leave the policy as it was; they differ in where training goes.
#[test]
fn every_start_changes_nothing_at_first() {
    let mut results = BTreeSet::new();
    for init in ["kaiming", "gaussian", "orthogonal"] {
        for kind in [&[][..], &["--use-dora"]] {
            let b = Bench::new();
            trained(&b, &[&["--init-lora-weights", init, "--lora-r", "4"], kind].concat());
            let metrics = std::fs::read_to_string(b.out().join("metrics.jsonl")).unwrap();
            let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
            let loss = first["loss"].as_f64().unwrap();
            assert!((loss - 0.5).abs() < 1e-5, "{init} {kind:?}: {loss}");
            results.insert(weights(&b.out()));
            let expected = if init == "kaiming" { json!(true) } else { json!(init) };
            assert_eq!(settings(&b.out())["init_lora_weights"], expected);
        }
    }
    assert_eq!(results.len(), 6);
}

#[test]
fn an_adapter_of_mlx_is_a_start_too() {
    let golden = Case::open("llama").file("adapter_init");
    let dir = tempfile::tempdir().unwrap();
    let mut set = LoraSet::read(&golden).unwrap();
    set.write(dir.path(), Ecosystem::Mlx).unwrap();
    let [peft, mlx] = [golden.as_path(), dir.path()].map(|path| {
        let b = Bench::new();
        trained(&b, &["--init-adapter", &path.display().to_string()]);
        b
    });
    assert!(weights(&peft.out()) == weights(&mlx.out()));
    let (a, b) = (settings(&peft.out()), settings(&mlx.out()));
    assert_eq!((&a["r"], &a["lora_alpha"]), (&b["r"], &b["lora_alpha"]));
    // Made for another base.
    set.base_fingerprint = Some("a".repeat(64));
    let other = dir.path().join("other");
    set.write(&other, Ecosystem::Mlx).unwrap();
    let other = other.display().to_string();
    let b = Bench::new();
    refused(&b.train(&["--init-adapter", &other]), 78, "was trained on another base model");
    trained(&b, &["--init-adapter", &other, "--force-base"]);
}

#[test]
fn what_names_nothing_is_refused() {
    let b = Bench::new();
    for (flags, text) in [
        (&["--target-modules", "q_proj,w1"][..], "--target-modules: unknown module \"w1\""),
        (&["--target-modules", "(q_proj"], "is no regular expression"),
        (&["--target-modules", ".*w1"], "no linear layer of the model is adapted"),
        (&["--exclude-modules", ".*"], "no linear layer of the model is adapted"),
        (&["--layers-to-transform", "2"], "the model has 2 blocks"),
        (&["--layers-to-transform", "x"], "is no block's number"),
        (&["--target-modules", ".*q_proj", "--layers-to-transform", "0"], "needs a list of names"),
        (&["--rank-pattern", "q_proj"], "PATTERN=NUMBER"),
        (&["--rank-pattern", "q_proj=0"], "is no rank"),
        (&["--rank-pattern", "[=3"], "is no regular expression"),
        (&["--rank-pattern", "q_proj=32,v_proj=4"], "once for each"),
        (&["--rank-pattern", "q_proj=32", "--rank-pattern", "typo=8"], "no adapted module matches \"typo\""),
        (
            &["--target-modules", "q_proj", "--alpha-pattern", "v_proj=8"],
            "no adapted module matches \"v_proj\"",
        ),
        (
            &["--rank-pattern", "self_attn.q_proj=3", "--rank-pattern", "q_proj=4"],
            "two patterns with different numbers match \"model.layers.0.self_attn.q_proj\"",
        ),
        (&["--init-lora-weights", "orthogonal", "--lora-r", "3"], "needs even ranks"),
        (&["--init-lora-weights", "pissa"], "pissa"),
    ] {
        let output = b.train(flags);
        let err = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {err}");
        assert!(err.contains(text), "{flags:?}: {err}");
    }
    assert!(!b.out().exists());
}

/// What a checkpoint holds of a run that is not finished is the adapter that a run of so many steps ends with.
#[test]
fn the_adapter_in_a_checkpoint_is_read_by_every_tool() {
    for flags in [
        &["--lora-dropout", "0.1", "--rank-pattern", "down_proj=4"][..],
        &["--use-dora", "--target-modules", "q_proj,v_proj", "--layers-to-transform", "1"],
        &["--modules-to-save", "norm,lm_head", "--use-rslora"],
    ] {
        let b = Bench::new();
        let output = b.train(
            &[&["-q", "--seed", "9", "--max-steps", "4", "--checkpoint-every", "2", "--lr", "1e-3"], flags]
                .concat(),
        );
        assert!(output.status.success(), "{}", stderr(&output));
        let run = b.out();
        let newest = run.join("checkpoints/step-00000004");
        let (ours, truth) = (Adapter::read(&newest).unwrap(), Adapter::read(&run).unwrap());
        assert_eq!((&ours.tensors, &ours.saved, &ours.meta), (&truth.tensors, &truth.saved, &truth.meta));
        let named = AdapterConfig {
            base_model_name_or_path: truth.config.base_model_name_or_path.clone(),
            ..ours.config
        };
        assert_eq!(named, truth.config);
        assert_ne!(Adapter::read(&run.join("checkpoints/step-00000002")).unwrap().tensors, truth.tensors);

        let score = |adapter: &Path| {
            let mut command = Command::new(crate::pipeline::tool("kto-eval"));
            command.args(["score", "-q", "--model"]).arg(&b.model).arg("--adapter").arg(adapter);
            command.arg(&b.data).output().unwrap()
        };
        let by_run = score(&run);
        assert!(by_run.status.success() && score(&newest).stdout == by_run.stdout, "{}", stderr(&by_run));
        // As after a kill: no adapter yet.
        std::fs::remove_dir_all(run.join("adapter")).unwrap();
        let shown = newest.display();
        for (path, what) in
            [(run.clone(), "has no adapter yet"), (run.join("checkpoint-4"), "no such file or directory")]
        {
            let output = score(&path);
            let said = stderr(&output);
            let hint = format!("hint: {shown} holds the adapter of the newest checkpoint\n");
            assert!(
                output.status.code() == Some(66) && said.contains(what) && said.ends_with(&hint),
                "{said}"
            );
        }
        let state = newest.join("state.safetensors");
        let mut bytes = std::fs::read(&state).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&state, bytes).unwrap();
        let output = score(&newest);
        let said = stderr(&output);
        assert!(output.status.code() == Some(65) && said.contains("does not match its hash"), "{said}");
    }
}

/// PEFT names the modules of a language model that is a part of another model otherwise: a checkpoint tells that it is one.
#[test]
fn a_checkpoint_knows_that_its_base_is_a_part() {
    use crate::whole::{families, on};
    let b = on(&families().join("gemma3-images"));
    let output = b.train_in_batches("2", &["-q", "--max-steps", "1", "--checkpoint-every", "1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let ours = Adapter::read(&b.out().join("checkpoints/step-00000001")).unwrap();
    let truth = Adapter::read(&b.out()).unwrap();
    assert!(truth.meta.of_part);
    assert_eq!((ours.meta, ours.tensors), (truth.meta, truth.tensors));
}
