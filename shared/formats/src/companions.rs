//! The small files that belong beside a model's weights: tokenizer, chat template, generation settings, licence.
//!
//! Called by the tools that write model directories. Only files that lie in the model directory under a known name are
//! copied; code, other weights and model cards are not.

use crate::mmap::Map;
use kto_cli::{Context, Error, Result, atomic, escape};
use std::path::Path;

/// File names that are copied.
const NAMES: [&str; 12] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
/// Beginnings of file names that are copied.
const LEGAL: [&str; 4] = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"];
/// Folder of named chat templates.
const TEMPLATES: &str = "additional_chat_templates";
/// Longest file that is taken for a companion, in bytes.
const MAX_SIZE: usize = 1 << 30;

/// Returns whether a file of a model directory, named by its path in it, is a companion.
pub fn is_companion(path: &str) -> bool {
    match path.split_once('/') {
        None => is_known(path),
        Some((folder, name)) => folder == TEMPLATES && is_template(name),
    }
}

fn is_known(name: &str) -> bool {
    NAMES.contains(&name) || LEGAL.iter().any(|l| name.starts_with(l))
}

fn is_template(name: &str) -> bool {
    name.ends_with(".jinja") && !name.contains('/')
}

/// Copies the companions of the model in `from` into the directory `to` and returns their names, sorted.
pub fn copy(from: &Path, to: &Path) -> Result<Vec<String>> {
    let mut copied = copy_named(from, to, is_known)?;
    let templates = from.join(TEMPLATES);
    if templates.is_dir() {
        let target = to.join(TEMPLATES);
        // It may be there: a run that goes on copies again.
        atomic::create_dir_all(&target)?;
        let names = copy_named(&templates, &target, is_template)?;
        copied.extend(names.into_iter().map(|n| format!("{TEMPLATES}/{n}")));
    }
    copied.sort();
    Ok(copied)
}

fn copy_named(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut copied = Vec::new();
    for entry in std::fs::read_dir(from).map_err(|e| Error::reading(from, &e))? {
        let entry = entry.map_err(|e| Error::reading(from, &e))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !wanted(&name) || entry.path().is_dir() {
            continue;
        }
        let bytes = Map::open(&entry.path())?;
        if bytes.len() > MAX_SIZE {
            return Err(Error::data(format!("{} bytes, more than a file beside a model has", bytes.len())))
                .at(escape(&entry.path().display().to_string()));
        }
        atomic::write(&to.join(&name), &bytes)?;
        copied.push(name);
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_known_names_are_copied() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["tokenizer.json", "LICENSE.txt", "modeling_x.py", "model.safetensors", "README.md"] {
            fs::write(from.path().join(name), name).unwrap();
        }
        fs::create_dir(from.path().join(TEMPLATES)).unwrap();
        fs::write(from.path().join(TEMPLATES).join("tools.jinja"), "x").unwrap();
        let copied = copy(from.path(), to.path()).unwrap();
        assert_eq!(copied, ["LICENSE.txt", "additional_chat_templates/tools.jinja", "tokenizer.json"]);
        assert_eq!(fs::read_to_string(to.path().join("tokenizer.json")).unwrap(), "tokenizer.json");
    }
}
