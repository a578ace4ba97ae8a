//! Which block form each tensor has in a file of a type: llama.cpp's mixtures without an importance matrix.

use super::names::Family;
use crate::Form;
use kto_formats::gguf;
use kto_kernels::quant::{Ggml, ggml::ReadOnly};
use safetensors::Dtype;

/// The type of a file, as llama.cpp names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits.
    Q8_0,
    /// 6 bits.
    Q6K,
    /// 5 bits, some tensors 6.
    Q5KM,
    /// 4 bits, some tensors 6.
    Q4KM,
    /// 4 bits, the head 6.
    Q4_0,
}

/// Returns llama.cpp's number of a type of file.
pub fn file_number(file: FileType) -> u32 {
    match file {
        FileType::F32 => 0,
        FileType::F16 => 1,
        FileType::Q4_0 => 2,
        FileType::Q8_0 => 7,
        FileType::Q4KM => 15,
        FileType::Q5KM => 17,
        FileType::Q6K => 18,
        FileType::Bf16 => 32,
    }
}

/// Returns ggml's number of a form; forms that it does not have are never in a GGUF file.
pub fn number(form: Form) -> u32 {
    match form {
        Form::Float(Dtype::F16) => 1,
        Form::Float(Dtype::BF16) => 30,
        Form::Ggml(Ggml::Q4_0) => 2,
        Form::Ggml(Ggml::Q5_0) => 6,
        Form::Ggml(Ggml::Q5_1) => 7,
        Form::Ggml(Ggml::Q8_0) => 8,
        Form::Ggml(Ggml::Q4K) => 12,
        Form::Ggml(Ggml::Q5K) => 13,
        Form::Ggml(Ggml::Q6K) => 14,
        _ => 0,
    }
}

/// How a tensor of a file is stored, of the types that are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stored {
    /// F32, F16 or BF16.
    Float(Dtype),
    /// A block form that is written too.
    Written(Ggml),
    /// Another one.
    ReadOnly(ReadOnly),
}

/// ggml's numbers of the types that are read.
const READ: [(u32, Stored); 15] = [
    (0, Stored::Float(Dtype::F32)),
    (1, Stored::Float(Dtype::F16)),
    (30, Stored::Float(Dtype::BF16)),
    (2, Stored::Written(Ggml::Q4_0)),
    (3, Stored::ReadOnly(ReadOnly::Q4_1)),
    (6, Stored::Written(Ggml::Q5_0)),
    (7, Stored::Written(Ggml::Q5_1)),
    (8, Stored::Written(Ggml::Q8_0)),
    (10, Stored::ReadOnly(ReadOnly::Q2K)),
    (11, Stored::ReadOnly(ReadOnly::Q3K)),
    (12, Stored::Written(Ggml::Q4K)),
    (13, Stored::Written(Ggml::Q5K)),
    (14, Stored::Written(Ggml::Q6K)),
    (20, Stored::ReadOnly(ReadOnly::Iq4Nl)),
    (23, Stored::ReadOnly(ReadOnly::Iq4Xs)),
];

impl Stored {
    /// Returns values and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Float(Dtype::F32) => (1, 4),
            Self::Float(_) => (1, 2),
            Self::Written(form) => form.block(),
            Self::ReadOnly(form) => form.block(),
        }
    }
}

/// Returns how a type of ggml's number is stored; none for those that are not read.
pub fn stored(number: u32) -> Option<Stored> {
    READ.iter().find(|(n, _)| *n == number).map(|(_, stored)| *stored)
}

/// Returns the names of the types that are read.
pub fn readable() -> String {
    let names: Vec<&str> = READ.iter().filter_map(|(n, _)| Some(gguf::kind(*n)?.name)).collect();
    names.join(", ")
}

/// Returns the name of a form in ggml's terms.
pub fn label(form: Form) -> &'static str {
    match number(form) {
        1 => "F16",
        30 => "BF16",
        2 => "Q4_0",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        _ => "F32",
    }
}

/// Returns the form of a tensor. Vectors are F32; `tied` says that the embedding is the head too.
pub fn form(name: &str, shape: &[usize], _dtype: Dtype, file: FileType, family: &Family, tied: bool) -> Form {
    if shape.len() < 2 {
        return Form::Float(Dtype::F32);
    }
    let base = match file {
        FileType::F32 => return Form::Float(Dtype::F32),
        FileType::F16 => return Form::Float(Dtype::F16),
        FileType::Bf16 => return Form::Float(Dtype::BF16),
        FileType::Q8_0 => Ggml::Q8_0,
        FileType::Q6K => Ggml::Q6K,
        FileType::Q5KM => Ggml::Q5K,
        FileType::Q4KM => Ggml::Q4K,
        FileType::Q4_0 => Ggml::Q4_0,
    };
    let head = name == "output.weight" || tied && name == "token_embd.weight";
    if head {
        return Form::Ggml(if base == Ggml::Q8_0 { base } else { Ggml::Q6K });
    }
    let mixed = matches!(file, FileType::Q4KM | FileType::Q5KM);
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let sensitive = name.ends_with("attn_v.weight") || name.ends_with("ffn_down.weight");
    if mixed && sensitive && block.is_some_and(|block| takes_more_bits(block, family.blocks)) {
        return Form::Ggml(Ggml::Q6K);
    }
    // Values are among these rows.
    if mixed && name.ends_with("attn_qkv.weight") {
        return Form::Ggml(if base == Ggml::Q4K { Ggml::Q5K } else { Ggml::Q6K });
    }
    // Eight query heads share these values in the 70B Llama: worth a bit more.
    let shared =
        family.kind.architecture == "llama" && family.blocks == 80 && family.heads != family.kv_heads;
    if file == FileType::Q4KM && shared && name.ends_with("attn_v.weight") {
        return Form::Ggml(Ggml::Q5K);
    }
    Form::Ggml(base)
}

/// The first and the last eighth of the blocks, and every third between.
fn takes_more_bits(block: usize, blocks: usize) -> bool {
    let eighth = blocks / 8;
    block < eighth || block >= 7 * blocks / 8 || (block - eighth) % 3 == 2
}

/// Returns what llama.cpp takes where the columns are no multiple of the form's block.
pub fn instead(form: Form, shape: &[usize]) -> Form {
    let smaller = match form {
        Form::Ggml(Ggml::Q4K) => Ggml::Q5_0,
        Form::Ggml(Ggml::Q5K) => Ggml::Q5_1,
        _ => Ggml::Q8_0,
    };
    match Form::Ggml(smaller).unfit(shape) {
        None => Form::Ggml(smaller),
        Some(_) => Form::Float(Dtype::F16),
    }
}

/// Reads the name of a form on the command line.
pub fn parse(text: &str) -> Option<Form> {
    Some(match text.to_ascii_uppercase().as_str() {
        "F32" => Form::Float(Dtype::F32),
        "F16" => Form::Float(Dtype::F16),
        "BF16" => Form::Float(Dtype::BF16),
        "Q4_0" => Form::Ggml(Ggml::Q4_0),
        "Q5_0" => Form::Ggml(Ggml::Q5_0),
        "Q5_1" => Form::Ggml(Ggml::Q5_1),
        "Q8_0" => Form::Ggml(Ggml::Q8_0),
        "Q4_K" => Form::Ggml(Ggml::Q4K),
        "Q5_K" => Form::Ggml(Ggml::Q5K),
        "Q6_K" => Form::Ggml(Ggml::Q6K),
        _ => return None,
    })
}
