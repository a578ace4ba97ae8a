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
    /// Equal sides, or a vote or scores that prefer neither.
    Tie,
    /// A comparison in which both answers were called bad.
    BothBad,
    /// A rating that neither --desirable nor --undesirable takes.
    Middle,
    /// A completion that nobody rated.
    NoRating,
    /// A preference that is not strong enough.
    Margin,
    /// A conversation that was not kept with its rating.
    NoConversation,
    /// A deleted message, or one without a rank.
    NoRank,
    /// Shorter than a filter allows.
    TooShort,
    /// Longer than a filter allows.
    TooLong,
    /// Text that a filter looks for, or looks for in vain.
    Pattern,
    /// A role that a filter leaves out.
    Role,
    /// Personal data that was found.
    Pii,
    /// Seen before.
    Duplicate,
    /// Nearly the same as a completion seen before.
    NearDuplicate,
    /// Called good and bad.
    Conflict,
    /// Left out so that both labels are equally frequent.
    Balance,
    /// An output form that has no place for it.
    Form,
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
            Reason::BothBad => "both answers bad",
            Reason::Middle => "rating in the middle",
            Reason::NoRating => "no rating",
            Reason::Margin => "margin too small",
            Reason::NoConversation => "no conversation",
            Reason::NoRank => "no rank",
            Reason::TooShort => "too short",
            Reason::TooLong => "too long",
            Reason::Pattern => "pattern",
            Reason::Role => "role",
            Reason::Pii => "personal data",
            Reason::Duplicate => "duplicate",
            Reason::NearDuplicate => "near duplicate",
            Reason::Conflict => "conflict",
            Reason::Balance => "balance",
            Reason::Form => "not for this form",
        }
    }

    /// True when the row is as it should be and only has nothing to say: it is counted, and ends no run.
    pub fn is_no_fault(self) -> bool {
        use Reason as R;
        matches!(
            self,
            R::Tie | R::BothBad | R::Middle | R::NoRating | R::Margin | R::NoConversation | R::NoRank
        )
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
