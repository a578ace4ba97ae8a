//! What is written is read back, in both forms; PEFT's and mlx-lm's own files are read by the tests of kto-merge.

use super::*;
use crate::tensors::TensorStore;

fn module(r: usize, rows: usize, columns: usize, scale: f64, dora: bool) -> LoraModule {
    let wave = |n: usize, k: f32| (0..n).map(|i| (i as f32 * k).sin()).collect::<Vec<f32>>();
    LoraModule {
        a: wave(r * columns, 0.3),
        b: wave(rows * r, 0.7),
        r,
        in_features: columns,
        out_features: rows,
        scale,
        magnitude: dora.then(|| wave(rows, 0.9)),
    }
}

fn set(modules: &[(&str, LoraModule)]) -> LoraSet {
    LoraSet {
        of_part: false,
        modules: modules.iter().map(|(n, m)| (n.to_string(), m.clone())).collect(),
        saved: BTreeMap::new(),
        base_fingerprint: Some("abc".into()),
        base_name: Some("some/base".into()),
        dropout: 0.25,
        ecosystem: Ecosystem::Peft,
    }
}

#[test]
fn both_forms_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    for dora in [false, true] {
        let made = set(&[
            ("model.layers.0.mlp.up_proj", module(3, 5, 4, 1.5, dora)),
            ("model.layers.1.mlp.up_proj", module(3, 5, 4, 1.5, dora)),
        ]);
        for ecosystem in [Ecosystem::Peft, Ecosystem::Mlx] {
            let path = dir.path().join(format!("{ecosystem:?}{dora}"));
            made.write(&path, ecosystem).unwrap();
            let back = LoraSet::read(&path).unwrap();
            assert_eq!(
                (back.modules, back.base_fingerprint, back.dropout),
                (made.modules.clone(), made.base_fingerprint.clone(), 0.25)
            );
            assert_eq!((back.ecosystem, back.base_name.as_deref()), (ecosystem, Some("some/base")));
        }
    }
}

/// PEFT and mlx-lm put it on the whole, where layers of the image part have the same names.
#[test]
fn an_adapter_of_a_part_has_the_names_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = set(&[
        ("model.layers.0.mlp.up_proj", module(3, 5, 4, 1.5, false)),
        ("model.layers.0.mlp.down_proj", module(2, 5, 4, 1.5, false)),
    ]);
    made.of_part = true;
    let path = dir.path().join("peft");
    made.write(&path, Ecosystem::Peft).unwrap();
    let store = TensorStore::open_file(&path.join(adapter::WEIGHTS)).unwrap();
    let start = "base_model.model.model.language_model.layers.0.mlp.";
    assert!(store.names().all(|name| name.starts_with(start)));
    let config = crate::model_dir::read_json(&path.join(adapter::CONFIG)).unwrap();
    assert_eq!(config["target_modules"], r"model\.language_model\.(?:.*\.)?(?:down_proj|up_proj)");
    assert_eq!(config["rank_pattern"], serde_json::json!({"layers.0.mlp.down_proj": 2}));
    made.modules.retain(|name, _| name.ends_with("up_proj"));
    made.write(&dir.path().join("mlx"), Ecosystem::Mlx).unwrap();
    let store = TensorStore::open_file(&dir.path().join("mlx/adapters.safetensors")).unwrap();
    assert!(store.names().all(|name| name.starts_with("language_model.model.layers.0.mlp.up_proj.lora_")));
    for (name, modules) in [("peft", 2), ("mlx", 1)] {
        let back = LoraSet::read(&dir.path().join(name)).unwrap();
        assert!(back.of_part && back.modules.len() == modules);
        assert!(back.modules["model.layers.0.mlp.up_proj"] == made.modules["model.layers.0.mlp.up_proj"]);
    }
}

/// PEFT writes such a bias three times where both settings name it; which one counts is not guessed.
#[test]
fn a_bias_that_is_written_three_times_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = set(&[("model.layers.0.mlp.up_proj", module(3, 5, 4, 1.5, false))]);
    let saved = |n: usize| Saved { shape: vec![n], values: vec![0.5; n] };
    made.saved.insert("model.layers.0.mlp.down_proj.original_module.bias".into(), saved(4));
    made.write(dir.path(), Ecosystem::Peft).unwrap();
    let error = LoraSet::read(dir.path()).unwrap_err();
    assert!(error.kind() == Kind::Data && error.to_string().contains("original_module.bias"), "{error}");
    // A bias beside matrices has PEFT's name for it.
    made.saved = BTreeMap::from([("model.layers.0.mlp.up_proj.bias".to_string(), saved(5))]);
    made.write(dir.path(), Ecosystem::Peft).unwrap();
    let store = TensorStore::open_file(&dir.path().join(adapter::WEIGHTS)).unwrap();
    assert!(store.get("base_model.model.model.layers.0.mlp.up_proj.base_layer.bias").is_some());
    assert_eq!(LoraSet::read(dir.path()).unwrap().saved, made.saved);
}

#[test]
fn ranks_alphas_embeddings_and_saved_tensors_survive_in_peft() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = set(&[
        ("model.embed_tokens", module(2, 9, 4, 2.0, false)),
        ("model.layers.0.mlp.up_proj", module(3, 5, 4, 1.5, false)),
        ("model.layers.0.mlp.down_proj", module(2, 4, 5, 2.0, false)),
        ("model.layers.1.mlp.up_proj", module(2, 5, 4, 0.25, false)),
    ]);
    made.saved.insert("lm_head.weight".into(), Saved { shape: vec![3, 2], values: vec![0.5; 6] });
    made.write(dir.path(), Ecosystem::Peft).unwrap();
    let back = LoraSet::read(dir.path()).unwrap();
    assert_eq!((back.modules, back.saved), (made.modules.clone(), made.saved.clone()));
    let error = made.write(&dir.path().join("mlx"), Ecosystem::Mlx).unwrap_err().to_string();
    assert!(error.contains("trained whole"), "{error}");
    made.saved.clear();
    let error = made.write(&dir.path().join("mlx"), Ecosystem::Mlx).unwrap_err().to_string();
    assert!(error.contains("one rank"), "{error}");
}

/// Of an adapter on the whole what sits on the image part is named.
#[test]
fn layers_of_the_image_part_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let name = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj";
    let made = set(&[(name, module(3, 5, 4, 1.5, false)), ("model.norm", module(3, 5, 4, 1.5, false))]);
    for ecosystem in [Ecosystem::Peft, Ecosystem::Mlx] {
        let path = dir.path().join(format!("{ecosystem:?}"));
        made.write(&path, ecosystem).unwrap();
        let error = LoraSet::read(&path).err().unwrap();
        let text = error.to_string();
        assert_eq!(error.kind(), kto_cli::Kind::Data);
        assert!(text.contains(&format!("\"{name}\" is of the part for images")), "{text}");
    }
}
