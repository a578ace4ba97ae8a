//! The type of a JSON value as a column.

use serde_json::Value;

/// A type.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Nothing but nulls so far.
    Null,
    Bool,
    Int,
    Float,
    Text,
    List(Box<Kind>),
    /// Names and types in the order in which they came.
    Struct(Vec<(String, Kind)>),
    /// Values of several types: their JSON text.
    Json,
}

impl Kind {
    /// The type of one value.
    pub fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Bool,
            Value::Number(n) if n.is_i64() => Self::Int,
            Value::Number(_) => Self::Float,
            Value::String(_) => Self::Text,
            Value::Array(items) => {
                Self::List(Box::new(items.iter().map(Self::of).fold(Self::Null, Self::merged)))
            }
            // Parquet has no struct without fields.
            Value::Object(fields) if fields.is_empty() => Self::Json,
            Value::Object(fields) => {
                Self::Struct(fields.iter().map(|(k, v)| (k.clone(), Self::of(v))).collect())
            }
        }
    }

    /// The narrowest type of both.
    pub fn merged(self, other: Self) -> Self {
        match (self, other) {
            (Self::Null, kind) | (kind, Self::Null) => kind,
            (Self::Int, Self::Float) | (Self::Float, Self::Int) => Self::Float,
            (Self::List(a), Self::List(b)) => Self::List(Box::new(a.merged(*b))),
            (Self::Struct(mut a), Self::Struct(b)) => {
                for (name, kind) in b {
                    match a.iter_mut().find(|(known, _)| *known == name) {
                        Some((_, known)) => *known = std::mem::replace(known, Self::Null).merged(kind),
                        None => a.push((name, kind)),
                    }
                }
                Self::Struct(a)
            }
            (a, b) if a == b => a,
            _ => Self::Json,
        }
    }

    /// Whether a value of type `other` can be in a column of this one.
    pub fn takes(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Null) | (Self::Json, _) | (Self::Float, Self::Int) => true,
            (Self::List(a), Self::List(b)) => a.takes(b),
            (Self::Struct(a), Self::Struct(b)) => b.iter().all(|(name, kind)| {
                a.iter().find(|(known, _)| known == name).is_some_and(|(_, known)| known.takes(kind))
            }),
            (a, b) => a == b,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_widen() {
        let kind = |v| Kind::of(&v);
        assert_eq!(kind(json!(1)).merged(kind(json!(1.5))), Kind::Float);
        assert_eq!(kind(json!(null)).merged(kind(json!("a"))), Kind::Text);
        assert_eq!(kind(json!(1)).merged(kind(json!("a"))), Kind::Json);
        let list = kind(json!([{"a": 1}, {"b": "x"}, {"a": null}]));
        let fields = vec![("a".to_owned(), Kind::Int), ("b".to_owned(), Kind::Text)];
        assert_eq!(list, Kind::List(Box::new(Kind::Struct(fields))));
        assert!(list.takes(&kind(json!([{"b": null}]))) && list.takes(&kind(json!([]))));
        assert!(!list.takes(&kind(json!([{"c": 1}]))) && !list.takes(&kind(json!("a"))));
    }
}
