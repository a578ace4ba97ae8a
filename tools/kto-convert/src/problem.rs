//! Why a row is not written: a reason that can be counted, and the words for it.

use kto_cli::Error;

/// What is wrong with a row, as the summary counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It cannot be read: bad JSON, ragged table row, over the cap, not an object.
    Unreadable,
    /// No known set of fields.
    UnknownShape,
    /// A field of its shape is not there.
    MissingField,
    /// A label that is not true or false.
    Label,
    /// A prompt or completion that is not text or a good message list.
    Content,
    /// Images, video or sound.
    Multimodal,
    /// Nothing that could be the prompt.
    NoPrompt,
    /// The dialogue does not end with an assistant turn.
    LastTurn,
    /// The two sides of a pair have different prompts.
    PromptsDiffer,
    /// A completion of blanks.
    EmptyCompletion,
    /// Equal sides.
    Tie,
}

impl Reason {
    /// The words of the summary.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Unreadable => "unreadable",
            Reason::UnknownShape => "unknown shape",
            Reason::MissingField => "missing field",
            Reason::Label => "bad label",
            Reason::Content => "bad content",
            Reason::Multimodal => "multimodal",
            Reason::NoPrompt => "no prompt",
            Reason::LastTurn => "last turn not the assistant's",
            Reason::PromptsDiffer => "prompts differ",
            Reason::EmptyCompletion => "empty completion",
            Reason::Tie => "tie",
        }
    }

    /// A problem with these words.
    pub fn says(self, what: impl Into<String>) -> Problem {
        self.error(Error::data(what))
    }

    /// A problem with this error.
    pub fn error(self, error: Error) -> Problem {
        Problem { reason: self, error }
    }

    /// For `map_err`.
    pub fn because(self) -> impl Fn(Error) -> Problem {
        move |error| self.error(error)
    }
}

/// A row that cannot be used.
#[derive(Debug)]
pub struct Problem {
    /// What it is counted as.
    pub reason: Reason,
    /// What is printed; the place comes in front of it.
    pub error: Error,
}
