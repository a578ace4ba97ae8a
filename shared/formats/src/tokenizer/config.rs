//! tokenizer_config.json and special_tokens_map.json: what a tokenizer is besides its vocabulary.
//!
//! Read as transformers 5.23 reads them: a token is text or an object with `content`; special_tokens_map.json counts
//! only when tokenizer_config.json has no `added_tokens_decoder`. Every key that ends in `_token` becomes a variable
//! of the chat template.

use kto_cli::{Context, Error, Kind, Result, escape, input};
use serde_json::{Map, Value};
use std::path::Path;

/// Bytes of a configuration file, at most.
const CAP: u64 = 16 << 20;

/// The two files, merged. Empty when a directory has neither.
#[derive(Clone, Debug, Default)]
pub struct TokenizerConfig {
    fields: Map<String, Value>,
}

/// A token listed in `added_tokens_decoder`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedToken {
    /// Its id according to the list.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Blanks before it belong to it.
    pub lstrip: bool,
    /// Blanks behind it belong to it.
    pub rstrip: bool,
    /// Only as a whole word.
    pub single_word: bool,
    /// Looked for in the normalized text.
    pub normalized: bool,
    /// A control token.
    pub special: bool,
}

impl TokenizerConfig {
    /// Reads the configuration of a model directory; a missing file is an empty one. Errors: 65 when a file is not a
    /// JSON object.
    pub fn from_model_dir(dir: &Path) -> Result<Self> {
        let mut fields = object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        if !fields.contains_key("added_tokens_decoder")
            && let Some(map) = object(&dir.join("special_tokens_map.json"))?
        {
            fields.extend(map);
        }
        Ok(Self { fields })
    }

    /// Returns a configuration with these fields.
    #[cfg(test)]
    pub fn from_fields(fields: Value) -> Self {
        Self { fields: fields.as_object().cloned().unwrap_or_default() }
    }

    /// Returns the text of a named token, such as `eos_token`.
    pub fn token(&self, name: &str) -> Option<&str> {
        self.fields.get(name).and_then(text)
    }

    /// Returns whether `add_bos_token` or `add_eos_token` is stated, and their values.
    pub fn adds(&self) -> Option<(bool, bool)> {
        let flag = |name: &str| self.fields.get(name).and_then(Value::as_bool);
        match (flag("add_bos_token"), flag("add_eos_token")) {
            (None, None) => None,
            (bos, eos) => Some((bos.unwrap_or(false), eos.unwrap_or(false))),
        }
    }

    /// Returns `model_max_length`, unless it is the huge number that stands for none.
    pub fn max_length(&self) -> Option<u64> {
        self.fields.get("model_max_length").and_then(Value::as_u64)
    }

    /// Returns the class that transformers would use.
    pub fn class(&self) -> &str {
        self.fields.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default()
    }

    /// Returns a flag of the configuration.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.fields.get(name).and_then(Value::as_bool)
    }

    /// Returns `chat_template`: text, or a list of named templates.
    pub fn chat_template(&self) -> Option<&Value> {
        self.fields.get("chat_template").filter(|t| !t.is_null())
    }

    /// Returns the named tokens that are variables of a chat template: `bos_token`, `eos_token`, …
    pub fn template_variables(&self) -> Vec<(String, String)> {
        let named = self.fields.iter().filter(|(name, _)| name.ends_with("_token"));
        named.filter_map(|(name, value)| Some((name.clone(), text(value)?.to_string()))).collect()
    }

    /// Returns the texts of all tokens that are control tokens by name.
    pub fn special_tokens(&self) -> Vec<String> {
        let mut all: Vec<String> = self.template_variables().into_iter().map(|(_, text)| text).collect();
        for name in ["additional_special_tokens", "extra_special_tokens"] {
            match self.fields.get(name) {
                Some(Value::Array(list)) => all.extend(list.iter().filter_map(text).map(str::to_string)),
                Some(Value::Object(map)) => all.extend(map.values().filter_map(text).map(str::to_string)),
                _ => {}
            }
        }
        let mut seen = std::collections::HashSet::new();
        all.retain(|token| !token.is_empty() && seen.insert(token.clone()));
        all
    }

    /// Returns `added_tokens_decoder` by ascending id.
    pub fn listed_tokens(&self) -> Result<Vec<ListedToken>> {
        let Some(Value::Object(map)) = self.fields.get("added_tokens_decoder") else { return Ok(Vec::new()) };
        let mut tokens = map.iter().map(|(id, token)| listed(id, token)).collect::<Result<Vec<_>>>()?;
        tokens.sort_by_key(|token| token.id);
        Ok(tokens)
    }
}

fn listed(id: &str, token: &Value) -> Result<ListedToken> {
    let wrong =
        || Error::data(format!("tokenizer_config.json: \"added_tokens_decoder\" entry \"{}\"", escape(id)));
    let flag = |name: &str, default| token.get(name).and_then(Value::as_bool).unwrap_or(default);
    let special = flag("special", false);
    Ok(ListedToken {
        id: id.parse().map_err(|_| wrong())?,
        content: text(token).ok_or_else(wrong)?.to_string(),
        lstrip: flag("lstrip", false),
        rstrip: flag("rstrip", false),
        single_word: flag("single_word", false),
        normalized: flag("normalized", !special),
        special,
    })
}

/// A token given as text or as `{"content": …}`.
fn text(token: &Value) -> Option<&str> {
    match token {
        Value::String(text) => Some(text),
        Value::Object(map) => map.get("content").and_then(Value::as_str),
        _ => None,
    }
}

fn object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match input::read(path, CAP) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == Kind::NoInput && !path.exists() => return Ok(None),
        Err(e) => return Err(e),
    };
    let place = escape(&path.display().to_string());
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| Error::data(e.to_string())).at(&place)?;
    match value {
        Value::Object(map) => Ok(Some(map)),
        _ => Err(Error::data(format!("{place}: must be a JSON object"))),
    }
}
