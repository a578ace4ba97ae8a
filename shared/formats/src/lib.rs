//! Every file format that the KTO tools read and write. No tensors, no devices.
#![deny(unsafe_code)]

pub mod adapter;
mod adapter_config;
pub mod bnb;
pub mod chat;
pub mod companions;
pub mod gguf;
pub mod json;
pub mod json_array;
mod json_fault;
pub mod jsonl;
pub mod lora;
pub mod mlx;
mod mmap;
pub mod model_dir;
pub mod peft;
pub mod python_json;
pub mod record;
pub mod rows;
mod safetensors_header;
pub mod safetensors_out;
pub mod safetensors_placed;
pub mod shards;
pub mod table;
pub mod template;
pub mod tensors;
pub mod tokenizer;
pub mod tokens;
