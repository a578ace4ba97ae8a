//! The decoders that llama.cpp has under the same structure, and its names for their tensors.

use kto_cli::{Error, Result, escape};
use serde_json::Value;

/// What llama.cpp needs to know about a decoder before its settings.
pub struct Family {
    /// Its name in the file.
    pub architecture: &'static str,
    /// Whether rows of queries and keys are interleaved.
    interleaved: bool,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Blocks.
    pub blocks: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
}

/// model_type, architecture of the file, whether rows are interleaved.
const FAMILIES: [(&str, &str, bool); 4] = [
    ("llama", "llama", true),
    ("mistral", "llama", true),
    ("qwen2", "qwen2", false),
    ("qwen3", "qwen3", false),
];

/// Modules of a block by their names in the file.
const MODULES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

impl Family {
    /// Reads config.json. Errors (65) name the field.
    pub fn of(config: &Value) -> Result<Self> {
        let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let Some((_, architecture, interleaved)) = FAMILIES.iter().find(|(name, ..)| *name == kind) else {
            let known: Vec<&str> = FAMILIES.iter().map(|f| f.0).collect();
            return Err(Error::data(format!("model_type \"{}\" cannot be written as GGUF", escape(kind)))
                .with_hint(format!("supported families: {}", known.join(", "))));
        };
        let heads = super::settings::count(config, "num_attention_heads")?;
        let kv_heads = match config.get("num_key_value_heads") {
            None | Some(Value::Null) => heads,
            Some(_) => super::settings::count(config, "num_key_value_heads")?,
        };
        Ok(Self {
            architecture,
            interleaved: *interleaved,
            heads,
            kv_heads,
            blocks: super::settings::count(config, "num_hidden_layers")?,
            vocabulary: super::settings::count(config, "vocab_size")?,
        })
    }

    /// Returns a tensor's name in the file, and the number of heads whose rows are interleaved.
    pub fn tensor(&self, name: &str) -> Result<(String, Option<usize>)> {
        let unknown = || Error::data(format!("tensor \"{}\" has no name in a GGUF file", escape(name)));
        let (module, part) = name.rsplit_once('.').ok_or_else(unknown)?;
        if !matches!(part, "weight" | "bias") {
            return Err(unknown());
        }
        let outside = match module {
            "model.embed_tokens" => Some("token_embd"),
            "model.norm" => Some("output_norm"),
            "lm_head" => Some("output"),
            _ => None,
        };
        if let Some(to) = outside {
            return Ok((format!("{to}.{part}"), None));
        }
        let inner =
            module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
        let (block, module) = (inner.0.parse::<usize>().map_err(|_| unknown())?, inner.1);
        let (_, to) = MODULES.iter().find(|(from, _)| *from == module).ok_or_else(unknown)?;
        let heads = match module {
            "self_attn.q_proj" if self.interleaved => Some(self.heads),
            "self_attn.k_proj" if self.interleaved => Some(self.kv_heads),
            _ => None,
        };
        Ok((format!("blk.{block}.{to}.{part}"), heads))
    }
}
