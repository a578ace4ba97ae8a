//! What a module is in a decoder, and the names by which users mean modules.

/// The linear layers of a decoder block that are quantized, where each is a matrix of its own.
const SEPARATE: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The same where queries, keys and values are one matrix, gate and up another (Phi 3).
const FUSED: [&str; 4] = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];

/// What a matrix is in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The embedding.
    Embedding,
    /// The output head.
    Head,
    /// A linear layer of this block.
    Linear(usize),
}

/// Returns the role of a module; `None` for what is never quantized.
pub fn role(module: &str) -> Option<Role> {
    match module {
        "model.embed_tokens" => Some(Role::Embedding),
        "lm_head" => Some(Role::Head),
        _ => {
            let (block, rest) = module.strip_prefix("model.layers.")?.split_once('.')?;
            let linear = SEPARATE.contains(&rest) || FUSED.contains(&rest);
            linear.then(|| block.parse().ok().map(Role::Linear))?
        }
    }
}

/// Whether a module is meant by a name: whole, beginning, end or middle in whole components.
pub fn matches(module: &str, name: &str) -> bool {
    format!(".{module}.").contains(&format!(".{}.", name.trim_matches('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_whole_components() {
        let module = "model.layers.1.mlp.down_proj";
        for name in [module, "down_proj", "model.layers.1", "layers.1.mlp", "mlp.down_proj", "mlp"] {
            assert!(matches(module, name), "{name}");
        }
        for name in ["proj", "model.layers.11", "model.layers.1.mlp.down", "layers.0"] {
            assert!(!matches(module, name), "{name}");
        }
    }

    #[test]
    fn modules_have_roles() {
        assert_eq!(role("model.layers.3.mlp.up_proj"), Some(Role::Linear(3)));
        assert_eq!(role("model.layers.3.self_attn.qkv_proj"), Some(Role::Linear(3)));
        assert_eq!(role("lm_head"), Some(Role::Head));
        assert_eq!(role("model.embed_tokens"), Some(Role::Embedding));
        for other in
            ["model.layers.3.mlp.router", "model.layers.x.mlp.up_proj", "model.norm", "model.layers.3"]
        {
            assert_eq!(role(other), None, "{other}");
        }
    }
}
