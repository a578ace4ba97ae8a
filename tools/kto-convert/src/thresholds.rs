//! Ratings to labels: `--desirable '>=4' --undesirable '<=2'`.

use crate::problem::{Problem, Reason};
use kto_cli::{Error, Result};
use kto_formats::json::{describe, quoted};
use serde_json::Value;

/// What a rating says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rated {
    /// Desirable or not.
    Label(bool),
    /// Between the thresholds.
    Middle,
}

/// Which ratings are desirable and which are not.
#[derive(Clone, Debug)]
pub struct Thresholds {
    desirable: Vec<Test>,
    undesirable: Vec<Test>,
}

/// One condition of a list that is joined by commas: any of them will do.
#[derive(Clone, Debug, PartialEq)]
enum Test {
    Least(f64),
    Above(f64),
    Most(f64),
    Below(f64),
    Is(f64),
    Between(f64, f64),
    Word(String),
}

impl Thresholds {
    /// Reads the flags; `None` when neither is given. Errors are usage errors (2).
    pub fn new(desirable: Option<&str>, undesirable: Option<&str>) -> Result<Option<Self>> {
        if desirable.is_none() && undesirable.is_none() {
            return Ok(None);
        }
        let tests = |flag: &str, text: Option<&str>| {
            let wrong = |test: &str| {
                Error::usage(format!(
                    "{flag} takes conditions such as '>=4', '<2', '=5', '4..5' or '=good', found \"{test}\""
                ))
            };
            let test = |one: &str| Test::parse(one.trim()).ok_or_else(|| wrong(one));
            text.map_or(Ok(Vec::new()), |text| text.split(',').map(test).collect())
        };
        let both = Self {
            desirable: tests("--desirable", desirable)?,
            undesirable: tests("--undesirable", undesirable)?,
        };
        Ok(Some(both))
    }

    /// The label of a rating. A rating that both conditions take is an error.
    pub fn rate(&self, rating: f64) -> Result<Rated, Problem> {
        self.decide(|test| test.takes(rating), || rating.to_string())
    }

    /// The label of a column's value; [`Reason::Middle`] and [`Reason::NoRating`] when it has none.
    pub fn label(&self, column: &str, value: &Value) -> Result<bool, Problem> {
        let rated = match (crate::shapes::number(value), value) {
            (Some(rating), _) => self.rate(rating)?,
            (None, Value::String(word)) if self.has_word() => {
                self.decide(|test| *test == Test::Word(word.clone()), || quoted(word))?
            }
            (None, Value::Null) => {
                return Err(Reason::NoRating.says(format!("field {} is null", quoted(column))));
            }
            (None, Value::String(text))
                if ["", "N/A", "NA", "n/a", "null", "None"].contains(&text.trim()) =>
            {
                return Err(Reason::NoRating.says(format!("field {} is empty", quoted(column))));
            }
            _ => {
                let what = format!("field {} must be a number, found {}", quoted(column), describe(value));
                return Err(Reason::Label.says(what));
            }
        };
        match rated {
            Rated::Label(label) => Ok(label),
            Rated::Middle => Err(Reason::Middle.says(format!(
                "field {}: {} is in the middle",
                quoted(column),
                describe(value)
            ))),
        }
    }

    fn has_word(&self) -> bool {
        self.desirable.iter().chain(&self.undesirable).any(|t| matches!(t, Test::Word(_)))
    }

    fn decide(&self, takes: impl Fn(&Test) -> bool, shown: impl Fn() -> String) -> Result<Rated, Problem> {
        match (self.desirable.iter().any(&takes), self.undesirable.iter().any(&takes)) {
            (true, true) => {
                Err(Reason::Label
                    .says(format!("--desirable and --undesirable both take the rating {}", shown())))
            }
            (true, false) => Ok(Rated::Label(true)),
            (false, true) => Ok(Rated::Label(false)),
            (false, false) => Ok(Rated::Middle),
        }
    }
}

impl Test {
    fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|x| x.is_finite());
        if let Some((low, high)) = text.split_once("..") {
            let high = high.strip_prefix('=').unwrap_or(high);
            return Some(Test::Between(number(low)?, number(high)?));
        }
        for (sign, test) in [
            (">=", Test::Least as fn(f64) -> Test),
            ("<=", Test::Most),
            (">", Test::Above),
            ("<", Test::Below),
        ] {
            if let Some(rest) = text.strip_prefix(sign) {
                return number(rest).map(test);
            }
        }
        let word = text.strip_prefix("==").or_else(|| text.strip_prefix('='))?.trim();
        match number(word) {
            Some(value) => Some(Test::Is(value)),
            None => (!word.is_empty()).then(|| Test::Word(word.to_owned())),
        }
    }

    fn takes(&self, rating: f64) -> bool {
        match self {
            Test::Least(x) => rating >= *x,
            Test::Above(x) => rating > *x,
            Test::Most(x) => rating <= *x,
            Test::Below(x) => rating < *x,
            Test::Is(x) => rating == *x,
            Test::Between(low, high) => (*low..=*high).contains(&rating),
            Test::Word(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ratings_get_labels_by_their_conditions() {
        let t = Thresholds::new(Some(">=4"), Some("<=2")).unwrap().unwrap();
        let label = |v| t.label("rating", &v).map_err(|p| p.reason);
        assert_eq!(label(json!(5)), Ok(true));
        assert_eq!(label(json!("4.0")), Ok(true));
        assert_eq!(label(json!(2)), Ok(false));
        assert_eq!(label(json!(3)), Err(Reason::Middle));
        assert_eq!(label(json!(null)), Err(Reason::NoRating));
        assert_eq!(label(json!("N/A")), Err(Reason::NoRating));
        assert_eq!(label(json!("good")), Err(Reason::Label));
        let words = Thresholds::new(Some("=good,5..5"), Some("=bad,<1")).unwrap().unwrap();
        assert_eq!(words.label("r", &json!("good")).ok(), Some(true));
        assert_eq!(words.label("r", &json!("bad")).ok(), Some(false));
        assert_eq!(words.label("r", &json!(5)).ok(), Some(true));
        assert_eq!(words.label("r", &json!(0.5)).ok(), Some(false));
        let both = Thresholds::new(Some(">1"), Some("<3")).unwrap().unwrap();
        assert_eq!(both.label("r", &json!(2)).map_err(|p| p.reason), Err(Reason::Label));
        for wrong in ["4", ">=x", "", "~3", ">=4,"] {
            assert!(Thresholds::new(Some(wrong), None).is_err(), "{wrong}");
        }
    }
}
