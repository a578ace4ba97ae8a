//! `--fail-if`: a comparison of one number of the summary, checked for sense before any work.

use super::summary::KEYS;
use kto_cli::{Error, Result, escape};
use serde_json::{Map, Value};

/// `KEY OP NUMBER`.
#[derive(Clone, Debug, PartialEq)]
pub struct Assertion {
    key: &'static str,
    op: Op,
    bound: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    Equal,
    NotEqual,
}

/// Two characters before their first one alone.
const OPS: [(&str, Op); 6] = [
    ("<=", Op::LessEqual),
    (">=", Op::GreaterEqual),
    ("==", Op::Equal),
    ("!=", Op::NotEqual),
    ("<", Op::Less),
    (">", Op::Greater),
];

impl Assertion {
    /// Reads a comparison. Errors (2): no operator, an unknown key, no number.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |what: String| Error::usage(format!("--fail-if \"{}\": {what}", escape(text)));
        let at = text.find(['<', '>', '=', '!']);
        let found = at.and_then(|at| {
            let (op, kind) = OPS.iter().find(|(op, _)| text[at..].starts_with(op))?;
            Some((text[..at].trim(), *kind, text[at + op.len()..].trim()))
        });
        let Some((key, op, number)) = found else {
            return Err(bad("not a comparison".into()).with_hint("--fail-if 'rewards/accuracies<0.9'"));
        };
        let key = match key {
            "accuracy" => "rewards/accuracies",
            "margins" => "rewards/margins",
            key => key,
        };
        let Some(key) = KEYS.iter().find(|k| **k == key) else {
            return Err(bad(format!("unknown key \"{}\"", escape(key)))
                .with_hint(format!("known keys: {}", KEYS.join(", "))));
        };
        match number.parse::<f64>() {
            Ok(bound) if bound.is_finite() => Ok(Self { key, op, bound }),
            _ => Err(bad(format!("\"{}\" is not a number", escape(number)))),
        }
    }

    /// Returns the key that is compared.
    pub fn key(&self) -> &'static str {
        self.key
    }

    /// Returns what was found when the summary is as it should not be. A number that is absent or not finite is
    /// a failure: nobody can say that it is good.
    pub fn failure(&self, summary: &Map<String, Value>) -> Option<String> {
        let Some(value) = summary.get(self.key).and_then(Value::as_f64) else {
            return Some(format!("{} is not known", self.key));
        };
        let met = match self.op {
            Op::Less => value < self.bound,
            Op::LessEqual => value <= self.bound,
            Op::Greater => value > self.bound,
            Op::GreaterEqual => value >= self.bound,
            Op::Equal => value == self.bound,
            Op::NotEqual => value != self.bound,
        };
        met.then(|| format!("{} is {value}", self.key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn comparisons_are_read() {
        let read = |text: &str| Assertion::parse(text).unwrap();
        assert_eq!(read("loss >= 0.5"), Assertion { key: "loss", op: Op::GreaterEqual, bound: 0.5 });
        assert_eq!(read("accuracy<0.9"), read("rewards/accuracies < 0.9"));
        for (text, what) in [
            ("loss", "not a comparison"),
            ("loss=1", "not a comparison"),
            ("lost<1", "unknown key \"lost\""),
            ("loss<x", "\"x\" is not a number"),
            ("loss<nan", "\"nan\" is not a number"),
        ] {
            let error = Assertion::parse(text).unwrap_err();
            assert_eq!(error.to_string(), format!("--fail-if \"{text}\": {what}"));
        }
    }

    #[test]
    fn a_number_that_is_not_there_fails() {
        let summary = json!({"loss": 0.5, "kl": null});
        let failure = |text: &str| Assertion::parse(text).unwrap().failure(summary.as_object().unwrap());
        assert_eq!(failure("loss<0.5"), None);
        assert_eq!(failure("loss<=0.5"), Some("loss is 0.5".into()));
        assert_eq!(failure("kl<9"), Some("kl is not known".into()));
        assert_eq!(failure("pairs<1"), Some("pairs is not known".into()));
    }
}
