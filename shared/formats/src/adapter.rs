//! A LoRA adapter directory in PEFT form: adapter_config.json, adapter_model.safetensors, README.md.
//!
//! Called by kto-train (start and result) and kto-eval. The files are read and written by [`crate::lora`]; here is what training can
//! start from and leaves: matrices on linear layers, and weights trained whole, with the settings that made them. Adapters of mlx-lm are read too.

pub use crate::adapter_config::{AdapterConfig, Targets, whole};
use crate::{
    adapter_config,
    lora::{Ecosystem, LoraModule, LoraSet, Saved, checkpoint, is_embedding, peft},
    mmap::shown,
    model_dir::{ModelDir, same_origin},
    text_part,
};
use kto_cli::{Context, Error, Result, atomic, escape, hash::Sha256Hex};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// File name of the settings.
pub const CONFIG: &str = "adapter_config.json";
/// File name of the matrices.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// Key of the base model's fingerprint in the safetensors metadata.
pub(crate) const FINGERPRINT: &str = "kto.base_fingerprint";
/// What PEFT puts before module names.
pub(crate) const PREFIX: &str = "base_model.model.";

/// What is known about an adapter beside its numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterMeta {
    /// [`crate::model_dir::ModelDir::fingerprint`] of the base it was trained on.
    pub base_fingerprint: Option<String>,
    /// Whether the base is the language model of one that takes images too: PEFT puts the adapter on the whole.
    pub of_part: bool,
}

/// A LoRA adapter.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Rank, alpha, targets.
    pub config: AdapterConfig,
    /// Linear layer (`model.layers.0.self_attn.q_proj`) to matrices.
    pub tensors: BTreeMap<String, LoraModule>,
    /// What takes the place of a tensor of the base (`lm_head.weight`): `modules_to_save` and trained biases.
    pub saved: BTreeMap<String, Saved>,
    /// What the file said about its origin.
    pub meta: AdapterMeta,
}

/// Returns the adapter's directory in a run directory of kto-train, else the path itself.
pub fn directory(path: &Path) -> PathBuf {
    let inner = path.join("adapter");
    let is_run = !path.join(CONFIG).exists() && inner.join(CONFIG).exists();
    if is_run { inner } else { path.into() }
}

/// Returns the run directory of kto-train that an adapter lies in: as its result, as its best one, or in a checkpoint.
pub fn run_of(path: &Path) -> Option<PathBuf> {
    let dir = directory(path).canonicalize().ok()?;
    let is_checkpoint = |p: &&Path| p.parent().is_some_and(|up| up.ends_with("checkpoints"));
    match dir.ancestors().take(2).find(is_checkpoint) {
        Some(checkpoint) => checkpoint.ancestors().nth(2).map(Path::to_path_buf),
        None => dir.parent().map(Path::to_path_buf),
    }
}

impl Adapter {
    /// Reads an adapter directory of PEFT or mlx-lm, a checkpoint, or of a run directory its adapter. Errors: 66 for a missing file; 65 that names the
    /// field or tensor for features, shapes or values that cannot be used.
    pub fn read(path: &Path) -> Result<Self> {
        let (dir, set) = (directory(path), LoraSet::read(path)?);
        let place = || shown(&dir.join(CONFIG));
        let mut config = match set.ecosystem {
            Ecosystem::Peft if !dir.join(CONFIG).exists() => {
                adapter_config::from_object(&checkpoint::settings(&dir)?).at(place())?
            }
            Ecosystem::Peft => AdapterConfig::read(&dir.join(CONFIG))?,
            Ecosystem::Mlx => peft::config(&set).at(place())?,
        };
        if let Some(module) = set.modules.keys().find(|module| is_embedding(module)) {
            let (place, module) = (place(), escape(module));
            let text = format!("{place}: \"{module}\" is an embedding; only linear layers are adapted here");
            return Err(Error::data(text).with_hint("kto-merge merges it into the base"));
        }
        if config.target_modules == Targets::default() {
            config.target_modules = Targets::Names(set.modules.keys().cloned().collect());
        }
        let meta = AdapterMeta { base_fingerprint: set.base_fingerprint, of_part: set.of_part };
        Ok(Self { config, tensors: set.modules, saved: set.saved, meta })
    }

    /// Returns whether the adapter was trained on this base, on a 4-bit form of it or on the weights that it is a 4-bit
    /// form of. An adapter that does not name its base fits all. The one rule for every tool.
    pub fn fits(&self, base: &ModelDir) -> bool {
        let trained_on = self.meta.base_fingerprint.as_deref();
        trained_on.is_none_or(|trained_on| same_origin(trained_on, &base.fingerprint()))
    }

    /// Returns a hash over settings and numbers, by which a run names the adapter that it began with.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256Hex::new();
        let common = self.config.scale();
        hash.update(&common.to_le_bytes());
        for (name, m) in &self.tensors {
            hash.update(name.as_bytes());
            [Some(&m.a), Some(&m.b), m.magnitude.as_ref()]
                .into_iter()
                .flatten()
                .for_each(|v| hash.update_floats(v));
            if m.scale != common {
                hash.update(&m.scale.to_le_bytes());
            }
        }
        for (name, saved) in &self.saved {
            hash.update(name.as_bytes());
            hash.update_floats(&saved.values);
        }
        hash.finish()
    }

    /// Writes a PEFT directory: every file whole, the settings last. Creates `dir` when it is missing.
    /// `meta` goes into the safetensors metadata, where PEFT ignores it.
    pub fn write(&self, dir: &Path, meta: AdapterMeta) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, &e))?;
        peft::write_weights(&dir.join(WEIGHTS), &self.tensors, &self.saved, &meta)?;
        atomic::write(&dir.join("README.md"), self.model_card().as_bytes())?;
        let config = match meta.of_part {
            true => text_part::settings(&self.config, self.tensors.keys().map(String::as_str)),
            false => self.config.clone(),
        };
        atomic::write(&dir.join(CONFIG), config.to_json().as_bytes())
    }

    /// The README.md that model hubs show.
    fn model_card(&self) -> String {
        let base = self.config.base_model_name_or_path.as_deref().unwrap_or("");
        let front = if base.is_empty() {
            String::new()
        } else {
            format!("base_model: {}\n", serde_json::json!(base))
        };
        let whole = match self.saved.len() {
            0 => String::new(),
            n => format!(", {n} tensors of the base trained whole"),
        };
        format!(
            "---\n{front}library_name: peft\npipeline_tag: text-generation\ntags:\n- kto\n- lora\n---\n\n\
             # LoRA adapter\n\nRank {}, alpha {}, {} adapted layers{whole}. Trained with kto-train; loads with PEFT.\n",
            self.config.r,
            self.config.lora_alpha,
            self.tensors.len(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata},
        tensors::TensorStore,
    };
    use kto_cli::Kind;
    use safetensors::Dtype;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/trl/llama/adapter_init")
    }

    fn sample() -> Adapter {
        let pair = LoraModule {
            a: vec![0.5; 6],
            b: vec![-1.0; 8],
            r: 2,
            in_features: 3,
            out_features: 4,
            scale: 1.75,
            magnitude: None,
        };
        let config = AdapterConfig {
            r: 2,
            lora_alpha: 3.5,
            lora_dropout: 0.1,
            target_modules: ["q_proj"].into(),
            base_model_name_or_path: Some("some/base".into()),
            ..Default::default()
        };
        let tensors = BTreeMap::from([("model.layers.0.self_attn.q_proj".to_string(), pair)]);
        Adapter { config, tensors, saved: BTreeMap::new(), meta: AdapterMeta::default() }
    }

    #[test]
    fn reading_and_writing_peft_files_gives_the_same_bytes() {
        let adapter = Adapter::read(&golden()).unwrap();
        assert_eq!((adapter.tensors.len(), adapter.config.r, adapter.config.scale()), (14, 8, 2.0));
        let down = &adapter.tensors["model.layers.1.mlp.down_proj"];
        assert_eq!((down.in_features, down.out_features), (112, 64));
        let dir = tempfile::tempdir().unwrap();
        adapter.write(dir.path(), AdapterMeta::default()).unwrap();
        for file in [CONFIG, WEIGHTS] {
            let (ours, peft) = (std::fs::read(dir.path().join(file)), std::fs::read(golden().join(file)));
            assert!(ours.unwrap() == peft.unwrap(), "{file} differs");
        }
    }

    #[test]
    fn fingerprint_and_odd_alpha_survive() {
        let dir = tempfile::tempdir().unwrap();
        let meta = AdapterMeta { base_fingerprint: Some("abc".into()), of_part: false };
        sample().write(&dir.path().join("new"), meta.clone()).unwrap();
        let back = Adapter::read(&dir.path().join("new")).unwrap();
        assert_eq!((back.meta, back.tensors, back.config), (meta, sample().tensors, sample().config));
    }

    /// Writes `sample` with changed tensors and returns the error of reading it.
    fn refused(change: impl Fn(&mut Vec<(TensorSpec, Vec<u8>)>)) -> String {
        let dir = tempfile::tempdir().unwrap();
        sample().write(dir.path(), AdapterMeta::default()).unwrap();
        let store = TensorStore::open_file(&dir.path().join(WEIGHTS)).unwrap();
        let mut tensors: Vec<_> =
            store.views().map(|v| (TensorSpec::new(v.name, v.dtype, v.shape), v.data.to_vec())).collect();
        change(&mut tensors);
        let specs = tensors.iter().map(|t| t.0.clone()).collect();
        let mut writer = SafetensorsWriter::new(&dir.path().join(WEIGHTS), specs, &pt_metadata()).unwrap();
        for (spec, data) in &tensors {
            writer.write(&spec.name, data).unwrap();
        }
        writer.finish().unwrap();
        let error = Adapter::read(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Data);
        error.to_string()
    }

    #[test]
    fn wrong_tensors_are_named() {
        assert!(
            refused(|t| drop(t.pop()))
                .contains("has no \"base_model.model.model.layers.0.self_attn.q_proj.lora_B")
        );
        assert!(
            refused(|t| t[0].0.shape = vec![3, 2]).contains("lora_A.weight\": shape [3, 2], expected [2, 2]")
        );
        assert!(
            refused(|t| t[1].0.shape = vec![8, 1]).contains("lora_B.weight\": shape [8, 1], expected [8, 2]")
        );
        assert!(refused(|t| t[1].0.shape = vec![8]).contains("not two matrices"));
        assert!(
            refused(|t| t[0].1[8..12].copy_from_slice(&f32::NAN.to_le_bytes())).contains("NaN at index 2")
        );
        assert!(refused(|t| t[0].0.name.push('x')).contains("is not a part of a LoRA layer"));
        assert!(refused(|t| t[0].0.dtype = Dtype::I32).contains("dtype I32"));
        assert!(refused(|t| t.clear()).contains("no LoRA matrices"));
    }
}
