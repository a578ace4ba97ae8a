//! The tokens that end an answer: whatever any file of the model calls an end of sequence.

use kto_cli::{Context, Error, Kind, Result, escape, input};
use serde_json::Value;
use std::{collections::BTreeSet, path::Path};

const CAP: u64 = 16 << 20;

/// A set of token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops(BTreeSet<u32>);

impl Stops {
    /// Collects `eos_token_id` (a number or a list) of generation_config.json and config.json, and the tokenizer's.
    pub fn read(model: &Path, tokenizer: Option<u32>) -> Result<Self> {
        let mut ids: BTreeSet<u32> = tokenizer.into_iter().collect();
        for name in ["generation_config.json", "config.json"] {
            let path = model.join(name);
            let bytes = match input::read(&path, CAP) {
                Err(e) if e.kind() == Kind::NoInput && !path.exists() => continue,
                other => other?,
            };
            let place = escape(&path.display().to_string());
            let config: Value =
                serde_json::from_slice(&bytes).map_err(|e| Error::data(e.to_string())).at(&place)?;
            ids.extend(listed(&config).at(&place)?);
        }
        Ok(Self(ids))
    }

    /// Returns whether `id` ends an answer.
    pub fn contains(&self, id: u32) -> bool {
        self.0.contains(&id)
    }
}

fn listed(config: &Value) -> Result<Vec<u32>> {
    let field = config.get("eos_token_id").unwrap_or(&Value::Null);
    let list = match field {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list.iter().collect(),
        one => vec![one],
    };
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    list.into_iter().map(id).collect::<Option<_>>().ok_or_else(|| {
        Error::data(format!("\"eos_token_id\" must be a token id or a list of them, found {field}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_and_lists() {
        let of = |v: Value| listed(&v).ok();
        assert_eq!(of(json!({})), Some(vec![]));
        assert_eq!(of(json!({"eos_token_id": null})), Some(vec![]));
        assert_eq!(of(json!({"eos_token_id": 2})), Some(vec![2]));
        assert_eq!(of(json!({"eos_token_id": [2, 7]})), Some(vec![2, 7]));
        assert_eq!(of(json!({"eos_token_id": [2, -1]})), None);
        assert_eq!(of(json!({"eos_token_id": "</s>"})), None);
    }
}
