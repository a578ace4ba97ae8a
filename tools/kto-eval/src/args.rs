//! The command line of kto-eval. Flag names are stable and mean what they mean in kto-train.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets")]

use clap::{Args as Group, Parser, Subcommand, ValueEnum};
use kto_cli::{
    Common,
    number::{finite, not_negative, positive},
};
use std::path::PathBuf;

/// Score preferences and generate answers with a language model
#[derive(Parser, Clone, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Command,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// The two jobs.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Log-probabilities, rewards and KL of a token file's rows
    ///
    /// Reads a token file of kto-tokenize and writes one JSON object a row: row (from 1), label, tokens (of the
    /// completion), logps, reference_logps, reward = beta · (logps − reference_logps); and for the KL estimate
    /// kl_from, the row whose completion is scored after this row's prompt, with kl_logps, kl_reference_logps and
    /// kl, their difference. A summary goes to standard error, or as JSON to --summary.
    ///
    /// An adapter in a run directory of kto-train is scored with that run's loss, beta, weights, seed and reference
    /// (run.json), unless flags say otherwise; so the run's own --eval-data gives the numbers of its eval.jsonl.
    #[command(after_long_help = SCORE_HELP)]
    Score(ScoreArgs),
    /// Answers to prompts
    ///
    /// Reads JSON Lines: "prompt" (text, or a list of messages), or "messages" (answers at their end are left out).
    /// Messages go through the model's chat template. Writes one JSON object a prompt: prompt, completion,
    /// finish ("stop" or "length"), tokens, then the other columns; a completion and label that came with the row
    /// are given_completion and given_label. A prompt that leaves the model no room for a token gets none: its completion
    /// is null (with --text an empty line) and finish "too_long". That is a warning; only when no prompt was answered it is 65.
    #[command(after_long_help = GENERATE_HELP)]
    Generate(GenerateArgs),
    /// What the Hugging Face cache holds
    ///
    /// Lists the models that `--model org/name` finds without the network: size on the disk, when a file was read
    /// last, how the weights are stored, and whether all of it is there. Weights as pickle and Python code, which these
    /// tools never load, are named. Reads headers only. The cache is that of HF_HUB_CACHE, HF_HOME or ~/.cache.
    #[command(after_long_help = MODELS_HELP)]
    Models(ModelsArgs),
}

/// `kto-eval models`.
#[derive(Group, Clone, Debug)]
pub struct ModelsArgs {
    /// One JSON object a model instead of a table: name, path, size, unused, partial (bytes), last_used,
    /// last_modified, form, complete, fault, pickle, remote_code, snapshots
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// Flags about the model.
#[derive(Group, Clone, Debug)]
pub struct ModelArgs {
    /// Model directory with config.json and safetensors (llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3, stablelm; dense, bitsandbytes nf4, fp4 or int8, MLX), or
    /// org/name[@revision] on the hub
    #[arg(long, value_name = "DIR|NAME", alias = "model-name-or-path", help_heading = "Model")]
    pub model: PathBuf,
    /// Adapter on it (a directory of PEFT or mlx-lm, a checkpoint of kto-train), or a run directory of kto-train with its adapter
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub adapter: Option<PathBuf>,
    /// Go on although tokens or adapter were made with another tokenizer or base
    #[arg(long, help_heading = "Model")]
    pub force_base: bool,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Model")]
    pub threads: Option<u32>,
}

/// Flags of `score`.
#[derive(Group, Clone, Debug)]
pub struct ScoreArgs {
    /// Token file (.kto.arrow); `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    pub file: PathBuf,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// What rewards are measured against: base (the model without adapter), another adapter, or another model
    /// [default: what the adapter's run had, else base]
    #[arg(long, value_name = "base|DIR|NAME", help_heading = "Model")]
    pub reference: Option<PathBuf>,

    /// Write to FILE, which appears whole or not at all, instead of standard output
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Write the summary as JSON to FILE; `-` prints it in place of the rows
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub summary: Option<PathBuf>,
    /// Write no rows
    #[arg(long, conflicts_with = "output", help_heading = "Output")]
    pub no_rows: bool,
    /// End with 1 when the summary is so: 'rewards/accuracies<0.9' (repeatable; < <= > >= == !=)
    ///
    /// The files of --output and --summary are then not written, so that no target of make is there after a failure;
    /// standard output and the summary on standard error are.
    #[arg(long, value_name = "KEY<NUMBER", help_heading = "Output")]
    pub fail_if: Vec<String>,

    /// Loss to report [default: that of the adapter's run, else kto]
    #[arg(long, value_name = "NAME", alias = "loss-type", help_heading = "Loss")]
    pub loss: Option<LossKind>,
    /// Strength of the pull towards the reference; the factor of rewards [default: that of the adapter's run, else 0.1]
    #[arg(long, value_name = "X", value_parser = positive, help_heading = "Loss")]
    pub beta: Option<f64>,
    /// Weight of rows with label true [default: that of the adapter's run, else 1]
    #[arg(long, value_name = "X", value_parser = not_negative, help_heading = "Loss")]
    pub desirable_weight: Option<f64>,
    /// Weight of rows with label false [default: that of the adapter's run, else 1]
    #[arg(long, value_name = "X", value_parser = not_negative, help_heading = "Loss")]
    pub undesirable_weight: Option<f64>,
    /// Seed of the KL partners [default: that of the adapter's run, else 42]
    #[arg(long, value_name = "N", help_heading = "Loss")]
    pub seed: Option<u64>,
    /// Skip the KL estimate, half of the work; the kto loss is then not reported
    #[arg(long, help_heading = "Loss")]
    pub no_kl: bool,
}

/// Flags of `generate`.
#[derive(Group, Clone, Debug)]
pub struct GenerateArgs {
    /// Files with prompts, in order; none or `-` is standard input
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Chat template to use: one of the model's by its name, or a file in place of them
    #[arg(long, value_name = "FILE|NAME", help_heading = "Model")]
    pub chat_template: Option<PathBuf>,

    /// Every line of the input is a prompt, and only the answers are printed
    #[arg(long, conflicts_with = "ids", help_heading = "Input")]
    pub text: bool,
    /// Rows hold "prompt_ids" and get "completion_ids"; no tokenizer is needed
    #[arg(long, conflicts_with = "chat", help_heading = "Input")]
    pub ids: bool,
    /// Take a prompt that is text as the message of a user
    #[arg(long, help_heading = "Input")]
    pub chat: bool,
    /// Control tokens in the prompts' text are control tokens, not text
    #[arg(long, help_heading = "Input")]
    pub allow_special: bool,

    /// Write to FILE, which appears whole or not at all, instead of standard output
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,

    /// Tokens of an answer, at most; less where the prompt leaves the model less room
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 24), help_heading = "Sampling")]
    pub max_new_tokens: u32,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = not_negative, help_heading = "Sampling")]
    pub temperature: f64,
    /// Draw from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share, help_heading = "Sampling")]
    pub top_p: f64,
    /// Seed of the draws; a row's draws depend on it and on the row's place in the input
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Sampling")]
    pub seed: u64,
    /// End an answer before this text (repeatable)
    #[arg(long, value_name = "TEXT", conflicts_with = "ids", help_heading = "Sampling")]
    pub stop: Vec<String>,
    /// Prompts answered together, each with its keys and values in memory; 1 answers each before the next is read
    ///
    /// Other batches add in another order: the last bits of the logits can differ, and with them rarely a token.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Sampling")]
    pub batch: u32,
}

/// Names of the losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LossKind {
    /// KTO (arXiv 2402.01306)
    Kto,
    /// TRL's apo_zero_unpaired: no KL term
    #[value(alias = "apo_zero_unpaired", alias = "apo-zero-unpaired")]
    ApoZero,
    /// Negative log-likelihood of the completions, labels ignored
    Sft,
}

fn share(text: &str) -> Result<f64, String> {
    finite(text)
        .and_then(|x| if x > 0.0 && x <= 1.0 { Ok(x) } else { Err("must be above 0, up to 1".into()) })
}

const EXAMPLES: &str = "\
Examples:
  Did training help? Held-out rows, base against adapter:
    kto-eval score --model MODEL --adapter run/adapter heldout.kto.arrow --summary -
  Ask a question:
    echo 'What is a heron?' | kto-eval generate --model MODEL --adapter run/adapter --text --chat";

const SCORE_HELP: &str = "\
Keys of the summary, for --summary and --fail-if, named as in kto-train's metrics (chosen: label true);
a key about no rows is absent:
  rows, tokens          of the completions
  count/chosen, count/rejected    rows of each label
  beta, loss
  kl_raw                mean over the rows of the log-ratio of policy and reference on a mismatched completion
  kl                    the same, but at least 0: what the kto loss subtracts
  rewards/chosen, rewards/rejected    means
  rewards/margins       their difference; or: margins
  rewards/accuracies    share of rows with a reward above 0 (label true) or below 0 (label false); or: accuracy
  pairs                 pairs of a chosen and a rejected completion of one prompt
  pairs/accuracies      share of them in which the chosen one has the higher reward; equal rewards are not right
  logps/chosen, logps/rejected, entropy (nats a token)
  perplexity, perplexity/chosen, perplexity/rejected, reference_perplexity
  non_finite            rows without a finite log-probability

Examples:
  kto-tokenize --model MODEL heldout.jsonl | kto-eval score --model MODEL > scores.jsonl
  kto-eval score --model MODEL --adapter run/adapter heldout.kto.arrow --fail-if 'accuracy<0.9'
  kto-eval score --model merged --reference MODEL heldout.kto.arrow --summary summary.json
  kto-eval score --model MODEL data.kto.arrow | jq -s 'sort_by(.logps / .tokens) | .[:9][].row'";

const MODELS_HELP: &str = "\
Examples:
  kto-eval models
  kto-eval models --json | jq -r 'select(.complete | not) | .name'";

const GENERATE_HELP: &str = "\
Examples:
  kto-eval generate --model MODEL prompts.jsonl > answers.jsonl
  echo 'Once upon a time' | kto-eval generate --model MODEL --text
  kto-eval generate --model MODEL --temperature 0.7 --top-p 0.9 --seed 7 prompts.jsonl
  kto-eval generate --model MODEL --adapter run/adapter heldout.jsonl | jq -r .completion";
