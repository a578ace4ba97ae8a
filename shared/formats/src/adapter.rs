//! A LoRA adapter directory in PEFT form: adapter_config.json, adapter_model.safetensors, README.md.
//!
//! Called by kto-train (start and result), kto-eval and kto-merge. Invariant: every pair has A (R, in) and
//! B (out, R) of the configured rank with finite values. Tensor names in the file are
//! `base_model.model.<module>.lora_A.weight`; here only `<module>` is left.

pub use crate::adapter_config::AdapterConfig;
use crate::{
    mmap::shown,
    model_dir::{ModelDir, same_origin},
    safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata, standard_order},
    tensors::{TensorStore, TensorView, check_finite, push_floats},
};
use kto_cli::{Context, Error, Kind, Result, atomic, escape};
use safetensors::Dtype;
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

/// The two matrices of one adapted linear layer, in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPair {
    /// A: (R, in), row-major.
    pub a: Vec<f32>,
    /// B: (out, R), row-major.
    pub b: Vec<f32>,
    /// Rank R.
    pub r: usize,
    /// Width of the layer's input.
    pub in_features: usize,
    /// Width of the layer's output.
    pub out_features: usize,
}

/// What is known about an adapter beside its numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterMeta {
    /// [`crate::model_dir::ModelDir::fingerprint`] of the base it was trained on.
    pub base_fingerprint: Option<String>,
}

/// A LoRA adapter.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Rank, alpha, targets.
    pub config: AdapterConfig,
    /// Module (`model.layers.0.self_attn.q_proj`) to matrices.
    pub tensors: BTreeMap<String, LoraPair>,
    /// What the file said about its origin.
    pub meta: AdapterMeta,
}

/// Returns the adapter's directory in a run directory of kto-train, else the path itself.
pub fn directory(path: &Path) -> PathBuf {
    let inner = path.join("adapter");
    let is_run = !path.join(CONFIG).exists() && inner.join(CONFIG).exists();
    if is_run { inner } else { path.into() }
}

impl Adapter {
    /// Reads a PEFT directory. Errors: 66 for a missing file; 65 that names the field or tensor for features,
    /// shapes or values that cannot be used.
    pub fn read(dir: &Path) -> Result<Self> {
        let kind = std::fs::metadata(dir).map_err(|e| Error::reading(dir, &e))?;
        if !kind.is_dir() {
            return Err(Error::new(Kind::NoInput, format!("{}: not a directory", shown(dir)))
                .with_hint("give the directory that holds adapter_config.json"));
        }
        let mut config = AdapterConfig::read(&dir.join(CONFIG))?;
        let path = dir.join(WEIGHTS);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            return Err(Error::data(format!(
                "{}: pickle weights can run code when loaded; only safetensors are read",
                shown(&dir.join("adapter_model.bin"))
            )));
        }
        let store = TensorStore::open_file(&path)?;
        let tensors = read_pairs(&store, config.r).at(shown(&path))?;
        if config.target_modules.is_empty() {
            config.target_modules = tensors.keys().cloned().collect();
        }
        let meta = AdapterMeta { base_fingerprint: store.metadata().get(FINGERPRINT).cloned() };
        Ok(Self { config, tensors, meta })
    }

    /// Returns whether the adapter was trained on this base, on a 4-bit form of it or on the weights that it is a 4-bit
    /// form of. An adapter that does not name its base fits all. The one rule for every tool.
    pub fn fits(&self, base: &ModelDir) -> bool {
        let trained_on = self.meta.base_fingerprint.as_deref();
        trained_on.is_none_or(|trained_on| same_origin(trained_on, &base.fingerprint()))
    }

    /// Writes a PEFT directory: every file whole, the settings last. Creates `dir` when it is missing.
    /// `meta` goes into the safetensors metadata, where PEFT ignores it.
    pub fn write(&self, dir: &Path, meta: AdapterMeta) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, &e))?;
        self.write_weights(&dir.join(WEIGHTS), &meta)?;
        atomic::write(&dir.join("README.md"), self.model_card().as_bytes())?;
        atomic::write(&dir.join(CONFIG), self.config.to_json().as_bytes())
    }

    fn write_weights(&self, path: &Path, meta: &AdapterMeta) -> Result<()> {
        let mut metadata = pt_metadata();
        if let Some(fingerprint) = &meta.base_fingerprint {
            metadata.insert(FINGERPRINT.into(), fingerprint.clone());
        }
        let mut specs = Vec::new();
        let mut values = BTreeMap::new();
        for (module, pair) in &self.tensors {
            for (side, shape, data) in
                [("A", [pair.r, pair.in_features], &pair.a), ("B", [pair.out_features, pair.r], &pair.b)]
            {
                let name = format!("{PREFIX}{module}.lora_{side}.weight");
                if data.len() != shape[0] * shape[1] {
                    return Err(Error::internal(format!(
                        "{name}: {} values for shape {shape:?}",
                        data.len()
                    )));
                }
                specs.push(TensorSpec::new(name.clone(), Dtype::F32, shape));
                values.insert(name, data);
            }
        }
        standard_order(&mut specs);
        let mut writer = SafetensorsWriter::new(path, specs.clone(), &metadata)?;
        let mut bytes = Vec::new();
        for spec in specs {
            bytes.clear();
            push_floats(Dtype::F32, values[&spec.name], &mut bytes)?;
            writer.write(&spec.name, &bytes)?;
        }
        writer.finish()
    }

    /// The README.md that model hubs show.
    fn model_card(&self) -> String {
        let base = self.config.base_model_name_or_path.as_deref().unwrap_or("");
        let front = if base.is_empty() {
            String::new()
        } else {
            format!("base_model: {}\n", serde_json::json!(base))
        };
        format!(
            "---\n{front}library_name: peft\npipeline_tag: text-generation\ntags:\n- kto\n- lora\n---\n\n\
             # LoRA adapter\n\nRank {}, alpha {}, {} adapted layers. Trained with kto-train; loads with PEFT.\n",
            self.config.r,
            self.config.lora_alpha,
            self.tensors.len()
        )
    }
}

/// Collects A and B by module and checks them.
fn read_pairs(store: &TensorStore, r: usize) -> Result<BTreeMap<String, LoraPair>> {
    let mut pairs = BTreeMap::new();
    for name in store.names() {
        let Some((module, side)) = split_name(name) else {
            return Err(Error::data(format!(
                "tensor \"{}\" is not a LoRA matrix of a linear layer",
                escape(name)
            )));
        };
        let other = format!("{PREFIX}{module}.lora_{}.weight", if side == 'A' { 'B' } else { 'A' });
        if !store.contains(&other) {
            return Err(Error::data(format!("tensor \"{}\" has no \"{}\"", escape(name), escape(&other))));
        }
        if side == 'A' {
            let (a, b) = (store.require(name)?, store.require(&other)?);
            pairs.insert(module.to_string(), read_pair(&a, &b, r)?);
        }
    }
    if pairs.is_empty() {
        return Err(Error::data("no LoRA matrices"));
    }
    Ok(pairs)
}

/// `base_model.model.<module>.lora_<side>.weight` to module and side.
fn split_name(name: &str) -> Option<(&str, char)> {
    let rest = name.strip_prefix(PREFIX)?;
    match (rest.strip_suffix(".lora_A.weight"), rest.strip_suffix(".lora_B.weight")) {
        (Some(module), _) => Some((module, 'A')),
        (_, Some(module)) => Some((module, 'B')),
        _ => None,
    }
}

fn read_pair(a: &TensorView, b: &TensorView, r: usize) -> Result<LoraPair> {
    let (&[rank_a, in_features], &[out_features, rank_b]) = (a.shape, b.shape) else {
        return Err(Error::data(format!(
            "tensor \"{}\": shapes {:?} and {:?} are not two matrices",
            escape(a.name),
            a.shape,
            b.shape
        )));
    };
    if rank_a != r {
        a.expect_shape(&[r, in_features])?;
    }
    if rank_b != r {
        b.expect_shape(&[out_features, r])?;
    }
    let pair = LoraPair { a: a.to_f32()?, b: b.to_f32()?, r, in_features, out_features };
    check_finite(a.name, 0, &pair.a)?;
    check_finite(b.name, 0, &pair.b)?;
    Ok(pair)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/trl/llama/adapter_init")
    }

    fn sample() -> Adapter {
        let pair = LoraPair { a: vec![0.5; 6], b: vec![-1.0; 8], r: 2, in_features: 3, out_features: 4 };
        let config = AdapterConfig {
            r: 2,
            lora_alpha: 3.5,
            lora_dropout: 0.1,
            target_modules: vec!["q_proj".into()],
            base_model_name_or_path: Some("some/base".into()),
            use_rslora: false,
        };
        let tensors = BTreeMap::from([("model.layers.0.self_attn.q_proj".to_string(), pair)]);
        Adapter { config, tensors, meta: AdapterMeta::default() }
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
        let meta = AdapterMeta { base_fingerprint: Some("abc".into()) };
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
        assert!(refused(|t| t[0].0.name.push('x')).contains("is not a LoRA matrix"));
        assert!(refused(|t| t[0].0.dtype = Dtype::I32).contains("dtype I32"));
        assert!(refused(|t| t.clear()).contains("no LoRA matrices"));
    }
}
