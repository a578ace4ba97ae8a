//! Whether a checkpoint holds the tensors that its config.json promises.
//!
//! Called before anything of the promised sizes is allocated: a config.json that lies about a size must not cost memory or time.
//! Invariant: headers only, no weight is read. Deliberately absent: finiteness, which is checked as weights are loaded.

use crate::architecture::{Architecture, Module};
use kto_cli::{Error, Result, escape};
use kto_formats::{bnb::Nf4Tensor, model_dir::ModelDir};

/// Fails (65) at the first tensor that is missing or has another shape, and when there are more blocks than config.json says.
pub fn check(architecture: &Architecture, directory: &ModelDir) -> Result<()> {
    let (v, c) = (architecture.vocab_size, architecture.hidden);
    let dense = |name: &str, shape: &[usize]| directory.tensors.require(name)?.expect_shape(shape);
    dense("model.embed_tokens.weight", &[v, c])?;
    dense("model.norm.weight", &[c])?;
    if !architecture.tied {
        dense("lm_head.weight", &[v, c])?;
    }
    for layer in 0..architecture.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            dense(&format!("model.layers.{layer}.{norm}.weight"), &[c])?;
        }
        for module in Module::ALL {
            let (rows, columns) = architecture.weight_shape(module);
            let name = format!("{}.weight", module.path(layer));
            match Nf4Tensor::find(&directory.tensors, &name)? {
                Some(packed) if packed.state.shape == [rows, columns] => {}
                Some(packed) => {
                    let found = &packed.state.shape;
                    return Err(Error::data(format!(
                        "tensor \"{name}\" has shape {found:?}, expected [{rows}, {columns}]"
                    )));
                }
                None => dense(&name, &[rows, columns])?,
            }
            if architecture.has_bias(module) {
                dense(&format!("{}.bias", module.path(layer)), &[rows])?;
            }
        }
    }
    no_further_block(architecture.layers, directory)
}

fn no_further_block(layers: usize, directory: &ModelDir) -> Result<()> {
    let number = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    match directory.tensors.names().find(|name| number(name).is_some_and(|n| n >= layers)) {
        None => Ok(()),
        Some(name) => {
            let name = escape(name);
            Err(Error::data(format!(
                "tensor \"{name}\": config.json says {layers} blocks (num_hidden_layers)"
            )))
        }
    }
}
