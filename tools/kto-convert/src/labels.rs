//! Labels: where a row keeps it and which values count.
//!
//! A column called `label` or `kto_tag` must hold true or false: 0, "no" and "false" mean different things to different
//! tools. A thumb or a vote says what it means, so its words count too. A rating needs thresholds.

use crate::{
    problem::{Problem, Reason},
    thresholds::Thresholds,
};
use kto_cli::{Error, Result};
use kto_formats::{
    json::{describe, quoted},
    record::{columns, label},
};
use serde_json::{Map, Value};

pub use crate::thresholds::Rated;

/// Columns that hold a label, in the order in which they are asked.
pub const COLUMNS: [&str; 2] = ["label", "kto_tag"];
/// Columns that hold a thumb or a vote.
const THUMBS: [&str; 7] = ["feedback", "thumb", "thumbs", "vote", "reaction", "user_feedback", "preference"];
/// Columns that hold a rating.
const RATINGS: [&str; 5] = ["rating", "score", "overall_score", "stars", "user_score"];
/// Words of a thumb that is up, and of one that is down.
const UP: [&str; 12] = [
    "up",
    "thumbs_up",
    "thumbsup",
    "thumbs up",
    "thumb_up",
    "👍",
    "like",
    "liked",
    "upvote",
    "positive",
    "good",
    "desirable",
];
const DOWN: [&str; 12] = [
    "down",
    "thumbs_down",
    "thumbsdown",
    "thumbs down",
    "thumb_down",
    "👎",
    "dislike",
    "disliked",
    "downvote",
    "negative",
    "bad",
    "undesirable",
];

/// The rules of `--label-field`, `--label-map`, `--label`, `--desirable` and `--undesirable`.
#[derive(Clone, Debug, Default)]
pub struct Labels {
    field: Option<String>,
    map: Vec<(String, bool)>,
    default: Option<bool>,
    thresholds: Option<Thresholds>,
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
        Ok(Self { field, map, default, thresholds: None })
    }

    /// Adds the thresholds of ratings.
    pub fn with_thresholds(mut self, thresholds: Option<Thresholds>) -> Self {
        self.thresholds = thresholds;
        self
    }

    /// The thresholds of ratings, when there are any.
    pub fn thresholds(&self) -> Option<&Thresholds> {
        self.thresholds.as_ref()
    }

    /// True when a label is true or false in its usual column.
    pub fn are_plain(&self) -> bool {
        let unset = self.field.is_none() && self.default.is_none() && self.thresholds.is_none();
        unset && self.map.is_empty()
    }

    /// True when `row` has a label or is given one.
    pub fn is_known_for(&self, row: &Map<String, Value>) -> bool {
        self.default.is_some() || self.column(row).is_some()
    }

    /// The column that holds the label of `row`, if there is one.
    pub fn column<'a>(&'a self, row: &Map<String, Value>) -> Option<&'a str> {
        let found = |columns: &[&'static str]| {
            columns.iter().copied().find(|c| row.get(*c).is_some_and(|v| !v.is_null()))
        };
        match &self.field {
            Some(field) => row.contains_key(field).then_some(field),
            None if self.default.is_some() => found(&COLUMNS),
            None => found(&COLUMNS).or_else(|| found(&THUMBS)).or_else(|| {
                // A rating without a value is one as well: nobody rated.
                RATINGS.into_iter().find(|c| row.contains_key(*c))
            }),
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
        self.read(column, &value, table)
    }

    /// Reads the value of a label's column.
    pub fn read(&self, column: &str, value: &Value, table: bool) -> Result<bool, Problem> {
        let text = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if let Some((_, bool)) = self.map.iter().find(|(v, _)| *v == text) {
            return Ok(*bool);
        }
        if let Some(thresholds) = &self.thresholds
            && !value.is_boolean()
        {
            return thresholds.label(column, value);
        }
        if table && let Ok(bool) = text.trim().to_ascii_lowercase().parse() {
            return Ok(bool);
        }
        if THUMBS.contains(&column) {
            return thumb(column, value);
        }
        if RATINGS.contains(&column) && !value.is_boolean() {
            return rating(column, value);
        }
        label(column, value).map_err(Reason::Label.because())
    }

    /// Reads a value that is 1 or 0 by its type, as Langfuse's BOOLEAN.
    pub fn bit(&self, column: &str, value: &Value) -> Result<bool, Problem> {
        match crate::shapes::number(value) {
            Some(1.0) => Ok(true),
            Some(0.0) => Ok(false),
            _ => self.read(column, value, false),
        }
    }
}

/// A thumb: a word, a bool, 1 or -1, or an object with one of these inside.
fn thumb(column: &str, value: &Value) -> Result<bool, Problem> {
    let inner = ["thumb", "thumbs", "rating", "value", "label", "score", "type"];
    match value {
        Value::Bool(up) => Ok(*up),
        Value::Number(n) if n.as_f64() == Some(1.0) => Ok(true),
        Value::Number(n) if n.as_f64() == Some(-1.0) => Ok(false),
        Value::Object(fields) => match inner.iter().find_map(|key| fields.get(*key)) {
            Some(value) if !value.is_object() => thumb(column, value),
            _ => Err(unknown(column, value)),
        },
        Value::String(word) => {
            let word = word.trim().to_lowercase();
            match (UP.contains(&word.as_str()), DOWN.contains(&word.as_str())) {
                (true, _) => Ok(true),
                (_, true) => Ok(false),
                _ => Err(unknown(column, value)),
            }
        }
        _ => Err(unknown(column, value)),
    }
}

fn unknown(column: &str, value: &Value) -> Problem {
    let what = format!("field {}: neither up nor down: {}", quoted(column), describe(value));
    Reason::Label
        .error(Error::data(what).with_hint("--label-map VALUE=true,VALUE=false says what values mean"))
}

/// A rating without thresholds: words may say enough, numbers do not.
fn rating(column: &str, value: &Value) -> Result<bool, Problem> {
    match value {
        Value::Null => Err(Reason::NoRating.says(format!("field {} is null", quoted(column)))),
        Value::String(text) if text.trim().is_empty() => {
            Err(Reason::NoRating.says(format!("field {} is empty", quoted(column))))
        }
        Value::String(text) if text.trim().parse::<f64>().is_err() => thumb(column, value),
        _ => {
            let what = format!("field {} is a rating, found {}", quoted(column), describe(value));
            let hint = "--desirable '>=4' --undesirable '<=2' says which ratings are which";
            Err(Reason::Label.error(Error::data(what).with_hint(hint)))
        }
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
