//! Tokenizers: tokenizer.json through the `tokenizers` crate, with the corrections transformers makes.
//!
//! Called by kto-tokenize and kto-eval. The crate is known to panic on some damaged files and to loop for a long time
//! on some expressions, so loading and encoding run behind the guard, and callers with many rows keep a watchdog.
//! Padding and truncation stored in the file are dropped. Deliberately absent: sentencepiece and tiktoken files
//! without a tokenizer.json.

mod class;
mod config;
mod prefix;
mod shield;
#[cfg(test)]
mod tests;

pub use config::TokenizerConfig;
pub use prefix::Prefix;
pub use shield::Shield;

use crate::{
    gguf::{self, is_gguf},
    text_part,
};
use kto_cli::{Context, Error, Kind, Result, escape, guard, hash, input};
use serde_json::Value;
use std::{path::Path, sync::OnceLock};
use tokenizers::{
    AddedToken, Encoding, ModelWrapper, PostProcessorWrapper, Tokenizer,
    processors::template::TemplateProcessing,
};

/// Bytes of tokenizer.json, at most.
const CAP: u64 = 256 << 20;
/// Ids are below this: room for every embedding matrix there is, far from the end of u32.
const MOST_IDS: u32 = 1 << 24;

/// A tokenizer of a model directory.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    config: TokenizerConfig,
    fingerprint: String,
    vocab_size: u32,
    /// What of the files is not followed, a line each.
    pub notes: Vec<String>,
    /// Made when the first text needs it.
    shield: OnceLock<Shield>,
    /// The same.
    dividers: OnceLock<prefix::Dividers>,
}

impl TextTokenizer {
    /// Loads tokenizer.json, tokenizer_config.json and special_tokens_map.json; only the first must be there. The
    /// vocabulary size is the one of config.json (the rows of the embedding) when there is one.
    /// Errors: 66 when tokenizer.json is missing, 65 when a file is not what it should be.
    pub fn from_model_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = input::read(&path, CAP).map_err(|e| no_tokenizer(e, dir))?;
        let config = TokenizerConfig::from_model_dir(dir)?;
        let place = escape(&path.display().to_string());
        let model = model_config(dir)?;
        let mut tokenizer = load(&bytes, &config, &model).at(&place)?;
        let dropout = without_dropout(&mut tokenizer);
        let note =
            |p| format!("{place}: dropout {p} of merges is left out: the same text has the same tokens");
        let notes = dropout.map(note).into_iter().collect();
        let ids = check_ids(&tokenizer).at(&place)?;
        let vocab_size = model_vocab_size(&model, dir)?.unwrap_or(ids);
        let fingerprint = hash::sha256_hex(&bytes);
        let (shield, dividers) = (OnceLock::new(), OnceLock::new());
        Ok(Self { tokenizer, config, fingerprint, vocab_size, notes, shield, dividers })
    }

    /// Returns the tokens of a text that the model is made for, as tokenizer_config.json has it. Nothing is cut there.
    pub fn max_length(&self) -> Option<u64> {
        self.config.max_length()
    }

    /// Returns the ids of `text`; control tokens in it become control tokens, as in transformers. `add_special` adds
    /// what the tokenizer puts around a text (BOS, EOS).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        encode(&self.tokenizer, text, add_special).map(|encoding| encoding.get_ids().to_vec())
    }

    /// Returns the text of `ids`, control tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = guard::catch("tokenizer", || self.tokenizer.decode(ids, false))?;
        text.map_err(|e| Error::data(format!("tokenizer: {}", escape(&e.to_string()))))
    }

    /// Returns what keeps control tokens in user text from becoming control tokens.
    pub fn shield(&self) -> &Shield {
        self.shield.get_or_init(|| Shield::new(&self.tokenizer))
    }

    /// Returns the id of a token, by its text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Returns whether an id is a control token's.
    pub fn is_control(&self, id: u32) -> bool {
        let added = self.tokenizer.get_added_vocabulary();
        added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }

    /// Returns the text of the end-of-sequence token.
    pub fn eos_token(&self) -> Option<&str> {
        self.config.token("eos_token")
    }

    /// Returns the id of the end-of-sequence token.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_token().and_then(|t| self.id(t))
    }

    /// Returns the id of the beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.config.token("bos_token").and_then(|t| self.id(t))
    }

    /// Returns the id of the padding token.
    pub fn pad_id(&self) -> Option<u32> {
        self.config.token("pad_token").and_then(|t| self.id(t))
    }

    /// Returns the number of ids the model knows; every id in a token file is below it.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Returns the SHA-256 (hex) of tokenizer.json.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

fn no_tokenizer(error: Error, dir: &Path) -> Error {
    if is_gguf(dir) {
        let text =
            format!("{}: a GGUF file; its tokenizer is not read here", escape(&dir.display().to_string()));
        return Error::data(text).with_hint(gguf::HINT);
    }
    let hint = match ["tokenizer.model", "tekken.json", "vocab.json"].iter().find(|f| dir.join(f).exists()) {
        Some(other) => {
            format!("{other} alone is not read; transformers' save_pretrained writes tokenizer.json")
        }
        None => "--model takes the directory that holds tokenizer.json".into(),
    };
    if error.kind() == Kind::NoInput { error.with_hint(hint) } else { error }
}

/// Behind the guard: seven sites of the crate are known to panic on damaged files.
fn load(bytes: &[u8], config: &TokenizerConfig, model: &Value) -> Result<Tokenizer> {
    guard::catch("tokenizer.json", || {
        let failed = |e: tokenizers::Error| Error::data(escape(&e.to_string()));
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(failed)?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(failed)?;
        class::apply(&mut tokenizer, config, model)?;
        add_listed_tokens(&mut tokenizer, config)?;
        set_post_processor(&mut tokenizer, config)?;
        // Some files load and then panic on the first text.
        tokenizer.encode_fast("a b", true).map_err(failed)?;
        Ok(tokenizer)
    })?
}

/// Takes the chance away by which BPE leaves merges out, and returns it: transformers tokenizes with it, otherwise each time.
fn without_dropout(tokenizer: &mut Tokenizer) -> Option<f32> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    let dropout = model.dropout.filter(|p| *p != 0.0)?;
    let mut model = model.clone();
    model.dropout = None;
    tokenizer.with_model(model);
    Some(dropout)
}

/// Adds the tokens that only the configuration knows, and makes the named ones control tokens.
fn add_listed_tokens(tokenizer: &mut Tokenizer, config: &TokenizerConfig) -> Result<()> {
    let failed = |e: tokenizers::Error| Error::data(escape(&e.to_string()));
    for token in config.listed_tokens()? {
        if tokenizer.get_added_vocabulary().get_vocab().contains_key(&token.content) {
            continue;
        }
        let added = AddedToken::from(token.content.clone(), token.special)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .single_word(token.single_word)
            .normalized(token.normalized);
        tokenizer.add_tokens([added]).map_err(failed)?;
        match tokenizer.token_to_id(&token.content) {
            Some(id) if id == token.id => {}
            other => {
                let found = other.map_or("none".into(), |id| id.to_string());
                let text = escape(&token.content);
                return Err(Error::data(format!(
                    "token \"{text}\" has id {found}, tokenizer_config.json says {}",
                    token.id
                )));
            }
        }
    }
    let known = tokenizer.get_added_vocabulary();
    let named: Vec<AddedToken> = config
        .special_tokens()
        .into_iter()
        .filter(|token| !known.is_special_token(token))
        .map(|token| AddedToken::from(token, true).normalized(false))
        .collect();
    tokenizer.add_special_tokens(named).map_err(failed)?;
    Ok(())
}

/// `add_bos_token` and `add_eos_token`, where stated, replace the post-processor of the file.
fn set_post_processor(tokenizer: &mut Tokenizer, config: &TokenizerConfig) -> Result<()> {
    let Some((bos, eos)) = config.adds() else { return Ok(()) };
    let bos = config.token("bos_token").filter(|_| bos);
    let eos = config.token("eos_token").filter(|_| eos);
    if bos.is_none() && eos.is_none() {
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        return Ok(());
    }
    let mut single = Vec::new();
    let mut special = Vec::new();
    for (piece, token) in [(bos, bos), (Some("$A"), None), (eos, eos)] {
        let Some(piece) = piece else { continue };
        single.push(format!("{piece}:0"));
        if let Some(token) = token {
            let id = tokenizer.token_to_id(token).ok_or_else(|| Error::data("BOS or EOS has no id"))?;
            special.push((token.to_string(), id));
        }
    }
    let failed = |e: String| Error::data(format!("add_bos_token: {}", escape(&e)));
    let template = TemplateProcessing::builder()
        .try_single(single)
        .map_err(failed)?
        .special_tokens(special)
        .build()
        .map_err(|e| failed(e.to_string()))?;
    tokenizer.with_post_processor(Some(PostProcessorWrapper::Template(template)));
    Ok(())
}

/// Returns one more than the highest id. Errors (65): an id out of all proportion, or two tokens with one id.
fn check_ids(tokenizer: &Tokenizer) -> Result<u32> {
    let vocab = tokenizer.get_vocab(true);
    let mut by_id: Vec<(u32, &str)> = vocab.iter().map(|(token, id)| (*id, token.as_str())).collect();
    by_id.sort_unstable();
    if let Some(pair) = by_id.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let (a, b) = (escape(pair[0].1), escape(pair[1].1));
        return Err(Error::data(format!("tokens \"{a}\" and \"{b}\" have the same id {}", pair[0].0)));
    }
    match by_id.last() {
        None => Err(Error::data("no tokens")),
        Some((id, token)) if *id >= MOST_IDS => {
            Err(Error::data(format!("token \"{}\" has id {id}, the limit is {MOST_IDS}", escape(token))))
        }
        Some((id, _)) => Ok(id + 1),
    }
}

/// config.json of the model, or null.
fn model_config(dir: &Path) -> Result<Value> {
    let path = dir.join("config.json");
    if !path.exists() {
        return Ok(Value::Null);
    }
    let bytes = input::read(&path, 16 << 20)?;
    let place = escape(&path.display().to_string());
    let config = serde_json::from_slice(&bytes).map_err(|e| Error::data(e.to_string())).at(place)?;
    Ok(text_part::of_value(config))
}

/// `vocab_size` of config.json, if it is there.
fn model_vocab_size(model: &Value, dir: &Path) -> Result<Option<u32>> {
    let size = model.get("vocab_size").or_else(|| model.get("text_config")?.get("vocab_size"));
    let Some(size) = size else { return Ok(None) };
    match size.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0) {
        Some(size) => Ok(Some(size)),
        None => {
            let place = escape(&dir.join("config.json").display().to_string());
            Err(Error::data(format!("{place}: \"vocab_size\" must be a positive number")))
        }
    }
}

/// Encodes behind the guard.
fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Encoding> {
    let encoding = guard::catch("tokenizer", || tokenizer.encode_fast(text, add_special))?;
    encoding.map_err(|e| Error::data(format!("tokenizer: {}", escape(&e.to_string()))))
}
