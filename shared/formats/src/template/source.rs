//! Where a model directory keeps its chat template, and what must be rewritten before minijinja can read it.

use super::SOURCE_CAP;
use crate::tokenizer::TokenizerConfig;
use kto_cli::{Error, Kind, Result, escape, input};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// One template as it was found.
pub struct Source {
    /// The file, for messages.
    pub name: String,
    /// The text as read.
    pub text: String,
}

/// The templates that one choice of the user comes to.
pub struct Sources {
    /// The one for rows without tools, and with, if there is no other.
    pub default: Source,
    /// The one named `tool_use`.
    pub tools: Option<Source>,
}

impl Sources {
    fn one(source: Source) -> Self {
        Self { default: source, tools: None }
    }
}

/// The name of the template that is used when none is asked for.
const DEFAULT: &str = "default";
/// The name of the template for rows with tools.
const TOOL_USE: &str = "tool_use";
/// The file of the default template, and the folder of those with other names.
const FILE: &str = "chat_template.jinja";
const FOLDER: &str = "additional_chat_templates";

/// Reads a template file.
pub fn of_file(path: &Path) -> Result<Sources> {
    read(path).map(Sources::one)
}

fn read(path: &Path) -> Result<Source> {
    let bytes = input::read(path, SOURCE_CAP as u64)?;
    let name = path.display().to_string();
    let text = String::from_utf8(bytes).map_err(|_| Error::data(format!("{}: not UTF-8", escape(&name))))?;
    Ok(Source { name, text })
}

/// Returns the file that `choice` names: None when it is the name of one of the model's own templates.
/// Errors: 65 or 66 when the model's templates cannot be read.
pub fn file_of_choice(choice: &Path, dir: &Path, config: &TokenizerConfig) -> Result<Option<PathBuf>> {
    let named = named(dir, config)?;
    Ok((!named.iter().any(|(name, _)| choice == Path::new(name))).then(|| choice.to_path_buf()))
}

/// Finds the template that the user chose: a name that the model has, else a file.
pub fn chosen(choice: &Path, dir: &Path, config: &TokenizerConfig) -> Result<Sources> {
    if let Some(path) = file_of_choice(choice, dir, config)? {
        return of_file(&path).map_err(|e| match e.kind() {
            Kind::NoInput => e.with_hint(known(&named(dir, config).unwrap_or_default())),
            _ => e,
        });
    }
    let mut named = named(dir, config)?;
    match named.iter().position(|(name, _)| choice == Path::new(name)) {
        Some(at) => Ok(Sources::one(named.swap_remove(at).1)),
        None => Err(Error::internal("a chat template disappeared")),
    }
}

/// Finds the templates of a model directory that are used when nothing is chosen.
pub fn of_model_dir(dir: &Path, config: &TokenizerConfig) -> Result<Sources> {
    let mut named = named(dir, config)?;
    let place = escape(&dir.display().to_string());
    if named.is_empty() {
        return Err(
            Error::data(format!("{place}: has no chat template")).with_hint("--chat-template FILE gives one")
        );
    }
    let mut take =
        |wanted: &str| named.iter().position(|(name, _)| name == wanted).map(|at| named.swap_remove(at).1);
    match (take(DEFAULT), take(TOOL_USE)) {
        (Some(default), tools) => Ok(Sources { default, tools }),
        (None, tools) => {
            named.extend(tools.map(|tools| (TOOL_USE.to_string(), tools)));
            named.sort_by(|a, b| a.0.cmp(&b.0));
            let what = format!("{place}: several chat templates and none is named \"default\"");
            Err(Error::data(what).with_hint(known(&named)))
        }
    }
}

fn known(named: &[(String, Source)]) -> String {
    let names: Vec<String> = named.iter().map(|(name, _)| escape(name)).collect();
    match names.as_slice() {
        [] => "--chat-template takes a file; the model has no templates of its own".into(),
        names => format!("--chat-template takes a file or one of the model's: {}", names.join(", ")),
    }
}

/// All templates of a model directory with their names; files win over the configuration, as in transformers.
fn named(dir: &Path, config: &TokenizerConfig) -> Result<Vec<(String, Source)>> {
    let mut found = in_files(dir)?;
    if !found.is_empty() {
        return Ok(found);
    }
    let place = dir.join("tokenizer_config.json").display().to_string();
    let wrong = |what: &str| Error::data(format!("{}: {what}", escape(&place)));
    let source = |text: &str| Source { name: place.clone(), text: text.into() };
    match config.chat_template() {
        None => {}
        Some(Value::String(text)) => found.push((DEFAULT.into(), source(text))),
        Some(Value::Array(list)) => {
            for entry in list {
                let field = |name: &str| entry.get(name).and_then(Value::as_str);
                let (Some(name), Some(text)) = (field("name"), field("template")) else {
                    return Err(wrong("an entry of \"chat_template\" lacks \"name\" or \"template\""));
                };
                // The last of equal names counts, as in a Python dictionary.
                found.retain(|(known, _)| known != name);
                found.push((name.into(), source(text)));
            }
        }
        Some(_) => return Err(wrong("\"chat_template\" must be text or a list")),
    }
    Ok(found)
}

fn in_files(dir: &Path) -> Result<Vec<(String, Source)>> {
    let mut found = Vec::new();
    let file = dir.join(FILE);
    if file.exists() {
        found.push((DEFAULT.to_string(), read(&file)?));
    }
    let folder = dir.join(FOLDER);
    let Ok(entries) = std::fs::read_dir(&folder) else { return Ok(found) };
    for entry in entries {
        let path = entry.map_err(|e| Error::reading(&folder, &e))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if let Some(name) = name.strip_suffix(".jinja") {
            found.push((name.to_string(), read(&path)?));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

impl Source {
    /// Returns the text that minijinja compiles: line ends as jinja2 reads them, `{% generation %}` as a block that is
    /// always rendered. Errors (65): longer than the cap.
    pub fn prepared(&self) -> Result<String> {
        if self.text.len() > SOURCE_CAP {
            let length = self.text.len();
            let name = escape(&self.name);
            return Err(Error::data(format!(
                "{name}: a chat template of {length} bytes, the limit is {SOURCE_CAP}"
            )));
        }
        Ok(without_generation_tags(&self.text.replace("\r\n", "\n").replace('\r', "\n")))
    }
}

/// Rewrites `{% generation %}` to `{% if true %}` and `{% endgeneration %}` to `{% endif %}`, keeping the marks that
/// govern white space.
fn without_generation_tags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(length) = tag.find("%}") else { break };
        let inner = &tag[2..length];
        let word = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&format!("{{%{}%}}", inner.replacen("generation", "if true", 1))),
            "endgeneration" => {
                out.push_str(&format!("{{%{}%}}", inner.replacen("endgeneration", "endif", 1)))
            }
            _ => {
                // Only the opening is consumed: a "%}" inside a string must not hide the tags behind it.
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        }
        rest = &tag[length + 2..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_plain_blocks() {
        let text = "a {%- generation -%}x{% endgeneration %} {% set a = '%}' %}{%generation%}y{%-  endgeneration -%}{% if";
        let expected = "a {%- if true -%}x{% endif %} {% set a = '%}' %}{%if true%}y{%-  endif -%}{% if";
        assert_eq!(without_generation_tags(text), expected);
    }

    fn config(templates: Value) -> TokenizerConfig {
        TokenizerConfig::from_fields(serde_json::json!({ "chat_template": templates }))
    }

    #[test]
    fn named_lists_need_a_default_or_a_choice() {
        let dir = tempfile::tempdir().unwrap();
        let list = serde_json::json!([
            {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}, {"name": "default", "template": "D"}
        ]);
        let all = config(list.clone());
        let sources = of_model_dir(dir.path(), &all).unwrap();
        assert_eq!((sources.default.text.as_str(), sources.tools.unwrap().text.as_str()), ("D", "T"));
        let one = chosen(Path::new("rag"), dir.path(), &all).unwrap();
        assert_eq!((one.default.text.as_str(), one.tools.is_none()), ("R", true));
        let error = of_model_dir(dir.path(), &config(Value::from(&list.as_array().unwrap()[..2])));
        let error = error.map(|_| ()).unwrap_err();
        assert_eq!(
            error.hint(),
            Some("--chat-template takes a file or one of the model's: rag, tool_use"),
            "{error}"
        );
        let error = chosen(Path::new("no such"), dir.path(), &all).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::NoInput);
        assert!(error.hint().unwrap().ends_with("tool_use, rag, default"), "{error}");
        let broken = config(serde_json::json!([{"name": "default"}]));
        assert!(of_model_dir(dir.path(), &broken).is_err());
    }

    #[test]
    fn files_win_over_the_configuration_and_have_names() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(Value::from("configured"));
        std::fs::create_dir(dir.path().join(FOLDER)).unwrap();
        std::fs::write(dir.path().join(FOLDER).join("tool_use.jinja"), "T").unwrap();
        std::fs::write(dir.path().join(FOLDER).join("notes.txt"), "N").unwrap();
        assert!(of_model_dir(dir.path(), &config).is_err(), "as transformers, which then has no default");
        std::fs::write(dir.path().join(FILE), "F").unwrap();
        let sources = of_model_dir(dir.path(), &config).unwrap();
        assert_eq!((sources.default.text.as_str(), sources.tools.unwrap().text.as_str()), ("F", "T"));
        // A file of that name elsewhere does not hide the model's own.
        assert_eq!(file_of_choice(Path::new("tool_use"), dir.path(), &config).unwrap(), None);
        let file = dir.path().join(FILE);
        assert_eq!(file_of_choice(&file, dir.path(), &config).unwrap(), Some(file.clone()));
        assert_eq!(chosen(&file, dir.path(), &config).unwrap().default.text, "F");
    }
}
