//! The command line of kto-quantize, as the user gives it.

use clap::Parser;
use kto_cli::Common;
use kto_formats::shards::parse_size;
use std::path::PathBuf;

const ABOUT: &str = "Quantize a model directory to 4 bits (bitsandbytes NF4)";

const LONG_ABOUT: &str = "\
Quantize a model directory to 4 bits in the form that transformers and bitsandbytes read: NF4 in blocks of 64, the \
scales themselves in 8 bits.

Every linear layer of the decoder blocks is quantized. Embedding, output head, norms and biases stay as they are \
stored. Tokenizer, chat template, generation settings and licence are copied. The weights go through memory a piece \
at a time. The result appears under its name only when it is complete; its path is printed on standard output.";

const EXAMPLES: &str = "\
Examples:
  kto-quantize Qwen2.5-7B-Instruct -o qwen-4bit
  kto-quantize base -o base-4bit --skip model.layers.0,down_proj
  kto-quantize base -o base-4bit --dry-run
  kto-train --model \"$(kto-quantize base -o base-4bit)\" --data train.kto.arrow --out run";

/// What the user asked for.
#[derive(Clone, Debug, Parser)]
#[command(name = "kto-quantize", about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Model directory with config.json and safetensors weights, or org/name[@revision] on the hub
    #[arg(value_name = "DIR|NAME")]
    pub model: PathBuf,

    /// Directory to make
    #[arg(short, long, value_name = "OUT_DIR", help_heading = "Output")]
    pub output: PathBuf,
    /// Replace OUT_DIR if it exists
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Largest weight file: 5GB, 500MB, 2GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size, help_heading = "Output")]
    pub max_shard_size: u64,
    /// Check the input and print what would be done
    #[arg(long, help_heading = "Output")]
    pub dry_run: bool,

    /// Store the scales in 8 bits too (the default)
    #[arg(long, overrides_with = "no_double_quant", help_heading = "Quantization")]
    pub double_quant: bool,
    /// Store the scales in f32: 0.37 bit more a weight
    #[arg(long, help_heading = "Quantization")]
    pub no_double_quant: bool,
    /// Modules to leave as they are: full names, beginnings or ends of names, with commas between
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "lm_head",
        help_heading = "Quantization"
    )]
    pub skip: Vec<String>,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Quantization")]
    pub threads: Option<u16>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}
