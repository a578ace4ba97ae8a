//! Records left out by what is in them: length, roles, patterns.

use crate::{args::Args, problem::Reason};
use kto_cli::{Error, Result, escape};
use kto_formats::{
    chat,
    record::{Content, Record},
};
use regex::Regex;
use serde_json::Value;

/// What a record must be like.
#[derive(Clone, Debug, Default)]
pub struct Filters {
    min_chars: Option<usize>,
    max_chars: Option<usize>,
    max_prompt_chars: Option<usize>,
    drop_role: Vec<String>,
    keep_match: Option<Regex>,
    drop_match: Option<Regex>,
}

impl Filters {
    /// Reads the flags. Errors are usage errors (2).
    pub fn new(args: &Args) -> Result<Self> {
        if let Some(role) = args.drop_role.iter().find(|r| !chat::ROLES.contains(&r.as_str())) {
            let what =
                format!("--drop-role knows no role \"{}\" (known: {})", escape(role), chat::ROLES.join(", "));
            return Err(Error::usage(what));
        }
        Ok(Self {
            min_chars: args.min_chars,
            max_chars: args.max_chars,
            max_prompt_chars: args.max_prompt_chars,
            drop_role: args.drop_role.clone(),
            keep_match: pattern("--keep-match", args.keep_match.as_deref())?,
            drop_match: pattern("--drop-match", args.drop_match.as_deref())?,
        })
    }

    /// True when every record passes.
    pub fn are_none(&self) -> bool {
        let lengths = [self.min_chars, self.max_chars, self.max_prompt_chars];
        let matches = [&self.keep_match, &self.drop_match];
        lengths.iter().all(Option::is_none)
            && matches.iter().all(|m| m.is_none())
            && self.drop_role.is_empty()
    }

    /// Why a record is left out.
    pub fn refuses(&self, record: &Record) -> Option<Reason> {
        let said = |least: usize| self.is_longer(&record.completion, least);
        if self.min_chars.is_some_and(|n| n > 0 && !said(n - 1)) {
            return Some(Reason::TooShort);
        }
        if self.max_chars.is_some_and(said)
            || self.max_prompt_chars.is_some_and(|n| self.is_longer(&record.prompt, n))
        {
            return Some(Reason::TooLong);
        }
        let sides = [&record.prompt, &record.completion];
        let dropped = |turn: &Value| self.drop_role.iter().any(|role| role == chat::role(turn));
        if !self.drop_role.is_empty()
            && sides.iter().any(|side| matches!(side, Content::Chat(turns) if turns.iter().any(dropped)))
        {
            return Some(Reason::Role);
        }
        let matches = |regex: &Regex| sides.iter().any(|side| texts(side).any(|text| regex.is_match(text)));
        if self.keep_match.as_ref().is_some_and(|r| !matches(r))
            || self.drop_match.as_ref().is_some_and(matches)
        {
            return Some(Reason::Pattern);
        }
        None
    }

    /// True when a content has more than `n` characters.
    fn is_longer(&self, content: &Content, n: usize) -> bool {
        texts(content).map(|text| text.chars().count()).sum::<usize>() > n
    }
}

/// The texts of a content.
pub fn texts(content: &Content) -> impl Iterator<Item = &str> {
    let (text, turns) = match content {
        Content::Text(text) => (Some(text.as_str()), &[][..]),
        Content::Chat(turns) => (None, turns.as_slice()),
    };
    text.into_iter().chain(turns.iter().filter_map(|turn| turn.get("content")?.as_str()))
}

fn pattern(flag: &str, text: Option<&str>) -> Result<Option<Regex>> {
    text.map(|text| {
        Regex::new(text).map_err(|e| {
            let reason = e.to_string();
            let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            Error::usage(format!("{flag}: \"{}\" is no regular expression: {reason}", escape(text)))
        })
    })
    .transpose()
}
