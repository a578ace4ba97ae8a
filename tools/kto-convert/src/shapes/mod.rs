//! The shapes of preference rows and the one table that decides between them.
//!
//! Called for every row: the shape of one row says nothing about the next. A new shape is a file beside this one and a
//! line in `table::SHAPES`; the first line whose fields are all there wins, or the one that `--from` names.

mod advice;
mod arena;
mod ask;
mod content;
mod dialogue;
mod implicit;
mod join;
mod logs;
mod messages;
mod oasst;
mod openwebui;
mod paired;
mod rated;
mod split_chat;
mod split_text;
mod table;
mod tools;
mod unpaired;
mod votes;

pub use content::parse_cells;
pub use table::{Shape, find, named, names};
pub use votes::{SCORES, number};

use crate::{
    labels::Labels,
    problem::{Problem, Reason},
};
use kto_formats::{chat, record::Content};
use serde_json::{Map, Value};

/// A row's fields while they are taken apart; what is left over is carried along.
pub type Fields = Map<String, Value>;

/// What a shape may ask.
pub struct Rules<'a> {
    /// How the label is found and read.
    pub labels: &'a Labels,
    /// Cells are text, so words stand for bools and JSON text for lists.
    pub table: bool,
    /// Sides of a pair with different prompts keep each their own.
    pub keep_differing: bool,
    /// `--split-after`: ends the prompt of a text pair.
    pub split_after: Option<&'a str>,
    /// HH-RLHF dialogues stay text.
    pub dialogue_as_text: bool,
    /// A vote that calls both answers bad gives two undesirable completions.
    pub both_bad: bool,
    /// The least difference of two scores.
    pub min_margin: Option<f64>,
    /// The least ratio of two scores.
    pub min_ratio: Option<f64>,
    /// The score to use of a log that has several.
    pub score: Option<&'a str>,
}

/// One completion of a row.
#[derive(Debug, PartialEq)]
pub struct Side {
    /// What the model is given.
    pub prompt: Content,
    /// What it said.
    pub completion: Content,
    /// Whether that is desirable.
    pub label: bool,
}

/// A row in KTO's terms.
#[derive(Debug)]
pub struct Unit {
    /// The shape's name in the summary.
    pub shape: &'static str,
    /// One side, or pairs of chosen and rejected, or rated completions.
    pub sides: Vec<Side>,
    /// The sides come from a comparison: TRL would put the rejected ones behind all chosen ones.
    pub paired: bool,
    /// The sides of the pair have different prompts.
    pub differ: bool,
    /// Text beside messages: the text was made a message, or the repeated prompt was taken away.
    pub mixed: bool,
    /// Why completions of the row are not among the sides.
    pub left_out: Vec<Reason>,
}

impl Unit {
    fn of(shape: &'static str, sides: Vec<Side>) -> Self {
        Self { shape, sides, paired: false, differ: false, mixed: false, left_out: Vec::new() }
    }

    fn one(shape: &'static str, side: Side) -> Self {
        Self::of(shape, vec![side])
    }

    fn pair(shape: &'static str, chosen: (Content, Content), rejected: (Content, Content)) -> Self {
        let side = |(prompt, completion), label| Side { prompt, completion, label };
        let sides = vec![side(chosen, true), side(rejected, false)];
        Self { paired: true, ..Self::of(shape, sides) }
    }

    /// A pair of answers to one dialogue.
    fn answers(shape: &'static str, prompt: Vec<Value>, chosen: Vec<Value>, rejected: Vec<Value>) -> Self {
        let prompt = Content::Chat(prompt);
        Self::pair(shape, (prompt.clone(), Content::Chat(chosen)), (prompt, Content::Chat(rejected)))
    }
}

/// True for turns that a completion may consist of.
fn is_reply(message: &Value) -> bool {
    matches!(chat::role(message), "assistant" | "tool" | "function" | "ipython" | "environment")
}

/// Says where in the row a problem of a message list is.
fn within<T>(result: Result<T, Problem>, field: &str) -> Result<T, Problem> {
    use kto_cli::Context;
    result.or_else(|p| {
        Err(p.error)
            .at(format_args!("field {}", kto_formats::json::quoted(field)))
            .map_err(p.reason.because())
    })
}

#[cfg(test)]
mod tests;
