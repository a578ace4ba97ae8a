//! `rank_pattern` and `alpha_pattern` of PEFT: values for modules whose name ends in a key.
//!
//! PEFT takes the first key k for which the regular expression `(.*\.)?(k)$` matches. Keys here are names, with `^` before a whole one;
//! a key that uses more of regular expressions is refused.

use kto_cli::{Error, Result, escape};
use serde_json::Value;

/// A pattern, checked.
pub struct Pattern(Vec<(String, f64)>);

impl Pattern {
    /// Reads `key` of adapter_config.json. Errors (65): no object of positive numbers, a key that is more than a name.
    pub fn read(settings: &serde_json::Map<String, Value>, key: &str) -> Result<Self> {
        let map = match settings.get(key) {
            None | Some(Value::Null) => return Ok(Self(Vec::new())),
            Some(Value::Object(map)) => map,
            Some(_) => return Err(Error::data(format!("field \"{key}\" must be an object"))),
        };
        let mut entries = Vec::new();
        for (name, value) in map {
            let value = value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
            let value =
                value.ok_or_else(|| Error::data(format!("{key}: \"{}\" has no number", escape(name))))?;
            let plain = name.replace("\\.", ".");
            let rest = plain.strip_prefix('^').unwrap_or(&plain);
            if !rest.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) || rest.is_empty() {
                return Err(Error::data(format!(
                    "{key}: \"{}\" is a regular expression; only names are read",
                    escape(name)
                )));
            }
            entries.push((plain, value));
        }
        Ok(Self(entries))
    }

    /// Returns the value of a module; `None` where no key matches.
    pub fn of(&self, module: &str) -> Option<f64> {
        let matches = |key: &str| match key.strip_prefix('^') {
            Some(whole) => module == whole,
            None => module.strip_suffix(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
        };
        self.0.iter().find(|(key, _)| matches(key)).map(|(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Pattern> {
        let mut map = serde_json::Map::new();
        map.insert("rank_pattern".into(), value);
        Pattern::read(&map, "rank_pattern")
    }

    #[test]
    fn the_first_key_that_matches_counts() {
        let pattern =
            read(json!({"layers.1.mlp.up_proj": 4, "up_proj": 8, "^model.x": 2, "a\\.b": 3})).unwrap();
        assert_eq!(pattern.of("model.layers.1.mlp.up_proj"), Some(4.0));
        assert_eq!(pattern.of("model.layers.11.mlp.up_proj"), Some(8.0));
        assert_eq!(pattern.of("model.layers.11.mlp.gup_proj"), None);
        assert_eq!(
            (pattern.of("model.x"), pattern.of("y.model.x"), pattern.of("q.a.b")),
            (Some(2.0), None, Some(3.0))
        );
        assert!(
            read(json!({"layers.[01].x": 4})).is_err()
                && read(json!({"x": "4"})).is_err()
                && read(json!([])).is_err()
        );
    }
}
