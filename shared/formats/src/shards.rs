//! Weights of a model directory on the way out: split over files of bounded size, with the index that readers expect.
//!
//! Called by kto-quantize and kto-merge. Nothing of the weights is held here: the caller produces every tensor's bytes
//! when its turn comes. One file is called model.safetensors, several model-00001-of-0000N.safetensors.

use crate::{
    python_json,
    safetensors_out::{SafetensorsWriter, TensorSpec, standard_order},
};
use kto_cli::{Result, atomic};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};

/// Which tensor goes into which file.
pub struct Shards {
    files: Vec<(String, Vec<TensorSpec>)>,
}

/// Takes the next bytes of the current tensor.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

impl Shards {
    /// Distributes groups of tensors, in order, over files of at most `max_bytes` of data. A group stays together, so
    /// one larger than the limit makes a larger file.
    pub fn plan(groups: Vec<Vec<TensorSpec>>, max_bytes: u64) -> Self {
        let mut shards: Vec<Vec<TensorSpec>> = vec![Vec::new()];
        let mut filled = 0;
        for group in groups {
            let size: u64 = group.iter().map(TensorSpec::bytes).sum();
            if filled > 0 && filled + size > max_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += size;
            if let Some(last) = shards.last_mut() {
                last.extend(group);
            }
        }
        let count = shards.len();
        let name = |i: usize| match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let files = shards.into_iter().enumerate().map(|(i, mut tensors)| {
            standard_order(&mut tensors);
            (name(i), tensors)
        });
        Self { files: files.collect() }
    }

    /// Returns the number of files.
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// Returns the bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.files.iter().flat_map(|(_, tensors)| tensors).map(TensorSpec::bytes).sum()
    }

    /// Writes every file into `dir`, and the index if there are several. `produce` is called for each tensor in the
    /// order of the files and passes its bytes on, in any number of parts.
    pub fn write(
        &self,
        dir: &Path,
        metadata: &BTreeMap<String, String>,
        mut produce: impl FnMut(&TensorSpec, &mut Sink) -> Result<()>,
    ) -> Result<()> {
        for (name, tensors) in &self.files {
            let mut writer = SafetensorsWriter::new(&dir.join(name), tensors.clone(), metadata)?;
            for tensor in tensors {
                produce(tensor, &mut |bytes| writer.write(&tensor.name, bytes))?;
            }
            writer.finish()?;
        }
        if self.files.len() > 1 {
            atomic::write(&dir.join("model.safetensors.index.json"), self.index().as_bytes())?;
        }
        Ok(())
    }

    fn index(&self) -> String {
        let mut map = Map::new();
        for (file, tensors) in &self.files {
            map.extend(tensors.iter().map(|t| (t.name.clone(), json!(file))));
        }
        let index = json!({"metadata": {"total_size": self.bytes()}, "weight_map": Value::Object(map)});
        python_json::pretty_sorted(&index) + "\n"
    }
}

/// Reads a size as `500MB`, `2GiB`, `512M` or plain bytes; M and MB are 10^6, MiB is 2^20. For clap.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 =
        digits.parse().map_err(|_| format!("\"{text}\" is not a size such as 500MB or 2GiB"))?;
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kb" => 1000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        other => return Err(format!("unknown unit \"{other}\"; use MB, GB, MiB or GiB")),
    };
    let size = number * unit as f64;
    if !(1.0..=1e18).contains(&size) {
        return Err(format!("\"{text}\" is not between 1 byte and 10^18"));
    }
    Ok(size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model_dir::ModelDir, safetensors_out::pt_metadata};
    use safetensors::Dtype;

    fn groups() -> Vec<Vec<TensorSpec>> {
        ["a", "b", "c"]
            .map(|n| {
                vec![TensorSpec::new(n, Dtype::U8, [6]), TensorSpec::new(format!("{n}.s"), Dtype::F32, [1])]
            })
            .to_vec()
    }

    #[test]
    fn groups_stay_together_and_the_index_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let shards = Shards::plan(groups(), 20);
        assert_eq!((shards.count(), shards.bytes()), (2, 30));
        let write = |spec: &TensorSpec, sink: &mut Sink| {
            let byte = spec.name.as_bytes()[0];
            (0..spec.bytes()).try_for_each(|_| sink(&[byte]))
        };
        shards.write(dir.path(), &pt_metadata(), write).unwrap();
        let model = ModelDir::open(dir.path()).unwrap();
        assert!(model.notes.is_empty());
        assert_eq!(model.tensors.require("c").unwrap().data, b"cccccc");
        assert!(model.tensors.file_of("a").unwrap().ends_with("model-00001-of-00002.safetensors"));
        assert_eq!(Shards::plan(groups(), 5).count(), 3);
        assert_eq!(Shards::plan(groups(), 30).files[0].0, "model.safetensors");
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("5GB", 5_000_000_000), ("2GiB", 2 << 30), ("512m", 512_000_000), ("1.5k", 1500), ("7", 7)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "x", "5XB", "0", "-1", "nan", "1e30", "5 GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
