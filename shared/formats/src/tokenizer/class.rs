//! Tokenizer classes that transformers 5 rebuilds from their vocabulary, whatever tokenizer.json says about splitting.
//!
//! AutoTokenizer picks a class from config.json's `model_type` and from `tokenizer_class`; three classes then bring
//! their own normalizer and pre-tokenizer. For the files those models are published with this changes nothing; for
//! Llama-2 style files without `legacy`, and for home-made tokenizers under a Qwen2 config, it changes tokens, and the
//! tokens must be those a model is used with. Source: transformers 5.23, models/auto/tokenization_auto.py and
//! models/{llama,qwen2,gpt2}/tokenization_*.py.

use super::TokenizerConfig;
use kto_cli::{Error, Result};
use serde_json::{Value, json};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// How Qwen2 splits text.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A class with rules of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// tokenizer.json is taken as it is.
    AsWritten,
    Llama,
    Qwen2,
    Gpt2,
}

/// Makes `tokenizer` what transformers makes of it.
pub fn apply(tokenizer: &mut Tokenizer, config: &TokenizerConfig, model: &Value) -> Result<()> {
    let blank = config.flag("add_prefix_space");
    let (normalizer, splitter) = match class(model, config) {
        Class::AsWritten => return Ok(()),
        Class::Llama if is_byte_level(tokenizer) => return Ok(()),
        Class::Llama => (None, metaspace(blank, config.flag("legacy"))),
        Class::Qwen2 => (Some(json!({"type": "NFC"})), qwen2(blank)),
        Class::Gpt2 => (None, byte_level(blank, true)),
    };
    let normalizer: Option<NormalizerWrapper> = normalizer.map(parse).transpose()?;
    let splitter: PreTokenizerWrapper = parse(splitter)?;
    tokenizer.with_normalizer(normalizer).map_err(|e| Error::data(e.to_string()))?;
    tokenizer.with_pre_tokenizer(Some(splitter));
    Ok(())
}

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| Error::internal(format!("tokenizer class: {e}")))
}

fn metaspace(prefix: Option<bool>, legacy: Option<bool>) -> Value {
    let scheme = match (prefix, legacy) {
        (Some(false), _) => "never",
        (_, Some(true)) => "always",
        _ => "first",
    };
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false})
}

fn qwen2(prefix: Option<bool>) -> Value {
    let split =
        json!({"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [split, byte_level(prefix, false)]})
}

fn byte_level(prefix: Option<bool>, use_regex: bool) -> Value {
    let prefix = prefix.unwrap_or(false);
    json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": use_regex})
}

fn is_byte_level(tokenizer: &Tokenizer) -> bool {
    let text = serde_json::to_string(&tokenizer.get_pre_tokenizer()).unwrap_or_default()
        + &serde_json::to_string(&tokenizer.get_decoder()).unwrap_or_default();
    text.contains("\"ByteLevel\"")
}

/// The class that AutoTokenizer settles on. A class registered for the model type wins over the declared one only for
/// `qwen2`, whose files are known to declare wrong ones; where the two differ otherwise, a declared class of the three
/// stands unless the registered one is the plain one.
fn class(model: &Value, config: &TokenizerConfig) -> Class {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_string);
    let declared = match config.class() {
        "" => text(model, "tokenizer_class").unwrap_or_default(),
        name => name.into(),
    };
    let declared = declared.strip_suffix("Fast").unwrap_or(&declared);
    let own = match declared {
        "LlamaTokenizer" => Class::Llama,
        "Qwen2Tokenizer" => Class::Qwen2,
        "GPT2Tokenizer" => Class::Gpt2,
        _ => Class::AsWritten,
    };
    match registered(text(model, "model_type").as_deref().unwrap_or_default()) {
        Some(Class::AsWritten) => Class::AsWritten,
        Some(registered) if declared.is_empty() => registered,
        Some(Class::Qwen2) if text(model, "model_type").as_deref() == Some("qwen2") => Class::Qwen2,
        _ => own,
    }
}

/// The class that transformers registers for a model type; None where it registers none, or one we do not know.
fn registered(model_type: &str) -> Option<Class> {
    match model_type {
        "qwen2" | "qwen2_moe" | "qwen2_vl" | "qwen2_5_vl" | "qwen3" | "qwen3_moe" | "qwen3_next"
        | "qwen3_vl" => Some(Class::Qwen2),
        "gpt2" | "phi" => Some(Class::Gpt2),
        "mistral" | "mixtral" | "phi3" | "phimoe" | "olmo2" | "olmo3" | "granite" | "granitemoe"
        | "stablelm" | "glm" | "glm4" | "internlm2" | "internlm3" | "minicpm3" | "ernie4_5" | "nemotron"
        | "jamba" => Some(Class::AsWritten),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_the_one_autotokenizer_picks() {
        let pick = |model_type: &str, declared: &str| {
            let config = TokenizerConfig::from_fields(json!({"tokenizer_class": declared}));
            class(&json!({"model_type": model_type}), &config)
        };
        assert_eq!(pick("qwen2", "TokenizersBackend"), Class::Qwen2);
        assert_eq!(pick("qwen3", "TokenizersBackend"), Class::AsWritten);
        assert_eq!(pick("qwen3", "Qwen2TokenizerFast"), Class::Qwen2);
        assert_eq!(pick("", "LlamaTokenizerFast"), Class::Llama);
        assert_eq!(pick("llama", "LlamaTokenizer"), Class::Llama);
        assert_eq!(pick("mistral", "LlamaTokenizer"), Class::AsWritten);
        assert_eq!(pick("phi3", "LlamaTokenizer"), Class::AsWritten);
        assert_eq!(pick("gpt2", ""), Class::Gpt2);
        assert_eq!(pick("llama", "PreTrainedTokenizerFast"), Class::AsWritten);
    }
}
