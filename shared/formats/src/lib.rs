//! Every file format that the KTO tools read and write. No tensors, no devices.
#![deny(unsafe_code)]

pub mod adapter;
mod adapter_config;
pub mod bnb;
pub mod buffers;
pub mod chat;
pub mod chunks;
pub mod columnar;
pub mod companions;
mod frames;
pub mod gguf;
pub mod json;
mod json_fault;
pub mod json_out;
pub mod json_texts;
pub mod jsonl;
pub mod lora;
pub mod mlx;
mod mmap;
pub mod model_dir;
pub mod peft;
pub mod python_json;
pub mod record;
pub mod rope;
pub mod rows;
mod safetensors_header;
pub mod safetensors_out;
pub mod safetensors_placed;
pub mod shards;
pub mod spans;
pub mod table;
pub mod template;
pub mod tensors;
pub mod text_part;
pub mod tokenizer;
pub mod tokens;
