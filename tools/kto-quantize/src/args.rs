//! The command line of kto-quantize, as the user gives it.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets")]

use clap::{Parser, ValueEnum};
use kto_cli::{Common, Error, Result, escape};
use kto_formats::shards::parse_size;
use safetensors::Dtype;
use std::path::{Path, PathBuf};

const ABOUT: &str = "Quantize a model directory for bitsandbytes, MLX or llama.cpp";

const LONG_ABOUT: &str = "\
Quantize a model directory, bit for bit as the library does that will read it: bitsandbytes (nf4, fp4, int8) for \
transformers and kto-train, mlx for mlx-lm and kto-train, gguf for llama.cpp and Ollama.

Of a decoder block every linear layer is quantized. Norms and biases stay as they are; of embedding and output head \
--embeddings and --head decide: bitsandbytes keeps both, mlx quantizes both, gguf has a rule for each type. Tokenizer, chat \
template, generation settings and licence are copied, or written into the GGUF file. --dequantize goes the other way, of a GGUF file \
too: config.json and tokenizer are made of what it says. That tokenizer encodes as the original does, but its file is another \
one: with tokens made by the original kto-train and kto-eval need --force-base.

The weights go through memory once, a piece at a time, on all cores. The result appears under its name only when it is \
complete; until then it grows as OUT.partial, and a run that was killed is gone on with, file by file, when it is given \
again and the model's files are the same. The path of the result is printed on standard output.";

const EXAMPLES: &str = "\
Examples:
  kto-quantize Qwen2.5-7B-Instruct -o qwen-4bit
  kto-quantize base -o base-4bit --skip model.layers.0,down_proj
  kto-quantize base -o base-4bit --plan
  kto-quantize base -o base-mlx --form mlx --recipe mixed_4_6 --report errors.jsonl
  kto-quantize base -o base-mlx --form mlx --bits 4 --override down_proj=6:32 --override lm_head=8
  kto-quantize base -o base.gguf --form gguf --type Q4_K_M
  kto-quantize base-4bit -o base-bf16 --dequantize --dtype bf16
  kto-quantize llama.Q4_K_M.gguf -o llama --dequantize
  kto-train --model \"$(kto-quantize base -o base-4bit)\" --data train.kto.arrow --out run";

/// What the user asked for.
#[derive(Clone, Debug, Parser)]
#[command(name = "kto-quantize", about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Model directory with config.json and safetensors weights, or org/name[@revision] on the hub; with --dequantize also a GGUF file
    #[arg(value_name = "DIR|NAME|FILE")]
    pub model: PathBuf,

    /// Directory to make; with --form gguf a file
    #[arg(short, long, value_name = "OUT", help_heading = "Output")]
    pub output: PathBuf,
    /// Replace OUT if it exists
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Largest weight file: 5GB, 500MB, 2GiB [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Output")]
    pub max_shard_size: Option<u64>,
    /// Check the input; print what would be done, sizes before and after, and the memory that kto-train would need
    #[arg(long, visible_alias = "plan", help_heading = "Output")]
    pub dry_run: bool,
    /// Write the error of every quantized tensor as JSON Lines (- is standard output, where the path of the result follows)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Output")]
    pub threads: Option<u16>,

    /// What to make [default: nf4]
    #[arg(long, value_name = "FORM", help_heading = "Quantization")]
    pub form: Option<FormName>,
    /// Undo a quantization: weights in any form that these tools read become floats
    #[arg(long, conflicts_with_all = ["form", "block_size", "no_double_quant", "bits", "group_size", "recipe",
        "r#type", "overrides", "embeddings", "head", "skip"], help_heading = "Quantization")]
    pub dequantize: bool,
    /// With --dequantize: dtype of all weights [default: what the quantization remembers; of a GGUF file that of its matrices, f16 where
    /// they are quantized]
    #[arg(long, value_name = "DTYPE", requires = "dequantize", help_heading = "Quantization")]
    pub dtype: Option<FloatName>,
    /// Modules to leave as they are: full names, beginnings or ends of names, with commas between
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Quantization")]
    pub skip: Vec<String>,
    /// The embedding
    #[arg(long, value_name = "WHAT", help_heading = "Quantization")]
    pub embeddings: Option<Treatment>,
    /// The output head, where it is not the embedding
    #[arg(long, value_name = "WHAT", help_heading = "Quantization")]
    pub head: Option<Treatment>,
    /// Other settings for the modules of a name, as --skip has names: BITS or BITS:GROUP (mlx), a type (gguf); may be repeated, the
    /// last that matches counts
    #[arg(long = "override", value_name = "NAME=SETTING", help_heading = "Quantization")]
    pub overrides: Vec<String>,

    /// Values that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096 [default: 64]
    #[arg(long, value_name = "N", value_parser = block_size, help_heading = "nf4 and fp4")]
    pub block_size: Option<usize>,
    /// Store the scales in f32, not in 8 bits: 0.37 bit more a weight
    #[arg(long, help_heading = "nf4 and fp4")]
    pub no_double_quant: bool,

    /// Bits of a code: 2, 3, 4, 5, 6 or 8 [default: 4]
    #[arg(long, value_name = "N", value_parser = bits, help_heading = "mlx")]
    pub bits: Option<usize>,
    /// Values that share scale and bias: 32, 64 or 128 [default: 64]
    #[arg(long, value_name = "N", value_parser = group_size, help_heading = "mlx")]
    pub group_size: Option<usize>,
    /// Two numbers of bits, as mlx-lm mixes them
    #[arg(long, value_name = "RECIPE", conflicts_with = "bits", help_heading = "mlx")]
    pub recipe: Option<Recipe>,

    /// Type of the file [default: Q4_K_M]
    #[arg(long, value_name = "TYPE", ignore_case = true, help_heading = "gguf")]
    pub r#type: Option<GgufType>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

impl Args {
    /// Returns what to make, when it is not floats.
    pub fn form(&self) -> FormName {
        self.form.unwrap_or(FormName::Nf4)
    }

    /// Fails (2) for options that would have no effect on what is made, and for a directory that would be called like a GGUF file.
    pub fn check(&self) -> Result<()> {
        let form = self.form();
        if self.dtype.is_some() && !self.dequantize {
            let error = Error::usage(format!("--dtype does not go with --form {}", form.name()));
            return Err(match form {
                FormName::Gguf => error.with_hint("--type F32, F16 or BF16"),
                _ => error.with_hint("--dequantize makes floats"),
            });
        }
        if !self.dequantize {
            self.check_form(form)?;
        }
        if let Some(report) = &self.report {
            // A directory is replaced when it appears, and what lies in it.
            let real = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
            let mut partial = self.output.clone().into_os_string();
            partial.push(".partial");
            if [self.output.as_path(), Path::new(&partial)]
                .iter()
                .any(|dir| real(report).starts_with(real(dir)))
            {
                let name = escape(&report.display().to_string());
                return Err(Error::usage(format!("--report {name}: inside the output")));
            }
        }
        let named = self.output.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if named && self.form != Some(FormName::Gguf) {
            let text =
                format!("{}: a directory would get this name", escape(&self.output.display().to_string()));
            return Err(Error::usage(text).with_hint(match self.dequantize {
                true => "a name without .gguf; --form gguf makes such a file",
                false => "--form gguf makes such a file",
            }));
        }
        Ok(())
    }

    fn check_form(&self, form: FormName) -> Result<()> {
        use FormName::{Fp4, Gguf, Int8, Mlx, Nf4};
        let given: [(bool, &str, &[FormName]); 8] = [
            (self.bits.is_some(), "--bits", &[Mlx]),
            (self.group_size.is_some(), "--group-size", &[Mlx]),
            (self.recipe.is_some(), "--recipe", &[Mlx]),
            (!self.overrides.is_empty(), "--override", &[Mlx, Gguf]),
            (self.r#type.is_some(), "--type", &[Gguf]),
            (self.block_size.is_some(), "--block-size", &[Nf4, Fp4]),
            (self.no_double_quant, "--no-double-quant", &[Nf4, Fp4]),
            (self.max_shard_size.is_some(), "--max-shard-size", &[Nf4, Fp4, Int8, Mlx]),
        ];
        if let Some((_, flag, _)) = given.iter().find(|(given, _, forms)| *given && !forms.contains(&form)) {
            return Err(Error::usage(format!("{flag} does not go with --form {}", form.name())));
        }
        let wishes = [("--embeddings", self.embeddings), ("--head", self.head)];
        let wish = wishes.iter().find(|(_, wish)| *wish == Some(Treatment::Quantize));
        match (form, self.r#type, wish) {
            (Nf4 | Fp4 | Int8, _, Some(("--embeddings", _))) => Err(Error::usage(
                "--embeddings quantize: transformers reads no quantized embedding of bitsandbytes",
            )),
            (Gguf, Some(kind @ (GgufType::F32 | GgufType::F16 | GgufType::Bf16)), Some((flag, _))) => {
                let kind = kind.to_possible_value().map(|value| value.get_name().to_string());
                let kind = kind.unwrap_or_default();
                Err(Error::usage(format!(
                    "{flag} quantize does not go with --type {kind}, which is of floats"
                )))
            }
            _ => Ok(()),
        }
    }
}

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormName {
    /// 4 bits of bitsandbytes, quantiles of the normal distribution
    Nf4,
    /// 4 bits of bitsandbytes, floats
    Fp4,
    /// 8 bits of bitsandbytes, LLM.int8()
    Int8,
    /// Affine quantization of MLX
    Mlx,
    /// A file for llama.cpp
    Gguf,
}

impl FormName {
    /// Returns its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Int8 => "int8",
            Self::Mlx => "mlx",
            Self::Gguf => "gguf",
        }
    }
}

/// A float dtype on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FloatName {
    /// 32 bits
    F32,
    /// bfloat16
    Bf16,
    /// 16 bits, largest value 65504
    F16,
}

impl From<FloatName> for Dtype {
    fn from(value: FloatName) -> Dtype {
        match value {
            FloatName::F32 => Dtype::F32,
            FloatName::Bf16 => Dtype::BF16,
            FloatName::F16 => Dtype::F16,
        }
    }
}

/// What becomes of embedding or head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Treatment {
    /// Stays as it is stored
    Keep,
    /// Quantized like a layer
    Quantize,
}

/// Mixtures of mlx-lm: the second number of bits for values and down projections of the first and last eighth of the blocks and of every
/// third between, and for the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Recipe {
    /// 2 and 6 bits
    #[value(name = "mixed_2_6")]
    Mixed2_6,
    /// 3 and 4 bits
    #[value(name = "mixed_3_4")]
    Mixed3_4,
    /// 3 and 6 bits
    #[value(name = "mixed_3_6")]
    Mixed3_6,
    /// 4 and 6 bits
    #[value(name = "mixed_4_6")]
    Mixed4_6,
}

impl Recipe {
    /// Returns the lower and the higher number of bits.
    pub fn bits(self) -> (usize, usize) {
        match self {
            Self::Mixed2_6 => (2, 6),
            Self::Mixed3_4 => (3, 4),
            Self::Mixed3_6 => (3, 6),
            Self::Mixed4_6 => (4, 6),
        }
    }
}

/// A type of GGUF file, as llama.cpp names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GgufType {
    /// 32-bit floats
    #[value(name = "F32")]
    F32,
    /// 16-bit floats
    #[value(name = "F16")]
    F16,
    /// bfloat16
    #[value(name = "BF16")]
    Bf16,
    /// 8.5 bits a weight
    #[value(name = "Q8_0")]
    Q8_0,
    /// 6.6 bits a weight
    #[value(name = "Q6_K")]
    Q6K,
    /// 5.7 bits a weight, some layers in Q6_K
    #[value(name = "Q5_K_M")]
    Q5KM,
    /// 4.8 bits a weight, some layers in Q6_K
    #[value(name = "Q4_K_M")]
    Q4KM,
    /// 4.5 bits a weight
    #[value(name = "Q4_0")]
    Q4_0,
}

fn one_of(text: &str, allowed: &[usize]) -> std::result::Result<usize, String> {
    let listed: Vec<String> = allowed.iter().map(usize::to_string).collect();
    let found = text.parse().ok().filter(|n| allowed.contains(n));
    found.ok_or_else(|| format!("must be one of {}", listed.join(", ")))
}

fn block_size(text: &str) -> std::result::Result<usize, String> {
    one_of(text, &[32, 64, 128, 256, 512, 1024, 2048, 4096])
}

/// Parses a number of bits of MLX.
pub fn bits(text: &str) -> std::result::Result<usize, String> {
    one_of(text, &[2, 3, 4, 5, 6, 8])
}

/// Parses a group size of MLX.
pub fn group_size(text: &str) -> std::result::Result<usize, String> {
    one_of(text, &[32, 64, 128])
}
