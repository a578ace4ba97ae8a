//! Where a model directory keeps its chat template, and what must be rewritten before minijinja can read it.

use super::SOURCE_CAP;
use crate::tokenizer::TokenizerConfig;
use kto_cli::{Error, Kind, Result, escape, input};
use serde_json::Value;
use std::path::Path;

/// One template as it was found.
pub struct Source {
    /// The file, for messages.
    pub name: String,
    /// The text as read.
    pub text: String,
}

/// The templates of a model.
pub struct Sources {
    /// The one for rows without tools, and with, if there is no other.
    pub default: Source,
    /// The one named `tool_use`.
    pub tools: Option<Source>,
}

impl Sources {
    fn one(name: String, text: String) -> Self {
        Self { default: Source { name, text }, tools: None }
    }
}

/// Reads a template file.
pub fn of_file(path: &Path) -> Result<Sources> {
    let bytes = input::read(path, SOURCE_CAP as u64)?;
    let name = path.display().to_string();
    let text = String::from_utf8(bytes).map_err(|_| Error::data(format!("{}: not UTF-8", escape(&name))))?;
    Ok(Sources::one(name, text))
}

/// Finds the template of a model directory; the file wins over the configuration, as in transformers.
pub fn of_model_dir(dir: &Path, config: &TokenizerConfig) -> Result<Sources> {
    match of_file(&dir.join("chat_template.jinja")) {
        Err(e) if e.kind() == Kind::NoInput && !dir.join("chat_template.jinja").exists() => {}
        other => return other,
    }
    let name = dir.join("tokenizer_config.json").display().to_string();
    match config.chat_template() {
        Some(Value::String(text)) => Ok(Sources::one(name, text.clone())),
        Some(Value::Array(named)) => named_templates(&name, named),
        Some(_) => Err(Error::data(format!("{}: \"chat_template\" must be text or a list", escape(&name)))),
        None => Err(missing(&dir.display().to_string(), "has no chat template")),
    }
}

/// The list form: `[{"name": …, "template": …}, …]`.
fn named_templates(name: &str, list: &[Value]) -> Result<Sources> {
    let find = |wanted: &str| {
        let entry = list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some(wanted));
        let text = entry.and_then(|t| t.get("template")).and_then(Value::as_str);
        text.map(|text| Source { name: name.into(), text: text.into() })
    };
    match find("default") {
        Some(default) => Ok(Sources { default, tools: find("tool_use") }),
        None => Err(missing(name, "several chat templates and none is named \"default\"")),
    }
}

fn missing(place: &str, what: &str) -> Error {
    Error::data(format!("{}: {what}", escape(place))).with_hint("--template FILE gives one")
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

    #[test]
    fn named_lists_need_a_default() {
        let list =
            serde_json::json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
        let sources = named_templates("x", list.as_array().unwrap()).unwrap();
        assert_eq!((sources.default.text.as_str(), sources.tools.unwrap().text.as_str()), ("D", "T"));
        assert!(named_templates("x", &list.as_array().unwrap()[..1]).is_err());
    }
}
