//! The decoders that llama.cpp has under the same structure, and its names for their tensors, for both directions.

use kto_cli::{Error, Result, escape};
use kto_formats::gguf::GgufReader;
use serde_json::Value;

/// A decoder of transformers and of llama.cpp.
pub struct Kind {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// The class of transformers.
    pub class: &'static str,
    /// Its name in the file.
    pub architecture: &'static str,
    /// Whether rows of queries and keys are interleaved in the file.
    interleaved: bool,
    /// Norms hold what is added to 1 in transformers, the sum in the file; a head is scaled, layers alternate (Gemma).
    pub gemma: bool,
    /// LayerNorm with biases.
    pub layer_norm: bool,
    /// Norms of each head's queries and keys.
    qk_norm: bool,
    /// Queries, keys and values are one matrix, gate and up another.
    pub fused: bool,
    /// Only a part of a head may turn.
    pub partial: bool,
    /// The head size is a field of its own.
    pub own_head_dim: bool,
}

const fn kind(model_type: &'static str, class: &'static str, architecture: &'static str) -> Kind {
    Kind {
        model_type,
        class,
        architecture,
        interleaved: false,
        gemma: false,
        layer_norm: false,
        qk_norm: false,
        fused: false,
        partial: false,
        own_head_dim: true,
    }
}

/// All of them. Of two with one architecture the file's keys decide: see [`Kind::of_file`].
pub const KINDS: [Kind; 8] = [
    Kind { interleaved: true, ..kind("llama", "LlamaForCausalLM", "llama") },
    Kind { interleaved: true, ..kind("mistral", "MistralForCausalLM", "llama") },
    Kind { own_head_dim: false, ..kind("qwen2", "Qwen2ForCausalLM", "qwen2") },
    Kind { qk_norm: true, ..kind("qwen3", "Qwen3ForCausalLM", "qwen3") },
    Kind { fused: true, partial: true, own_head_dim: false, ..kind("phi3", "Phi3ForCausalLM", "phi3") },
    Kind { gemma: true, ..kind("gemma2", "Gemma2ForCausalLM", "gemma2") },
    Kind { gemma: true, qk_norm: true, ..kind("gemma3_text", "Gemma3ForCausalLM", "gemma3") },
    Kind {
        layer_norm: true,
        partial: true,
        own_head_dim: false,
        ..kind("stablelm", "StableLmForCausalLM", "stablelm")
    },
];

/// Modules outside of the blocks.
const OUTSIDE: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
const NORMS: [(&str, &str); 2] = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")];
const GEMMA_NORMS: [(&str, &str); 4] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const SEPARATE: [(&str, &str); 7] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
const FUSED: [(&str, &str); 4] = [
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
const QK_NORMS: [(&str, &str); 2] =
    [("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")];

impl Kind {
    /// Returns the kind of a file. Errors (65): one that is not known, by its name.
    pub fn of_file(file: &GgufReader) -> Result<&'static Self> {
        let what = file.text("general.type").unwrap_or("model");
        if what != "model" {
            return Err(Error::data(format!("holds a \"{}\", not a language model", escape(what))));
        }
        let Some(found) = file.text("general.architecture") else {
            return Err(Error::data("no \"general.architecture\""));
        };
        // llama.cpp computes no window in this architecture; the key is ours.
        let mistral = file.has("llama.attention.sliding_window");
        let known = KINDS.iter().find(|k| k.architecture == found && (k.model_type == "mistral") == mistral);
        known.ok_or_else(|| {
            let mut all: Vec<&str> = KINDS.iter().map(|kind| kind.architecture).collect();
            all.dedup();
            Error::data(format!("architecture \"{}\" is not supported", escape(found)))
                .with_hint(format!("supported: {}", all.join(", ")))
        })
    }

    /// Returns the modules of a block: transformers' name, name in the file.
    pub fn modules(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let norms: &[(&str, &str)] = if self.gemma { &GEMMA_NORMS } else { &NORMS };
        let linears: &[(&str, &str)] = if self.fused { &FUSED } else { &SEPARATE };
        let qk: &[(&str, &str)] = if self.qk_norm { &QK_NORMS } else { &[] };
        norms.iter().chain(linears).chain(qk).copied()
    }

    /// Returns whether a module, by its name in transformers, is a norm.
    pub fn is_norm(module: &str) -> bool {
        module.ends_with("norm")
    }
}

/// A decoder with the numbers that its tensors depend on.
pub struct Family {
    /// Which decoder.
    pub kind: &'static Kind,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Blocks.
    pub blocks: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
}

/// What becomes of a tensor on its way between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Rows of this number of heads take turns in the file.
    Interleaved(usize),
    /// The file has 1 more.
    PlusOne,
}

impl Family {
    /// Reads config.json. Errors (65) name the field.
    pub fn of(config: &Value) -> Result<Self> {
        let found = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let Some(kind) = KINDS.iter().find(|kind| kind.model_type == found) else {
            let known: Vec<&str> = KINDS.iter().map(|kind| kind.model_type).collect();
            return Err(Error::data(format!("model_type \"{}\" cannot be written as GGUF", escape(found)))
                .with_hint(format!("supported families: {}", known.join(", "))));
        };
        let heads = super::settings::count(config, "num_attention_heads")?;
        let kv_heads = match config.get("num_key_value_heads") {
            None | Some(Value::Null) => heads,
            Some(_) => super::settings::count(config, "num_key_value_heads")?,
        };
        Ok(Self {
            kind,
            heads,
            kv_heads,
            blocks: super::settings::count(config, "num_hidden_layers")?,
            vocabulary: super::settings::count(config, "vocab_size")?,
        })
    }

    /// Returns a tensor's name in the file, and how it differs there.
    pub fn tensor(&self, name: &str) -> Result<(String, Change)> {
        let unknown = || Error::data(format!("tensor \"{}\" has no name in a GGUF file", escape(name)));
        let (module, part) = name.rsplit_once('.').ok_or_else(unknown)?;
        if !matches!(part, "weight" | "bias") {
            return Err(unknown());
        }
        if let Some((_, to)) = OUTSIDE.iter().find(|(from, _)| *from == module) {
            return Ok((format!("{to}.{part}"), self.change(module, part)));
        }
        let inner =
            module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
        let (block, module) = (inner.0.parse::<usize>().map_err(|_| unknown())?, inner.1);
        let (_, to) = self.kind.modules().find(|(from, _)| *from == module).ok_or_else(unknown)?;
        Ok((format!("blk.{block}.{to}.{part}"), self.change(module, part)))
    }

    /// Returns the name in transformers of a tensor of the file, and how it differs in the file; none for one that has no such name.
    pub fn weight(&self, name: &str) -> Option<(String, Change)> {
        let (module, part) = name.rsplit_once('.').filter(|(_, part)| matches!(*part, "weight" | "bias"))?;
        if let Some((to, _)) = OUTSIDE.iter().find(|(_, from)| *from == module) {
            return Some((format!("{to}.{part}"), self.change(to, part)));
        }
        let (block, module) = module.strip_prefix("blk.")?.split_once('.')?;
        let number = block.parse::<usize>().ok().filter(|n| *n < self.blocks && n.to_string() == block)?;
        let (to, _) = self.kind.modules().find(|(_, from)| *from == module)?;
        Some((format!("model.layers.{number}.{to}.{part}"), self.change(to, part)))
    }

    fn change(&self, module: &str, part: &str) -> Change {
        match module {
            "self_attn.q_proj" if self.kind.interleaved => Change::Interleaved(self.heads),
            "self_attn.k_proj" if self.kind.interleaved => Change::Interleaved(self.kv_heads),
            _ if self.kind.gemma && Kind::is_norm(module) && part == "weight" => Change::PlusOne,
            _ => Change::None,
        }
    }
}
