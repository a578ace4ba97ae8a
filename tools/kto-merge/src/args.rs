//! The command line of kto-merge, as the user gives it.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets")]

use clap::{ArgGroup, Parser, ValueEnum};
use kto_cli::{Common, Error, escape};
use kto_formats::{lora::Ecosystem, shards::parse_size};
use kto_weights::MAX_SHARD;
use safetensors::Dtype;
use std::path::PathBuf;

const ABOUT: &str = "Merge LoRA adapters into their base model; mix, convert and extract adapters";

const LONG_ABOUT: &str = "\
Merge a LoRA adapter into its base model: W + scale · B · A, computed in f32 and rounded once. Adapters of PEFT and of \
mlx-lm are read: plain, rank-stabilised, DoRA, with ranks and alphas by module, with modules that were trained whole.

A quantized base is dequantized, and the result is stored in the dtype it was quantized from, unless --form asks for a \
quantized result; with the form of the base, weights that the adapter does not touch keep their bytes, and so does \
every group of MLX's form whose values do not change. For the best result give the original weights as --base, also \
when the adapter was trained on their 4-bit form. All other tensors, tokenizer, chat template, generation settings and \
licence are copied. The weights go through memory a piece at a time. The result appears under its name only when it is \
complete; a run that was killed is gone on with, file by file. The path of the result is printed on standard output.

Several adapters are mixed in the space of weight differences: the sum (linear), with the smaller part of each cut off and \
signs settled by majority (ties), or with random elements dropped and the others enlarged (dare). PEFT's methods of \
these names work on A and B apart, which is another thing.

--to writes an adapter instead of a model: the same one in the other form, or with --rank the best approximation of that \
rank to the mixture. --extract writes the difference between a tuned model and the base as an adapter.

An adapter of kto-train knows its base. Another base is refused with 78, and so is a base that this adapter has been \
merged into before.";

const EXAMPLES: &str = "\
Examples:
  kto-merge --base Qwen2.5-7B-Instruct --adapter run/adapter -o merged
  kto-merge --base base-4bit --adapter run/adapter -o merged-4bit --form nf4 --verify
  kto-merge --base base --adapter run/adapter -o merged.gguf --form gguf --type Q4_K_M
  kto-merge --base base --adapter a --adapter b --weight 0.7 --weight 0.3 --method ties --density 0.3 -o merged
  kto-merge --adapter run/adapter --to mlx -o adapter-mlx
  kto-merge --base base --extract tuned --rank 32 -o adapter
  kto-merge --base base --adapter run/adapter -o merged --dry-run";

/// What the user asked for.
#[derive(Clone, Debug, Parser)]
#[command(name = "kto-merge", about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
#[command(group(ArgGroup::new("what").required(true).args(["adapters", "extract"])))]
pub struct Args {
    /// Model that the adapter was trained on: a directory, or org/name[@revision] on the hub; only --to does without
    #[arg(long, value_name = "DIR|NAME", required_unless_present = "to", help_heading = "Input")]
    pub base: Option<PathBuf>,
    /// Adapter directory of PEFT or mlx-lm, or a run directory of kto-train with its adapter; may be repeated
    #[arg(long = "adapter", value_name = "DIR", help_heading = "Input")]
    pub adapters: Vec<PathBuf>,
    /// Tuned model whose difference from the base becomes an adapter
    #[arg(
        long, value_name = "DIR", requires = "rank", requires = "base", help_heading = "Input",
        conflicts_with_all = ["scale", "layers", "weights", "method", "density"]
    )]
    pub extract: Option<PathBuf>,
    /// Merge even if an adapter was trained on another base or is in the base already
    #[arg(long, help_heading = "Input")]
    pub force_base: bool,

    /// Factor of the whole change
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = finite, allow_negative_numbers = true, help_heading = "Change")]
    pub scale: f64,
    /// Blocks whose modules are merged: 0-15,20 [default: all, and what lies outside the blocks]
    #[arg(long, value_name = "RANGES", help_heading = "Change")]
    pub layers: Option<String>,
    /// Weight of each adapter, in their order [default: 1]
    #[arg(long = "weight", value_name = "X", value_parser = finite, allow_negative_numbers = true, help_heading = "Change")]
    pub weights: Vec<f64>,
    /// How several adapters are mixed
    #[arg(long, value_name = "METHOD", default_value = "linear", help_heading = "Change")]
    pub method: Method,
    /// Share of elements that ties and dare keep [default: 0.5]
    #[arg(long, value_name = "X", value_parser = share, help_heading = "Change")]
    pub density: Option<f64>,
    /// Seed of dare and of --rank
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Change")]
    pub seed: u64,

    /// Directory to make; with --form gguf a file
    #[arg(short, long, visible_alias = "out", value_name = "OUT", help_heading = "Output")]
    pub output: PathBuf,
    /// Replace the output if it exists
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Dtype of all weights of the result; default: as stored
    #[arg(long, value_name = "DTYPE", conflicts_with_all = ["form", "to", "extract"], help_heading = "Output")]
    pub dtype: Option<FloatType>,
    /// A quantized result, as kto-quantize makes it
    #[arg(long, value_name = "FORM", conflicts_with_all = ["to", "extract"], help_heading = "Output")]
    pub form: Option<FormName>,
    /// Type of the GGUF file [default: Q4_K_M]
    #[arg(long, value_name = "TYPE", ignore_case = true, requires = "form", help_heading = "Output")]
    pub r#type: Option<GgufType>,
    /// Write an adapter instead of a model
    #[arg(long, value_name = "FORM", help_heading = "Output")]
    pub to: Option<AdapterForm>,
    /// Rank of the adapter that is written [default: as it is]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=65536), help_heading = "Output")]
    pub rank: Option<u32>,
    /// Largest weight file: 500MB, 2GiB [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["to", "extract"], help_heading = "Output")]
    pub max_shard_size: Option<u64>,
    /// Check the inputs and print what would be done
    #[arg(long, visible_alias = "plan", help_heading = "Output")]
    pub dry_run: bool,
    /// Then score a few prompts with the result and with base and adapter, and say how far the logits are apart
    #[arg(long, conflicts_with_all = ["to", "extract", "dry_run"], help_heading = "Output")]
    pub verify: bool,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Output")]
    pub threads: Option<u16>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// Share of elements that ties and dare keep, where none is given.
const DENSITY: f64 = 0.5;

impl Args {
    /// Refuses (2) what would have no effect.
    pub fn check(&self) -> Result<(), Error> {
        let refuse = |what: &str, hint: &str| Err(Error::usage(what).with_hint(hint));
        let gguf = self.form == Some(FormName::Gguf);
        if let Some(rank) = self.rank.filter(|_| self.to.is_none() && self.extract.is_none()) {
            return Err(Error::usage(format!("--rank {rank} needs --to or --extract")));
        }
        if self.density.is_some() && self.method == Method::Linear {
            return refuse("--density: the linear method keeps everything", "--method ties or --method dare");
        }
        if self.r#type.is_some() && !gguf {
            return refuse("--type is of a GGUF file", "--form gguf");
        }
        if self.max_shard_size.is_some() && gguf {
            return refuse("--max-shard-size: a GGUF file is one file", "leave it out");
        }
        if !gguf && self.output.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) {
            let name = escape(&self.output.display().to_string());
            return refuse(
                &format!("{name}: a directory would get this name"),
                "--form gguf makes such a file, of a model",
            );
        }
        Ok(())
    }

    /// Share of elements that ties and dare keep.
    pub fn density(&self) -> f64 {
        self.density.unwrap_or(DENSITY)
    }

    /// Largest weight file, in bytes.
    pub fn max_shard_size(&self) -> u64 {
        self.max_shard_size.unwrap_or(MAX_SHARD)
    }
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

/// A quantized result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormName {
    /// 4 bits of bitsandbytes, scales in 8 bits; with a 4-bit base its layers and blocks
    Nf4,
    /// Affine quantization of MLX: 4 bits in groups of 64; with an mlx base its layers, bits and groups
    Mlx,
    /// A file for llama.cpp
    Gguf,
}

/// A type of GGUF file, as llama.cpp names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum GgufType {
    #[value(name = "F32")]
    F32,
    #[value(name = "F16")]
    F16,
    #[value(name = "BF16")]
    Bf16,
    #[value(name = "Q8_0")]
    Q8_0,
    #[value(name = "Q6_K")]
    Q6K,
    #[value(name = "Q5_K_M")]
    Q5KM,
    #[value(name = "Q4_K_M")]
    Q4KM,
    #[value(name = "Q4_0")]
    Q4_0,
}

/// Whose form an adapter is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AdapterForm {
    /// adapter_model.safetensors
    Peft,
    /// adapters.safetensors of mlx-lm
    Mlx,
}

impl From<AdapterForm> for Ecosystem {
    fn from(value: AdapterForm) -> Self {
        match value {
            AdapterForm::Peft => Self::Peft,
            AdapterForm::Mlx => Self::Mlx,
        }
    }
}

/// How several adapters are mixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// The weighted sum
    Linear,
    /// The largest elements of each, of these the ones that agree with the sign of the sum, averaged
    Ties,
    /// Elements dropped at random, the others divided by the density, summed
    Dare,
    /// Dropped at random as dare, then signs as ties
    DareTies,
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| "must be a number".into())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x| *x > 0.0 && *x <= 1.0).ok_or_else(|| "must be above 0 and at most 1".into())
}
