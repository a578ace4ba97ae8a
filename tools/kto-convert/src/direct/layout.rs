//! What the fields of a row are for, found once for rows that look alike.

use super::dialogue::is_dialogue;
use crate::{plan::Plan, rows, shapes};
use kto_formats::{
    record,
    spans::{Field, Fields},
};
use serde_json::Value;

/// Names of fields that the general way treats in a way of its own.
const OTHERS: [&[&str]; 4] =
    [&["tools", "chat_template_kwargs", record::STOPPED], &rows::MEDIA, &rows::OURS, &rows::SHAPE_COLUMNS];

/// The fields of a row and their use.
#[derive(Default)]
pub struct Layout {
    known: bool,
    names: Vec<(Box<[u8]>, Class)>,
    /// What the row is; `None`: not to be taken.
    pub kind: Option<Kind>,
    /// Numbers of the fields that are carried.
    pub extras: Vec<usize>,
}

/// A shape and the numbers of its fields.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Two dialogues in HH-RLHF's form.
    Dialogues { chosen: usize, rejected: usize },
    /// Two message lists that begin alike.
    Lists { chosen: usize, rejected: usize },
    /// A prompt and two completions.
    Pair { prompt: usize, chosen: usize, rejected: usize },
    /// A prompt, a completion, a label.
    Record { prompt: usize, completion: usize, label: usize },
}

/// All that the table of shapes asks of a value.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    Text,
    Dialogue,
    List,
    Object,
    Number,
    Bool,
    Null,
}

impl Layout {
    /// Makes this the layout of a row. It stays as it is when names and kinds of values are those of the row before.
    pub fn follow(&mut self, fields: &Fields, text: &[u8], plan: &Plan) {
        let same = self.known
            && self.names.len() == fields.len()
            && self.names.iter().zip(fields.iter(text)).all(|((name, class), (found, field))| {
                **name == *found && *class == Class::of(fields, text, field)
            });
        if !same {
            self.known = true;
            self.names = fields
                .iter(text)
                .map(|(name, field)| (name.into(), Class::of(fields, text, field)))
                .collect();
            (self.kind, self.extras) = (None, Vec::new());
            if let Some(kind) = self.find(plan) {
                let used = kind.fields();
                self.extras = (0..fields.len()).filter(|field| !used.contains(&Some(*field))).collect();
                let name = |field: &usize| std::str::from_utf8(&self.names[*field].0).unwrap_or_default();
                let plain = |field: &usize| !OTHERS.iter().any(|names| names.contains(&name(field)));
                self.kind = Some(kind).filter(|_| self.extras.iter().all(plain));
            }
        }
    }

    /// Asks the table for the shape of such rows.
    fn find(&self, plan: &Plan) -> Option<Kind> {
        let mut row = shapes::Fields::new();
        for (name, class) in &self.names {
            let name = std::str::from_utf8(name).ok()?;
            if row.insert(name.to_owned(), class.example()).is_some() {
                return None;
            }
        }
        let rules = rows::rules(plan, false);
        let shape = shapes::find(&row, &rules, plan.from).ok()?;
        let class = |field: usize| self.names[field].1;
        let at = |name: &str| self.names.iter().position(|(n, _)| **n == *name.as_bytes());
        let kind = match shape.name {
            "hh-rlhf" | "implicit" => {
                let (chosen, rejected) = (at("chosen")?, at("rejected")?);
                match (class(chosen), class(rejected)) {
                    (Class::Dialogue, Class::Dialogue) => Kind::Dialogues { chosen, rejected },
                    (Class::List, Class::List) => Kind::Lists { chosen, rejected },
                    _ => return None,
                }
            }
            // Scores could make it a tie.
            "paired" if !shapes::SCORES.iter().flatten().any(|name| at(name).is_some()) => {
                Kind::Pair { prompt: at("prompt")?, chosen: at("chosen")?, rejected: at("rejected")? }
            }
            "kto" => {
                let label = at("label").filter(|label| class(*label) == Class::Bool)?;
                Kind::Record { prompt: at("prompt")?, completion: at("completion")?, label }
            }
            _ => return None,
        };
        Some(kind)
    }
}

impl Kind {
    fn fields(self) -> [Option<usize>; 3] {
        match self {
            Self::Dialogues { chosen, rejected } | Self::Lists { chosen, rejected } => {
                [Some(chosen), Some(rejected), None]
            }
            Self::Pair { prompt, chosen, rejected } => [prompt, chosen, rejected].map(Some),
            Self::Record { prompt, completion, label } => [prompt, completion, label].map(Some),
        }
    }
}

impl Class {
    fn of(fields: &Fields, text: &[u8], field: &Field) -> Self {
        match field {
            Field::Text(place) if is_dialogue(fields.at(text, place)) => Self::Dialogue,
            Field::Text(_) => Self::Text,
            Field::Turns(_) | Field::Nested(Value::Array(_)) => Self::List,
            Field::Nested(_) => Self::Object,
            Field::Number(_) => Self::Number,
            Field::Bool(_) => Self::Bool,
            Field::Null => Self::Null,
        }
    }

    /// A value of the class.
    fn example(self) -> Value {
        match self {
            Self::Text => "text".into(),
            Self::Dialogue => "\n\nHuman: text".into(),
            Self::List => Value::Array(Vec::new()),
            Self::Object => Value::Object(shapes::Fields::new()),
            Self::Number => 1.into(),
            Self::Bool => true.into(),
            Self::Null => Value::Null,
        }
    }
}
