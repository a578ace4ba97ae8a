//! The command line of kto-merge, as the user gives it.

use clap::{Parser, ValueEnum};
use kto_cli::Common;
use kto_formats::shards::parse_size;
use safetensors::Dtype;
use std::path::PathBuf;

const ABOUT: &str = "Merge a LoRA adapter into its base model";

const LONG_ABOUT: &str = "\
Merge a LoRA adapter into its base model: W + scale · B · A, computed in f32 and rounded once.

A 4-bit base is dequantized, and the result is stored in the dtype it was quantized from. For the best result give the \
original weights as --base, also when the adapter was trained on their 4-bit form. All other tensors, tokenizer, chat \
template, generation settings and licence are copied. The weights go through memory a piece at a time. The result \
appears under its name only when it is complete; its path is printed on standard output.

An adapter of kto-train knows its base. Another base is refused with 78, and so is a base that this adapter has been \
merged into before.";

const EXAMPLES: &str = "\
Examples:
  kto-merge --base Qwen2.5-7B-Instruct --adapter run/adapter -o merged
  kto-merge --base base-4bit --adapter run/adapter -o merged --dtype bf16
  kto-merge --base base --adapter run/adapter -o merged --dry-run";

/// What the user asked for.
#[derive(Clone, Debug, Parser)]
#[command(name = "kto-merge", about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Model that the adapter was trained on: a directory, or org/name[@revision] on the hub
    #[arg(long, value_name = "DIR|NAME", help_heading = "Input")]
    pub base: PathBuf,
    /// Adapter directory in PEFT form, or a run directory of kto-train with its adapter
    #[arg(long, value_name = "DIR", help_heading = "Input")]
    pub adapter: PathBuf,
    /// Merge even if the adapter was trained on another base or is in the base already
    #[arg(long, help_heading = "Input")]
    pub force_base: bool,

    /// Directory to make
    #[arg(short, long, visible_alias = "out", value_name = "DIR", help_heading = "Output")]
    pub output: PathBuf,
    /// Replace the output directory if it exists
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Dtype of all weights of the result; default: as stored
    #[arg(long, value_name = "DTYPE", help_heading = "Output")]
    pub dtype: Option<FloatType>,
    /// Largest weight file: 5GB, 500MB, 2GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size, help_heading = "Output")]
    pub max_shard_size: u64,
    /// Check the inputs and print what would be done
    #[arg(long, help_heading = "Output")]
    pub dry_run: bool,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Output")]
    pub threads: Option<u16>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// A float dtype on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FloatType {
    /// 32 bits
    F32,
    /// bfloat16
    Bf16,
    /// 16 bits, largest value 65504
    F16,
}

impl From<FloatType> for Dtype {
    fn from(value: FloatType) -> Dtype {
        match value {
            FloatType::F32 => Dtype::F32,
            FloatType::Bf16 => Dtype::BF16,
            FloatType::F16 => Dtype::F16,
        }
    }
}
