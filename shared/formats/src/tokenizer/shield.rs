//! Control tokens in user text stay text.
//!
//! A message that contains `<|im_end|>` must not end the message. But the template writes the very same characters and
//! means them. So text is handled in three steps. [`Shield::cover`], before the template runs, replaces each control
//! token in what a user wrote by a code of private characters. After rendering, whatever control tokens are in the
//! text are the template's own. [`Shield::encode`] then swaps roles: the template's tokens become codes, and the covered
//! ones become the user's characters again, and encodes with a copy of the tokenizer that knows the codes as
//! tokens and does not know the control tokens. The pieces between are exactly those of an ordinary encoding, so
//! normalizers, pre-tokenizers and blanks beside control tokens behave as always.
//!
//! Text without control tokens, almost all of it, is never covered and takes the ordinary way. Only tokens marked
//! special are covered: `<think>` or `<tool_call>`, where they are ordinary added tokens, are words that a completion
//! may use.

use super::encode;
use kto_cli::{Error, Result, escape};
use std::collections::HashMap;
use tokenizers::{AddedToken, Tokenizer};

/// Around the number of a user's control token.
const USER: char = '\u{10fffc}';
/// Around the number of a control token that is meant.
const MEANT: char = '\u{10fffd}';

/// Tells a user's control tokens from the template's.
pub struct Shield {
    /// The control tokens; their place in the list is the number in the codes.
    tokens: Vec<Control>,
    /// Numbers of the tokens by first byte, the longest first.
    by_first: HashMap<u8, Vec<usize>>,
    plain: Plain,
}

struct Control {
    text: String,
    id: u32,
}

/// A copy of the tokenizer for which codes are tokens and control tokens are text.
struct Plain {
    tokenizer: Tokenizer,
    /// From the id of a code to the id of its control token.
    meant: HashMap<u32, u32>,
}

impl Shield {
    /// Copies `tokenizer`.
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        let mut special: Vec<(u32, AddedToken)> = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .collect();
        special.sort_by_key(|(id, _)| *id);
        let mut by_first: HashMap<u8, Vec<usize>> = HashMap::new();
        for (number, (_, token)) in special.iter().enumerate() {
            by_first.entry(token.content.as_bytes()[0]).or_default().push(number);
        }
        for numbers in by_first.values_mut() {
            numbers.sort_by_key(|n| std::cmp::Reverse(special[*n].1.content.len()));
        }
        let plain = Plain::new(tokenizer, &special);
        let tokens = special.into_iter().map(|(id, token)| Control { text: token.content, id }).collect();
        Self { tokens, by_first, plain }
    }

    /// Returns `text` with every control token in it covered, or None when there is none (and the text may go the
    /// ordinary way). Errors (65): text that already holds the private characters of the codes beside control tokens.
    pub fn cover(&self, text: &str) -> Result<Option<String>> {
        if self.find(text, 0).is_none() {
            return Ok(None);
        }
        if text.contains([USER, MEANT]) {
            return Err(Error::data(
                "control tokens beside the characters U+10FFFC or U+10FFFD, which are reserved",
            ));
        }
        Ok(Some(self.replace(text, USER)))
    }

    /// Covers every text in a JSON value; keys are left alone. Returns whether there was anything to cover.
    pub fn cover_json(&self, value: &mut serde_json::Value) -> Result<bool> {
        use serde_json::Value;
        let mut covered = false;
        match value {
            Value::String(text) => {
                if let Some(safe) = self.cover(text)? {
                    *text = safe;
                    covered = true;
                }
            }
            Value::Array(items) => {
                for item in items {
                    covered |= self.cover_json(item)?;
                }
            }
            Value::Object(map) => {
                for item in map.values_mut() {
                    covered |= self.cover_json(item)?;
                }
            }
            _ => {}
        }
        Ok(covered)
    }

    /// Returns the ids of a text in which user's control tokens are covered and all others are meant.
    /// Errors (65): a code was taken apart on the way; or the model's own vocabulary spells a covered token as the
    /// control token.
    pub fn encode(&self, covered: &str, add_special: bool) -> Result<Vec<u32>> {
        if covered.contains(MEANT) || self.plain.meant.len() != self.tokens.len() {
            return Err(Error::data("control tokens beside the character U+10FFFD, which is reserved"));
        }
        let text = self.uncover(&self.replace(covered, MEANT))?;
        let encoding = encode(&self.plain.tokenizer, &text, add_special)?;
        let mut ids = encoding.get_ids().to_vec();
        for (id, added) in ids.iter_mut().zip(encoding.get_special_tokens_mask()) {
            match self.plain.meant.get(id) {
                Some(control) => *id = *control,
                None if *added == 1 => {}
                None => self.check_plain(*id)?,
            }
        }
        Ok(ids)
    }

    fn check_plain(&self, id: u32) -> Result<()> {
        match self.tokens.iter().find(|token| token.id == id) {
            None => Ok(()),
            Some(token) => {
                let text = escape(&token.text);
                let what =
                    format!("the tokenizer cannot keep \"{text}\" as text, it is one token either way");
                Err(Error::data(what).with_hint("--allow-special takes it as the control token"))
            }
        }
    }

    /// Position and number of the first control token at or behind `from`: the leftmost, and of those the longest.
    fn find(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        let bytes = text.as_bytes();
        (from..bytes.len()).find_map(|at| {
            let candidates = self.by_first.get(&bytes[at])?;
            let hit =
                candidates.iter().find(|n| bytes[at..].starts_with(self.tokens[**n].text.as_bytes()))?;
            Some((at, *hit))
        })
    }

    fn replace(&self, text: &str, mark: char) -> String {
        let mut out = String::with_capacity(text.len() + 16);
        let mut from = 0;
        while let Some((at, number)) = self.find(text, from) {
            out.push_str(&text[from..at]);
            out.push_str(&code(mark, number));
            from = at + self.tokens[number].text.len();
        }
        out.push_str(&text[from..]);
        out
    }

    fn uncover(&self, text: &str) -> Result<String> {
        let broken = || Error::data("the chat template took a control token in the row's text apart");
        let mut out = String::with_capacity(text.len());
        let mut parts = text.split(USER);
        out.push_str(parts.next().unwrap_or_default());
        while let Some(number) = parts.next() {
            let number: usize = number.parse().map_err(|_| broken())?;
            out.push_str(&self.tokens.get(number).ok_or_else(broken)?.text);
            out.push_str(parts.next().ok_or_else(broken)?);
        }
        Ok(out)
    }
}

fn code(mark: char, number: usize) -> String {
    format!("{mark}{number}{mark}")
}

impl Plain {
    fn new(original: &Tokenizer, special: &[(u32, AddedToken)]) -> Self {
        let mut tokenizer = original.clone();
        tokenizer.set_encode_special_tokens(true);
        let codes: Vec<AddedToken> = special
            .iter()
            .enumerate()
            .map(|(number, (_, token))| {
                AddedToken::from(code(MEANT, number), false)
                    .lstrip(token.lstrip)
                    .rstrip(token.rstrip)
                    .single_word(token.single_word)
                    .normalized(false)
            })
            .collect();
        // Codes that could not be added are missing in `meant`, and every covered row is refused.
        let _ = tokenizer.add_tokens(codes);
        let meant = special.iter().enumerate().filter_map(|(number, (id, _))| {
            tokenizer.token_to_id(&code(MEANT, number)).map(|code| (code, *id))
        });
        let meant = meant.collect();
        Self { tokenizer, meant }
    }
}
