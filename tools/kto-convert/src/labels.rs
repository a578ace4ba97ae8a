//! Labels: where a row keeps it and which values count.

use crate::problem::{Problem, Reason};
use kto_cli::{Error, Result};
use kto_formats::{
    json::quoted,
    record::{columns, label},
};
use serde_json::{Map, Value};

/// Columns that hold a label, in the order in which they are asked.
pub const COLUMNS: [&str; 2] = ["label", "kto_tag"];

/// The rules of `--label-field`, `--label-map` and `--label`.
#[derive(Clone, Debug, Default)]
pub struct Labels {
    field: Option<String>,
    map: Vec<(String, bool)>,
    default: Option<bool>,
}

impl Labels {
    /// Checks the flags; `pairs` are `VALUE=BOOL`.
    pub fn new(field: Option<String>, pairs: &[String], default: Option<bool>) -> Result<Self> {
        let mut map: Vec<(String, bool)> = Vec::new();
        for pair in pairs {
            let parsed =
                pair.rsplit_once('=').and_then(|(value, bool)| Some((value, bool.parse::<bool>().ok()?)));
            let Some((value, bool)) = parsed else {
                return Err(Error::usage(format!(
                    "--label-map takes VALUE=true or VALUE=false, found \"{pair}\""
                )));
            };
            if map.iter().any(|(v, b)| v == value && *b != bool) {
                return Err(Error::usage(format!("--label-map gives \"{value}\" both labels")));
            }
            map.push((value.to_owned(), bool));
        }
        Ok(Self { field, map, default })
    }

    /// True when `row` has a label or is given one.
    pub fn is_known_for(&self, row: &Map<String, Value>) -> bool {
        self.default.is_some() || self.column(row).is_some()
    }

    /// The column that holds the label of `row`, if there is one.
    pub fn column<'a>(&'a self, row: &Map<String, Value>) -> Option<&'a str> {
        match &self.field {
            Some(field) => row.contains_key(field).then_some(field),
            None => COLUMNS.into_iter().find(|c| row.get(*c).is_some_and(|v| !v.is_null())),
        }
    }

    /// Names the column that should hold the label when `row` has none of that name.
    pub fn missing(&self, row: &Map<String, Value>) -> Result<(), Problem> {
        let wanted = self.field.as_deref().unwrap_or(COLUMNS[0]);
        if self.is_known_for(row) || row.contains_key(wanted) {
            return Ok(());
        }
        let what = format!("field {} is missing{}", quoted(wanted), columns(row));
        let hint = "--label-field COLUMN names the column that holds it, --label BOOL gives one to all";
        Err(Reason::MissingField.error(Error::data(what).with_hint(hint)))
    }

    /// Takes the label out of a row. `table`: cells are text, so true and false are accepted as words.
    pub fn take(&self, row: &mut Map<String, Value>, table: bool) -> Result<bool, Problem> {
        let wanted = self.field.as_deref().unwrap_or(COLUMNS[0]);
        let column = match (self.column(row), self.default) {
            (Some(column), _) => column,
            (None, Some(label)) => return Ok(label),
            (None, None) => wanted,
        };
        let value = row.shift_remove(column).unwrap_or_default();
        let text = match &value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if let Some((_, bool)) = self.map.iter().find(|(v, _)| *v == text) {
            return Ok(*bool);
        }
        if table && let Ok(bool) = text.trim().to_ascii_lowercase().parse() {
            return Ok(bool);
        }
        label(column, &value).map_err(Reason::Label.because())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn take(labels: &Labels, row: Value, table: bool) -> Result<bool, String> {
        let Value::Object(mut row) = row else { panic!("an object") };
        labels.take(&mut row, table).map_err(|p| p.error.to_string())
    }

    #[test]
    fn only_bools_by_default() {
        let plain = Labels::default();
        assert_eq!(take(&plain, json!({"label": true}), false), Ok(true));
        assert_eq!(take(&plain, json!({"kto_tag": false}), false), Ok(false));
        assert_eq!(take(&plain, json!({"label": null, "kto_tag": false}), false), Ok(false));
        for wrong in
            [json!(1), json!(0), json!("true"), json!("False"), json!(0.5), json!(null), json!([true])]
        {
            assert!(take(&plain, json!({"label": wrong}), false).is_err(), "{wrong}");
        }
        assert_eq!(take(&plain, json!({"label": "True"}), true), Ok(true));
        assert!(take(&plain, json!({"label": "1"}), true).is_err());
        let Value::Object(row) = json!({"x": 1}) else { panic!("an object") };
        let missing = plain.missing(&row).unwrap_err().error.to_string();
        assert_eq!(missing, "field \"label\" is missing (found \"x\")");
    }

    #[test]
    fn maps_and_fields() {
        let labels =
            Labels::new(Some("rating".into()), &["5=true".into(), "bad=false".into()], None).unwrap();
        assert_eq!(take(&labels, json!({"rating": 5, "label": false}), false), Ok(true));
        assert_eq!(take(&labels, json!({"rating": "5"}), true), Ok(true));
        assert_eq!(take(&labels, json!({"rating": "bad"}), false), Ok(false));
        assert_eq!(take(&labels, json!({"rating": true}), false), Ok(true));
        assert!(take(&labels, json!({"rating": 3}), false).is_err());
        assert!(Labels::new(None, &["a=yes".into()], None).is_err());
        assert!(Labels::new(None, &["a=true".into(), "a=false".into()], None).is_err());
    }
}
