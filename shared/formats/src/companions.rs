//! The small files that belong beside a model's weights: tokenizer, chat template, generation settings, licence.
//!
//! Called by the tools that write model directories. Only files that lie in the model directory under a known name are
//! copied; code, other weights and model cards are not.

use crate::mmap::{Map, shown};
use kto_cli::{Context, Error, Result, atomic, escape};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use std::{borrow::Cow, path::Path};

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

/// Returns the bytes that [`copy`] would write.
pub fn bytes(from: &Path) -> u64 {
    let of = |folder: &Path, wanted: &dyn Fn(&str) -> bool| -> u64 {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let wanted = entries.filter(|entry| entry.file_name().to_str().is_some_and(wanted));
        let files = wanted.filter_map(|entry| std::fs::metadata(entry.path()).ok()).filter(|m| m.is_file());
        files.map(|metadata| metadata.len()).sum()
    };
    of(from, &is_known) + of(&from.join(TEMPLATES), &is_template)
}

/// Returns what is wrong with the companions of a model, a line each. They are copied all the same: whoever reads only the weights has no
/// use for them, and what another program makes of them is not known here.
pub fn doubts(from: &Path) -> Vec<String> {
    let wrong = |name: &&str| {
        let path = from.join(name);
        let bytes = Map::open(&path).ok()?;
        let what = match serde_json::from_slice::<Outline>(&bytes) {
            Err(e) => format!("no JSON object: {}", escape(&e.to_string())),
            Ok(Outline { model: false }) if *name == "tokenizer.json" => {
                "no tokenizer: it has no \"model\"".into()
            }
            Ok(_) => return None,
        };
        Some(format!("{}: {what}; it is copied as it is", shown(&path)))
    };
    NAMES.iter().filter(|name| name.ends_with(".json")).filter_map(wrong).collect()
}

/// Whether a JSON text is an object that has a model.
struct Outline {
    model: bool,
}

impl<'de> Deserialize<'de> for Outline {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Outline;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Outline, M::Error> {
                let mut outline = Outline { model: false };
                while let Some(key) = map.next_key::<Cow<str>>()? {
                    outline.model |= key == "model";
                    map.next_value::<IgnoredAny>()?;
                }
                Ok(outline)
            }
        }
        from.deserialize_map(Keys)
    }
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
        assert_eq!(bytes(from.path()), 11 + 1 + 14);
        assert_eq!(copied, ["LICENSE.txt", "additional_chat_templates/tools.jinja", "tokenizer.json"]);
        assert_eq!(fs::read_to_string(to.path().join("tokenizer.json")).unwrap(), "tokenizer.json");
    }

    #[test]
    fn companions_that_are_no_json_are_named() {
        let from = tempfile::tempdir().unwrap();
        let say = |text: &str| {
            fs::write(from.path().join("tokenizer.json"), text).unwrap();
            doubts(from.path()).join("\n")
        };
        assert_eq!(say(r#"{"version": "1.0", "model": {"vocab": {}}}"#), "");
        assert!(say("{\"model\": {").contains("tokenizer.json: no JSON object: EOF"));
        assert!(say("[]").contains("no JSON object: invalid type: sequence, expected an object"));
        assert!(say("{\"vocab\": {}}").contains("no tokenizer: it has no \"model\""));
        fs::write(from.path().join("generation_config.json"), "x").unwrap();
        assert_eq!(say("{}").lines().count(), 2);
    }
}
