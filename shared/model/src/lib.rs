//! The KTO engine: a decoder with LoRA whose forward and backward are written by hand, run layer by layer over the whole batch.
//!
//! Called by `kto-train` and `kto-eval`. Data flows one way: rows → [`pack`] → [`sweep`] (blocks, then `head`) → [`loss`] → sweep back.
//! Invariants: no padding; a prompt is computed once for all its branches; nothing depends on the number of threads.
//! Deliberately absent: autograd, tokenization, files other than the model and the reference cache.

#![forbid(unsafe_code)]

pub mod architecture;
pub mod base;
mod block;
pub mod buffers;
pub mod devices;
mod dora;
pub mod family;
pub mod fit;
pub mod generate;
mod head;
mod inputs;
pub mod lora;
mod lora_layout;
pub mod loss;
pub mod memory;
pub mod norm;
mod numeric;
mod on_gpu;
pub mod pack;
pub mod partners;
mod projection;
pub mod reference;
mod residency;
pub mod rotary;
pub mod rows;
pub mod sweep;
pub mod weights;
pub mod whole;
