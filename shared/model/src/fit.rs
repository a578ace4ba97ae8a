//! Whether tokens and adapter belong to a model. Running on with the wrong ones would give numbers without meaning.

use kto_cli::{Error, Result, escape, hash, input};
use kto_formats::{adapter::Adapter, model_dir::ModelDir, tokens::TokenMeta};
use std::fmt::Display;

/// Largest tokenizer.json that is hashed.
const CAP: u64 = 256 << 20;

/// Fails (78) when the tokens were made with another tokenizer than the model's. A side that says nothing fits.
pub fn check_tokenizer(model: &ModelDir, meta: &TokenMeta) -> Result<()> {
    let Ok(bytes) = input::read(&model.path.join("tokenizer.json"), CAP) else { return Ok(()) };
    let own = hash::sha256_hex(&bytes);
    if meta.tokenizer.is_empty() || own == meta.tokenizer {
        return Ok(());
    }
    Err(Error::config(format!(
        "the tokens were made with another tokenizer.json (sha256 {}…) than the model's ({}…)",
        short(&meta.tokenizer),
        short(&own)
    ))
    .with_hint("kto-tokenize --model with this model, or --force-base"))
}

/// Fails (78) when an adapter was trained on another base ([`Adapter::fits`]). `flag` names it in the message.
pub fn check_adapter(model: &ModelDir, adapter: &Adapter, flag: impl Display) -> Result<()> {
    if adapter.fits(model) {
        return Ok(());
    }
    Err(Error::config(format!("{flag} was trained on another base model"))
        .with_hint("--force-base uses it all the same"))
}

fn short(hash: &str) -> String {
    escape(&hash.chars().take(12).collect::<String>())
}
