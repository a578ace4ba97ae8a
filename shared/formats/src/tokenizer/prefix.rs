//! Conversations that begin alike: what they share is encoded once.
//!
//! A tokenizer cuts a text at its added tokens first and then treats each piece alone. So behind a control token it begins anew, and the ids
//! of a text are those of its two parts. That holds for the components named here and for tokens that nothing else can overlap
//! ([`Dividers::new`]); all other texts are encoded whole. Called by kto-tokenize.

use super::TextTokenizer;
use kto_cli::Result;
use serde_json::Value;
use std::collections::HashSet;
use tokenizers::{AddedToken, Tokenizer};

/// Normalizers that see a piece and nothing else.
const NORMALIZERS: [&str; 9] =
    ["Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Replace", "Prepend"];
/// Pre-tokenizers that do. `Metaspace` asks whether a piece is the text's first one.
const PRE_TOKENIZERS: [&str; 7] =
    ["Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"];

/// The control tokens behind which a text can be cut.
#[derive(Default)]
pub(super) struct Dividers {
    tokens: HashSet<String>,
    /// Their lengths in bytes, each once.
    lengths: Vec<usize>,
    /// Their last bytes.
    ends: HashSet<u8>,
}

/// The beginning of a conversation, up to and with a control token, and its ids.
#[derive(Default)]
pub struct Prefix {
    text: String,
    ids: Vec<u32>,
}

impl Dividers {
    /// Finds the tokens; none when the tokenizer has a component that could look across them.
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        let normalizer = tokenizer.get_normalizer().map(serde_json::to_value);
        let pre_tokenizer = tokenizer.get_pre_tokenizer().map(serde_json::to_value);
        let fits = |part: Option<serde_json::Result<Value>>, known: &[&str]| {
            part.is_none_or(|part| part.is_ok_and(|part| all_known(&part, known)))
        };
        if !fits(normalizer, &NORMALIZERS) || !fits(pre_tokenizer, &PRE_TOKENIZERS) {
            return Self::default();
        }
        let decoder = tokenizer.get_added_tokens_decoder();
        let added: Vec<&AddedToken> = decoder.values().collect();
        let tokens: HashSet<String> =
            added.iter().filter(|token| divides(token, &added)).map(|token| token.content.clone()).collect();
        let mut lengths: Vec<usize> = tokens.iter().map(String::len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let ends = tokens.iter().filter_map(|token| token.bytes().last()).collect();
        Self { tokens, lengths, ends }
    }

    /// The end of the last of them in a text.
    fn last_end(&self, text: &str) -> Option<usize> {
        let bytes = text.as_bytes();
        (1..=bytes.len()).rev().filter(|end| self.ends.contains(&bytes[end - 1])).find(|end| {
            self.lengths.iter().any(|length| {
                let token = end.checked_sub(*length).and_then(|start| text.get(start..*end));
                token.is_some_and(|token| self.tokens.contains(token))
            })
        })
    }
}

/// True when the text on both sides of a token is read as if the other side were not there.
fn divides(token: &AddedToken, all: &[&AddedToken]) -> bool {
    let text = token.content.as_str();
    let word = |c: Option<char>| c.is_none_or(|c| c.is_alphanumeric() || c == '_' || c.is_whitespace());
    if !token.special || token.normalized || token.lstrip || token.rstrip || token.single_word {
        return false;
    }
    // Tokens that are whole words look at the character beside them.
    if word(text.chars().next()) || word(text.chars().next_back()) {
        return false;
    }
    let overlaps = |other: &str| {
        other.contains(text)
            || text
                .char_indices()
                .skip(1)
                .any(|(at, _)| other.ends_with(&text[..at]) || other.starts_with(&text[at..]))
    };
    !all.iter().any(|other| other.content != text && overlaps(&other.content))
        && !text.char_indices().skip(1).any(|(at, _)| text.ends_with(&text[..at]))
}

/// True when all components of a list are among `known`.
fn all_known(part: &Value, known: &[&str]) -> bool {
    let inner =
        ["normalizers", "pretokenizers"].iter().filter_map(|key| part.get(*key)?.as_array()).flatten();
    part.get("type").and_then(Value::as_str).is_some_and(|name| known.contains(&name))
        && inner.into_iter().all(|part| all_known(part, known))
}

#[cfg(test)]
impl Prefix {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }
}

impl TextTokenizer {
    /// Returns what [`TextTokenizer::encode`] does without special tokens, and keeps in `known` what later texts may begin with. For a
    /// prompt.
    pub fn encode_prompt(&self, text: &str, known: &mut Prefix) -> Result<Vec<u32>> {
        let Some(end) = self.dividers().last_end(text) else { return self.encode(text, false) };
        if known.text != text[..end] {
            let ids = self.encode_behind(&text[..end], known)?;
            *known = Prefix { text: text[..end].to_owned(), ids };
        }
        self.encode_behind(text, known)
    }

    /// Returns the same ids for a text that may begin with what is known.
    pub fn encode_behind(&self, text: &str, known: &Prefix) -> Result<Vec<u32>> {
        match text.strip_prefix(known.text.as_str()) {
            Some(rest) if !known.text.is_empty() => {
                let mut ids = known.ids.clone();
                ids.extend(self.encode(rest, false)?);
                Ok(ids)
            }
            _ => self.encode(text, false),
        }
    }

    fn dividers(&self) -> &Dividers {
        self.dividers.get_or_init(|| Dividers::new(&self.tokenizer))
    }
}
