//! Which files of a model a tool needs, and which of them a directory lacks.

use kto_cli::{Error, Kind, Result, escape, input};
use kto_formats::{companions, model_dir, text_part};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// What a tool wants of a model.
pub enum Need {
    /// Tokenizer, templates and configuration: a few megabytes.
    Tokenizer,
    /// The weights too. The function looks at config.json before gigabytes are fetched for nothing.
    Weights(fn(&Value) -> Result<()>),
}

/// The weights in one file, and the index of those in several.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

impl Need {
    /// Returns what a snapshot lacks; None when it is whole.
    pub fn lacking(&self, dir: &Path) -> Result<Option<String>> {
        let lacks = |name: &str| (!dir.join(name).is_file()).then(|| name.to_string());
        match self {
            Self::Tokenizer => Ok(lacks("tokenizer.json")),
            Self::Weights(_) => {
                if let Some(name) = lacks(CONFIG) {
                    return Ok(Some(name));
                }
                if lacks(SINGLE).is_none() {
                    return Ok(None);
                }
                match lacks(INDEX) {
                    Some(_) => Ok(Some(SINGLE.into())),
                    None => Ok(model_dir::shards(&dir.join(INDEX))?.iter().find_map(|shard| lacks(shard))),
                }
            }
        }
    }

    /// Chooses the files to fetch first, all of them small: of these a snapshot tells whether the rest is wanted.
    /// Errors: 65 when the model has no weights that are read, 66 when it has no tokenizer.
    pub fn small<'a>(&self, listed: &BTreeSet<&'a str>) -> Result<Vec<&'a str>> {
        let mut wanted: Vec<&str> = listed.iter().copied().filter(|name| is_small(name)).collect();
        match self {
            Self::Tokenizer if !listed.contains("tokenizer.json") => {
                return Err(Error::new(Kind::NoInput, "has no tokenizer.json"));
            }
            Self::Tokenizer => {}
            Self::Weights(_) if !listed.contains(CONFIG) => {
                return Err(Error::new(Kind::NoInput, "has no config.json"));
            }
            Self::Weights(_) if listed.contains(SINGLE) => {}
            Self::Weights(_) if listed.contains(INDEX) => wanted.push(INDEX),
            Self::Weights(_) => return Err(no_weights(listed)),
        }
        Ok(wanted)
    }

    /// Chooses the files of weights, once the small ones lie in `dir`. Errors: 65 when configuration or index is refused.
    pub fn weights(&self, dir: &Path, listed: &BTreeSet<&str>) -> Result<Vec<String>> {
        let Self::Weights(check) = self else { return Ok(Vec::new()) };
        let path = dir.join(CONFIG);
        let config = serde_json::from_slice(&input::read(&path, model_dir::MAX_JSON)?);
        let config =
            config.map_err(|e| Error::data(format!("{CONFIG}: not JSON: {}", escape(&e.to_string()))))?;
        check(&text_part::of_value(config))?;
        if listed.contains(SINGLE) {
            return Ok(vec![SINGLE.into()]);
        }
        let shards = model_dir::shards(&dir.join(INDEX))?;
        match shards.iter().find(|shard| !listed.contains(shard.as_str())) {
            Some(shard) => {
                Err(Error::data(format!("{INDEX} names {}, which the model lacks", escape(shard))))
            }
            None => Ok(shards.into_iter().collect()),
        }
    }
}

fn is_small(name: &str) -> bool {
    name == CONFIG || companions::is_companion(name)
}

fn no_weights(listed: &BTreeSet<&str>) -> Error {
    let found = |ends: &[&str]| listed.iter().find(|n| ends.iter().any(|e| n.ends_with(e)));
    if let Some(name) = found(&[".bin", ".pt", ".pth", ".ckpt"]) {
        let name = escape(name);
        return Error::data(format!(
            "has pickle weights ({name}), which can run code when loaded; only safetensors are read"
        ));
    }
    match found(&[".gguf"]) {
        Some(name) => Error::data(format!("has GGUF weights ({}); only safetensors are read", escape(name)))
            .with_hint(kto_formats::gguf::HINT),
        None => Error::data(format!("has neither {SINGLE} nor {INDEX}")),
    }
}

/// Takes a name that the hub gave as a path below a folder. Errors (65): it would lead out of there.
pub fn relative(name: &str) -> Result<PathBuf> {
    let part =
        |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', '\0', ':']);
    match name.len() <= 1024 && name.split('/').all(part) {
        true => Ok(name.split('/').collect()),
        false => Err(Error::data(format!("the file name \"{}\" leads out of the model", escape(name)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below_the_snapshot() {
        assert_eq!(relative("a/b.json").unwrap(), Path::new("a/b.json"));
        for name in ["", "/a", "a//b", "../a", "a/../b", "a/", ".", "a\\..\\b", "c:x", "a\0b"] {
            assert_eq!(relative(name).unwrap_err().kind(), Kind::Data, "{name:?}");
        }
    }

    #[test]
    fn what_is_fetched_is_what_is_read() {
        let any = Need::Weights(|_| Ok(()));
        let listed = |names: &[&'static str]| names.iter().copied().collect::<BTreeSet<&str>>();
        let all = listed(&[
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "README.md",
            "tokenizer.json",
            "onnx/model.onnx",
            "chat_template.jinja",
            "additional_chat_templates/rag.jinja",
            "modeling_x.py",
            "LICENSE",
            "original/consolidated.00.pth",
        ]);
        let small = any.small(&all).unwrap();
        assert_eq!(
            small,
            [
                "LICENSE",
                "additional_chat_templates/rag.jinja",
                "chat_template.jinja",
                "config.json",
                "tokenizer.json"
            ]
        );
        let message = |need: &Need, names| need.small(&listed(names)).unwrap_err().to_string();
        assert!(
            message(&any, &["config.json", "pytorch_model.bin"])
                .contains("pickle weights (pytorch_model.bin)")
        );
        assert!(message(&any, &["config.json", "a.Q4.gguf"]).contains("GGUF"));
        assert!(message(&any, &["model.safetensors"]).contains("no config.json"));
        assert!(message(&Need::Tokenizer, &["config.json"]).contains("no tokenizer.json"));
    }
}
