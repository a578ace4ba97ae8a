//! The command line of kto-train. Flag names are stable.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets")]

use crate::{
    adapter::{alpha_pattern, layers, rank_pattern},
    cadence::Every,
    resume::Resume,
};
use clap::{
    Parser, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use kto_cli::{
    Common,
    lock::Wait,
    number::{Size, duration, finite, not_negative, positive, size},
};
use kto_kernels::Dense;
use kto_model::devices::Choice;
use std::{path::PathBuf, time::Duration};

/// Train a LoRA adapter on a language model with KTO
///
/// Reads a model directory (safetensors: dense, bitsandbytes NF4 or int8, MLX) and a token file from kto-tokenize, and writes a run
/// directory: adapter/ (PEFT), metrics.jsonl and timing.jsonl (one line a step), run.json (the resolved plan), checkpoints/, and the cached reference
/// log-probabilities; with --eval-data also eval.jsonl and best/. Prints the directory's path, unless the run is not finished.
/// All numbers are f32; results are the same bits at any --threads and after any interruption, as long
/// as the memory plan computes as many rows together.
#[derive(Parser, Clone, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Model directory with config.json and safetensors (llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3, stablelm), or org/name[@revision] on the hub
    #[arg(
        long,
        value_name = "DIR|NAME",
        alias = "model-name-or-path",
        required_unless_present = "check_device",
        default_value_if("check_device", "true", "-"),
        help_heading = "Input"
    )]
    pub model: PathBuf,
    /// Where `model` was found.
    #[arg(skip)]
    pub model_dir: PathBuf,

    /// Token file (.kto.arrow); standard input is copied into the run directory, and --resume reads that copy
    #[arg(long, value_name = "FILE", default_value = "-", help_heading = "Input")]
    pub data: PathBuf,

    /// Run directory to create
    #[arg(
        long,
        short,
        value_name = "DIR",
        alias = "output-dir",
        required_unless_present = "check_device",
        default_value_if("check_device", "true", "-"),
        help_heading = "Output"
    )]
    pub out: PathBuf,

    /// Replace the run in --out, finished or not
    #[arg(long, help_heading = "Output")]
    pub force: bool,

    /// Train on although tokens or adapter were made with another tokenizer or base
    #[arg(long, help_heading = "Input")]
    pub force_base: bool,

    /// Start from this adapter (a directory of PEFT or mlx-lm, a run or a checkpoint of kto-train) instead of a fresh one
    #[arg(long, value_name = "DIR", help_heading = "Adapter")]
    pub init_adapter: Option<PathBuf>,

    /// What rewards are measured against
    #[arg(long, value_name = "WHAT", default_value = "base", help_heading = "Adapter")]
    pub reference: ReferenceKind,

    /// Rank of a fresh adapter [default: 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub lora_r: Option<u32>,

    /// Alpha of a fresh adapter; the scale is alpha / rank [default: 16]
    #[arg(long, value_name = "X", value_parser = positive, conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub lora_alpha: Option<f64>,

    /// Dropout on the adapter's input; a prompt is then computed anew for each completion, not once for all
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = probability, help_heading = "Adapter")]
    pub lora_dropout: f64,

    /// Adapted layers of a fresh adapter: all-linear, a comma-separated list such as q_proj,v_proj, or a regular expression for whole
    /// paths [default: all-linear]
    #[arg(
        long,
        value_name = "LIST|REGEX",
        alias = "lora-target-modules",
        conflicts_with = "init_adapter",
        help_heading = "Adapter"
    )]
    pub target_modules: Option<String>,

    /// Layers that are not adapted after all, in the same form
    #[arg(long, value_name = "LIST|REGEX", conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub exclude_modules: Option<String>,

    /// Adapted blocks, from 0 on: 0,3 or 8-15 [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = layers, conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub layers_to_transform: Vec<Vec<u64>>,

    /// Another rank for the modules whose names end with this, or match this regular expression: down_proj=32
    #[arg(long, value_name = "PATTERN=N", value_parser = rank_pattern, conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub rank_pattern: Vec<(String, u32)>,

    /// Another alpha, in the same form
    #[arg(long, value_name = "PATTERN=X", value_parser = alpha_pattern, conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub alpha_pattern: Vec<(String, f64)>,

    /// Scale by alpha / √rank instead of alpha / rank
    #[arg(long, conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub use_rslora: bool,

    /// Train the length of each row of an adapted weight too (DoRA)
    #[arg(long, conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub use_dora: bool,

    /// Modules that are trained whole beside the matrices, by the ends of their names: embed_tokens,lm_head
    ///
    /// As in PEFT `norm` names every norm, and a head that is the embedding becomes a matrix of its own. Their weights begin as the base's, widened
    /// where it is quantized, and take 16 bytes a parameter (10 with --optimizer adamw-8bit). On the processor only.
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        alias = "lora-modules-to-save",
        conflicts_with = "init_adapter",
        help_heading = "Adapter"
    )]
    pub modules_to_save: Vec<String>,

    /// Biases of the base that are trained too [default: none]
    ///
    /// Rewards are measured against the base as it was, its own biases included; TRL's reference moves with trained biases.
    #[arg(long, value_name = "WHICH", conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub bias: Option<BiasKind>,

    /// What the matrices of a fresh adapter begin with [default: kaiming]
    #[arg(long, value_name = "NAME", conflicts_with = "init_adapter", help_heading = "Adapter")]
    pub init_lora_weights: Option<InitKind>,

    /// Loss
    #[arg(long, value_name = "NAME", default_value = "kto", alias = "loss-type", help_heading = "Loss")]
    pub loss: LossKind,

    /// Strength of the pull towards the reference
    #[arg(long, value_name = "X", default_value_t = 0.1, value_parser = positive, help_heading = "Loss")]
    pub beta: f64,

    /// Weight of rows with label true
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = not_negative, help_heading = "Loss")]
    pub desirable_weight: f64,

    /// Weight of rows with label false
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = not_negative, help_heading = "Loss")]
    pub undesirable_weight: f64,

    /// Peak learning rate
    #[arg(long, value_name = "X", default_value_t = 5e-6, value_parser = not_negative, alias = "learning-rate", help_heading = "Optimizer")]
    pub lr: f64,

    /// Learning-rate schedule
    #[arg(
        long,
        value_name = "NAME",
        default_value = "linear",
        alias = "lr-scheduler-type",
        help_heading = "Optimizer"
    )]
    pub schedule: ScheduleKind,

    /// Steps over which the learning rate rises from 0
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Optimizer")]
    pub warmup_steps: u64,

    /// The same as a share of all steps, when --warmup-steps is 0
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = probability, help_heading = "Optimizer")]
    pub warmup_ratio: f64,

    /// Optimizer
    #[arg(long, value_name = "NAME", default_value = "adamw", alias = "optim", help_heading = "Optimizer")]
    pub optimizer: OptimizerKind,

    /// Decay of AdamW's first moment
    #[arg(long, value_name = "X", default_value_t = 0.9, value_parser = probability, help_heading = "Optimizer")]
    pub adam_beta1: f64,

    /// Decay of AdamW's second moment
    #[arg(long, value_name = "X", default_value_t = 0.999, value_parser = probability, help_heading = "Optimizer")]
    pub adam_beta2: f64,

    /// Added to AdamW's denominator
    #[arg(long, value_name = "X", default_value_t = 1e-8, value_parser = epsilon, help_heading = "Optimizer")]
    pub adam_epsilon: f64,

    /// Decoupled weight decay of AdamW
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = not_negative, help_heading = "Optimizer")]
    pub weight_decay: f64,

    /// Largest norm of a step's gradient; 0 is no limit
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = not_negative, help_heading = "Optimizer")]
    pub max_grad_norm: f64,

    /// Passes over the data (may be a fraction)
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = positive, alias = "num-train-epochs", help_heading = "Optimizer")]
    pub epochs: f64,

    /// Number of steps, instead of --epochs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Optimizer")]
    pub max_steps: Option<u64>,

    /// Rows per optimizer step
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Optimizer")]
    pub batch: u32,

    /// Rows per KL block with --preset trl; must divide --batch [default: --batch]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), alias = "per-device-train-batch-size", help_heading = "Optimizer")]
    pub micro_batch: Option<u32>,

    /// trl: data order, KL pairs and averages of TRL 1.16, step by step
    #[arg(long, value_name = "NAME", help_heading = "Optimizer")]
    pub preset: Option<Preset>,

    /// Seed of data order, KL partners, fresh adapter and dropout
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Optimizer")]
    pub seed: u64,

    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256), help_heading = "Run")]
    pub threads: Option<u32>,

    /// Where to compute: auto (an NVIDIA GPU if this program was built for them and there is one), cpu, cuda, cuda:N
    #[arg(long, value_name = "WHERE", default_value = "auto", value_parser = Choice::parse, help_heading = "Run")]
    pub device: Choice,

    /// Element type of activations on a GPU [default: bf16, or f16 on cards without it]; the processor computes in f32
    #[arg(long, value_name = "TYPE", help_heading = "Run")]
    pub dtype: Option<ElementKind>,

    /// List the GPUs with their memory and versions, test their kernels, and exit
    #[arg(long, exclusive = true, help_heading = "Run")]
    pub check_device: bool,

    /// Most memory that the run may hold, weights included: 8GiB, 900MiB, 50% of what is available [default: 90%]
    ///
    /// On a GPU it is the device's memory, and a hard limit.
    ///
    /// With less, blocks compute their activations again, then packs get smaller, then weights are read from the file block by
    /// block; a run that still does not fit is refused (71) before it starts.
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Run")]
    pub memory: Option<Size>,

    /// Save a checkpoint every N steps, or so often: 90s, 10m, 2h (one is always saved on SIGINT and SIGTERM)
    #[arg(long, value_name = "N|TIME", value_parser = Every::parse, alias = "save-steps", help_heading = "Run")]
    pub checkpoint_every: Option<Every>,

    /// Keep the newest K checkpoints
    #[arg(long, value_name = "K", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..), alias = "save-total-limit", help_heading = "Run")]
    pub keep_last: u32,

    /// Keep for ever the checkpoints of steps that are multiples of N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Run")]
    pub keep_every: Option<u64>,

    /// Go on from a checkpoint: auto (the newest whole one; from the start when there is none), strict, or a directory
    ///
    /// auto passes over damaged checkpoints with a note. strict refuses (78) when there is none or the newest is damaged. A checkpoint
    /// directory, of this run or of another one with the same plan: the metrics are cut to it and later checkpoints are removed;
    /// another run's is copied into a new --out.
    #[arg(long, value_name = "auto|strict|DIR", num_args = 0..=1, default_missing_value = "auto", value_parser = OsStringValueParser::new().map(Resume::from), help_heading = "Run")]
    pub resume: Option<Resume>,

    /// Stop at the first step boundary after this time (90s, 10m, 2h), save, and exit 0: --resume goes on
    ///
    /// The exit code is 0 because a run that is paused as asked is a success, for cron as for Make; the path is printed on standard
    /// output only when the run is finished, and run.json says "paused".
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Run")]
    pub max_time: Option<Duration>,

    /// Queue when another process uses --out, for this time or without end, instead of exit 75
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "forever", value_parser = Wait::parse, help_heading = "Run")]
    pub wait: Option<Wait>,

    /// When loss or gradient is not finite: stop (65), or skip the step. The rows are listed in nonfinite.jsonl
    ///
    /// Either way nothing of the step gets into the adapter or the moments. stop saves a checkpoint of the step before; a run that
    /// stopped can be resumed with skip.
    #[arg(long, value_name = "WHAT", default_value = "stop", help_heading = "Run")]
    pub on_nonfinite: OnNonfinite,

    /// Held-out token file: its loss and rewards go to eval.jsonl, the adapter of the lowest loss to best/
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    pub eval_data: Option<PathBuf>,

    /// Evaluate every N steps, and after the last one [default: once an epoch]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "eval_data", alias = "eval-steps", help_heading = "Evaluation")]
    pub eval_every: Option<u64>,

    /// Stop after N evaluations in a row that did not lower eval_loss
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "eval_data", alias = "early-stopping-patience", help_heading = "Evaluation")]
    pub early_stop_patience: Option<u64>,

    /// Write the adapter of the best evaluation to adapter/, not the last one
    #[arg(long, requires = "eval_data", alias = "load-best-model-at-end", help_heading = "Evaluation")]
    pub load_best: bool,

    /// Check everything, print the plan with its memory, train nothing
    #[arg(long, help_heading = "Run")]
    pub dry_run: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// What the reference log-probabilities come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReferenceKind {
    /// The base model without an adapter
    Base,
    /// The base model with --init-adapter as given
    InitAdapter,
}

/// Names of initialisations. None of them changes the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InitKind {
    /// A uniform in ±1/√in, B zero
    #[value(alias = "true")]
    Kaiming,
    /// A normal with deviation 1/rank, B zero
    Gaussian,
    /// A and B orthogonal to each other, neither of them zero
    Orthogonal,
}

impl InitKind {
    /// Returns what PEFT's settings say; nothing for its default.
    pub fn peft_name(self) -> Option<&'static str> {
        match self {
            Self::Kaiming => None,
            Self::Gaussian => Some("gaussian"),
            Self::Orthogonal => Some("orthogonal"),
        }
    }
}

/// Which biases are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BiasKind {
    /// None of them
    None,
    /// All of the model, those of norms too
    All,
    /// Those of the adapted layers
    #[value(alias = "lora_only")]
    LoraOnly,
}

impl BiasKind {
    /// Returns what PEFT's settings say; nothing for its default.
    pub fn peft_name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::All => Some("all"),
            Self::LoraOnly => Some("lora_only"),
        }
    }
}

/// Element types of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ElementKind {
    /// bfloat16
    Bf16,
    /// float16
    F16,
    /// float32
    F32,
}

impl From<ElementKind> for Dense {
    fn from(kind: ElementKind) -> Self {
        match kind {
            ElementKind::Bf16 => Self::Bf16,
            ElementKind::F16 => Self::F16,
            ElementKind::F32 => Self::F32,
        }
    }
}

/// Names of the losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LossKind {
    /// KTO (arXiv 2402.01306)
    Kto,
    /// TRL's apo_zero_unpaired: no KL term
    #[value(alias = "apo_zero_unpaired", alias = "apo-zero-unpaired")]
    ApoZero,
    /// Likelihood of the completions, labels ignored
    Sft,
}

/// Names of the optimizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizerKind {
    /// AdamW with f32 moments: 8 bytes a parameter
    #[value(alias = "adamw_torch", alias = "adamw_torch_fused")]
    Adamw,
    /// AdamW with block-wise 8-bit moments: 2.03 bytes a parameter; tensors below 4096 elements keep f32
    #[value(name = "adamw-8bit", alias = "adamw_8bit", alias = "adamw_bnb_8bit", alias = "paged_adamw_8bit")]
    Adamw8bit,
}

/// Names of the schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScheduleKind {
    /// Falls to 0 in a straight line
    Linear,
    /// Falls to 0 along half a cosine
    Cosine,
    /// Stays
    #[value(alias = "constant_with_warmup")]
    Constant,
}

/// What a step with a loss or gradient that is not finite leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnNonfinite {
    /// The run ends
    Stop,
    /// The step is counted and has no effect
    Skip,
}

/// Bundles of settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// TRL 1.16
    Trl,
}

/// An f32 of full precision: with less, a gradient of zero would become 0 / 0.
fn epsilon(text: &str) -> Result<f64, String> {
    let least = f64::from(f32::MIN_POSITIVE);
    finite(text).and_then(|x| if x >= least { Ok(x) } else { Err("must be at least 1.2e-38".into()) })
}

fn probability(text: &str) -> Result<f64, String> {
    finite(text).and_then(|x| {
        if (0.0..1.0).contains(&x) { Ok(x) } else { Err("must be from 0 up to, not including, 1".into()) }
    })
}

const EXAMPLES: &str = "\
Examples:
  Train on preferences in one pipe:
    kto-convert prefs.jsonl | kto-tokenize --model MODEL | kto-train --model MODEL --out run
  See the plan first:
    kto-train --model MODEL --data prefs.kto.arrow --out run --dry-run
  The numbers of TRL's KTOTrainer:
    kto-train --model MODEL --data prefs.kto.arrow --out run --preset trl --batch 8 --lr 1e-6 --epochs 3
  Go on after an interruption:
    kto-train --model MODEL --data prefs.kto.arrow --out run --resume
  Watch a held-out file, stop when it gets no better, keep the best:
    kto-train --model MODEL --data train.kto.arrow --eval-data heldout.kto.arrow --out run --epochs 5 --early-stop-patience 2 --load-best
  An hour each night until it is finished:
    kto-train -q --model MODEL --data prefs.kto.arrow --out run --checkpoint-every 10m --max-time 1h --resume";
