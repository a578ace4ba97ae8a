//! Rows that are copied, not rebuilt: the usual shapes in JSON, when nothing but prompt, completion and label is asked for.
//!
//! Called by [`crate::work`] before a row is parsed. A row is taken only when all of it is certain: its shape by the same table as every
//! other row, its texts as places in the line ([`kto_formats::spans`]). Everything else, and all that is bad, empty, a tie or odd in any
//! way, is left to the general way, so this one has no words and no policies. Invariant (tested): the bytes, counts and hashes are those
//! of the general way.

mod dialogue;
mod layout;
#[cfg(test)]
mod tests;

use crate::{
    args::{Dedup, Form, Pii},
    plan::Plan,
};
use dialogue::Cut;
use kto_formats::spans::{self, Field, Fields};
use layout::{Kind, Layout};
use std::ops::Range;

/// Takes rows of one chunk after the other.
#[derive(Default)]
pub struct Direct {
    fields: Fields,
    /// The layout of the last row, which is often the next one's.
    layout: Layout,
    markers: Vec<dialogue::Marker>,
}

/// What a row became: records at the end of the output.
pub struct Taken {
    /// The shape's name in the summary.
    pub shape: &'static str,
    /// One record, or a chosen and a rejected one.
    pub records: [Option<Written>; 2],
}

/// A record that was written.
#[derive(Clone, Copy)]
pub struct Written {
    /// Where it begins.
    pub start: usize,
    /// The end of what holds prompt and completion.
    pub said: usize,
    /// The end of its line.
    pub end: usize,
    pub label: bool,
}

/// True when the plan asks for nothing that needs a row taken apart.
pub fn is_enough(plan: &Plan) -> bool {
    let rows = &plan.rows;
    plan.to == Form::Kto
        && !(plan.chat || plan.trim || plan.provenance || plan.explain || plan.needs_all())
        && plan.map.is_empty()
        && plan.labels.are_plain()
        && plan.filters.are_none()
        && plan.shapes.split_after.is_none()
        && (rows.pii == Pii::Off && rows.dedup == Dedup::None)
}

/// A side of a record: text between quotes, or turns.
#[derive(Clone)]
enum Part<'a> {
    Text(&'a [u8]),
    Turns(Vec<(&'a [u8], &'a [u8])>),
}

impl Direct {
    /// Writes the records of the row that `text` is; `None`, and nothing written, when the general way is to decide.
    pub fn take(&mut self, text: &[u8], plan: &Plan, out: &mut Vec<u8>) -> Option<Taken> {
        let Self { fields, layout, markers } = self;
        if !fields.read(text) {
            return None;
        }
        layout.follow(fields, text, plan);
        let row = Row { fields, text };
        let (shape, label, prompt, sides) = match layout.kind? {
            Kind::Dialogues { chosen, rejected } => {
                let (chosen, rejected) = (row.string(chosen)?, row.string(rejected)?);
                let cut = dialogue::cut(chosen, rejected, markers)?;
                let (prompt, sides) = match plan.shapes.dialogue_as_text {
                    true => texts(chosen, rejected, &cut),
                    false => turns(chosen, rejected, &cut, markers)?,
                };
                ("implicit text (HH-RLHF)", None, prompt, sides)
            }
            Kind::Lists { chosen, rejected } => {
                let (prompt, sides) = row.lists(chosen, rejected)?;
                ("implicit conversational", None, prompt, sides)
            }
            Kind::Pair { prompt, chosen, rejected } => {
                let asked = row.part(prompt)?;
                let sides = [row.reply(&asked, chosen)?, row.reply(&asked, rejected)?];
                (name(&asked, "paired text", "paired conversational"), None, asked, sides.map(Some))
            }
            Kind::Record { prompt, completion, label } => {
                let asked = row.part(prompt)?;
                let said = row.reply(&asked, completion)?;
                let Field::Bool(label) = *fields.field(label) else { return None };
                let shape = name(&asked, "unpaired text", "unpaired conversational");
                (shape, Some(label), asked, [Some(said), None])
            }
        };
        let good = match &sides {
            [Some(a), Some(b)] => !a.is_blank() && !b.is_blank() && !a.is_same(b),
            sides => sides.iter().flatten().all(|side| !side.is_blank()),
        };
        let extras = if plan.rows.drop_extra { &[][..] } else { &layout.extras };
        good.then(|| Taken { shape, records: row.write(&prompt, &sides, label, extras, out) })
    }
}

fn name(prompt: &Part<'_>, text: &'static str, chat: &'static str) -> &'static str {
    if matches!(prompt, Part::Text(_)) { text } else { chat }
}

type Sides<'a> = [Option<Part<'a>>; 2];

/// A pair of dialogues as text.
fn texts<'a>(chosen: &'a [u8], rejected: &'a [u8], cut: &Cut) -> (Part<'a>, Sides<'a>) {
    (
        Part::Text(&chosen[..cut.at]),
        [&chosen[cut.at..], &rejected[cut.at..]].map(|said| Some(Part::Text(said))),
    )
}

/// A pair of dialogues as messages; `None` when a role speaks twice in a row.
fn turns<'a>(
    chosen: &'a [u8],
    rejected: &'a [u8],
    cut: &Cut,
    markers: &[dialogue::Marker],
) -> Option<(Part<'a>, Sides<'a>)> {
    let said = |text: &'a [u8]| text.strip_prefix(b" ").unwrap_or(text);
    let mut turns = Vec::with_capacity(cut.turns);
    for pair in markers[..=cut.turns].windows(2) {
        if pair[0].assistant == pair[1].assistant {
            return None;
        }
        turns.push((pair[0].role(), said(&chosen[pair[0].end..pair[1].start])));
    }
    let reply = |text: &'a [u8]| Some(Part::Turns(vec![(&b"assistant"[..], said(&text[cut.at..]))]));
    Some((Part::Turns(turns), [reply(chosen), reply(rejected)]))
}

/// A row and its text.
struct Row<'a> {
    fields: &'a Fields,
    text: &'a [u8],
}

impl<'a> Row<'a> {
    fn string(&self, field: usize) -> Option<&'a [u8]> {
        match self.fields.field(field) {
            Field::Text(place) => Some(self.fields.at(self.text, place)),
            _ => None,
        }
    }

    /// A text, or messages whose roles are known.
    fn part(&self, field: usize) -> Option<Part<'a>> {
        match self.fields.field(field) {
            Field::Text(place) if place.is_empty() => None,
            Field::Text(place) => Some(Part::Text(self.fields.at(self.text, place))),
            Field::Turns(turns) => self.turns(turns.clone()).map(Part::Turns),
            _ => None,
        }
    }

    fn turns(&self, turns: Range<usize>) -> Option<Vec<(&'a [u8], &'a [u8])>> {
        let turns: Vec<_> = turns.map(|i| self.fields.turn(self.text, i)).collect();
        turns.iter().all(|(role, _)| spans::is_role(role)).then_some(turns)
    }

    /// A completion of the prompt's kind that does not say the prompt again.
    fn reply(&self, prompt: &Part<'a>, field: usize) -> Option<Part<'a>> {
        let said = self.part(field)?;
        match (prompt, &said) {
            (Part::Text(_), Part::Text(_)) => Some(said),
            (Part::Turns(asked), Part::Turns(turns)) => {
                (is_reply(turns) && !turns.starts_with(asked)).then_some(said)
            }
            _ => None,
        }
    }

    /// A pair of dialogues that begin alike, split before the last turn of the shorter one at the latest.
    fn lists(&self, chosen: usize, rejected: usize) -> Option<(Part<'a>, Sides<'a>)> {
        let (Field::Turns(chosen), Field::Turns(rejected)) =
            (self.fields.field(chosen), self.fields.field(rejected))
        else {
            return None;
        };
        let (mut chosen, mut rejected) = (self.turns(chosen.clone())?, self.turns(rejected.clone())?);
        let shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
        let cut = shared.min(chosen.len().min(rejected.len()) - 1);
        let (said, other) = (chosen.split_off(cut), rejected.split_off(cut));
        let good = cut > 0 && is_reply(&said) && is_reply(&other);
        good.then(|| (Part::Turns(chosen), [said, other].map(|turns| Some(Part::Turns(turns)))))
    }

    /// Appends the records: the second one begins and ends as the first one does.
    fn write(
        &self,
        prompt: &Part<'_>,
        sides: &Sides<'_>,
        label: Option<bool>,
        extras: &[usize],
        out: &mut Vec<u8>,
    ) -> [Option<Written>; 2] {
        let mut records = [None; 2];
        let (mut asked, mut rest) = (0..0, 0..0);
        for (i, said) in sides.iter().enumerate() {
            let Some(said) = said else { continue };
            let start = out.len();
            match i {
                0 => {
                    out.extend_from_slice(b"{\"prompt\": ");
                    prompt.write(out);
                    out.extend_from_slice(b", \"completion\": ");
                    asked = start..out.len();
                }
                _ => out.extend_from_within(asked.clone()),
            }
            said.write(out);
            let (end_of_said, label) = (out.len(), label.unwrap_or(i == 0));
            out.extend_from_slice(if label { b", \"label\": true" } else { b", \"label\": false" });
            match i {
                0 => {
                    let from = out.len();
                    self.write_extras(extras, out);
                    rest = from..out.len();
                }
                _ => out.extend_from_within(rest.clone()),
            }
            records[i] = Some(Written { start, said: end_of_said, end: out.len(), label });
        }
        records
    }

    fn write_extras(&self, extras: &[usize], out: &mut Vec<u8>) {
        for (number, (name, field)) in self.fields.iter(self.text).enumerate() {
            if extras.contains(&number) {
                out.extend_from_slice(b", \"");
                out.extend_from_slice(name);
                out.extend_from_slice(b"\": ");
                self.fields.write(self.text, field, out);
            }
        }
        out.extend_from_slice(b"}\n");
    }
}

/// True for turns of the model, its tools among them, that end with what it says.
fn is_reply(turns: &[(&[u8], &[u8])]) -> bool {
    let of_model =
        |role: &[u8]| matches!(role, b"assistant" | b"tool" | b"function" | b"ipython" | b"environment");
    turns.iter().all(|(role, _)| of_model(role))
        && turns.last().is_some_and(|(role, _)| *role == b"assistant")
}

impl Part<'_> {
    fn is_blank(&self) -> bool {
        match self {
            Self::Text(text) => spans::is_blank(text),
            Self::Turns(turns) => turns.iter().all(|(_, content)| spans::is_blank(content)),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => a == b,
            (Self::Turns(a), Self::Turns(b)) => a == b,
            _ => false,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Text(text) => {
                out.push(b'"');
                out.extend_from_slice(text);
                out.push(b'"');
            }
            Self::Turns(turns) => spans::write_turns(turns.iter().copied(), out),
        }
    }
}
