//! The command line of kto-tokenize, as the user gives it.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets")]

use clap::{Parser, ValueEnum};
use kto_cli::Common;
use std::path::PathBuf;

const ABOUT: &str = "Turn KTO records into a token file for kto-train and kto-eval";

const LONG_ABOUT: &str = "\
Turn KTO records (JSON Lines with prompt, completion, label) into a token file, an Arrow IPC stream with the columns \
prompt_ids, completion_ids, label and prompt_hash. kto-convert makes records of other shapes.

Tokens are those of TRL 1.16. Messages: the chat template renders the prompt with its generation prompt, and prompt + \
completion; both are encoded without adding BOS or EOS. Of the row's columns, tools and chat_template_kwargs reach \
the template. Text: prompt and prompt + completion are encoded with what the tokenizer puts around a text (BOS), \
after the EOS token was appended to a completion that does not end with it. The prompt's tokens are what both \
encodings begin with, the completion's are the rest.

Control tokens such as <|im_end|> in a message, a prompt or a completion stay text and are counted; in text rows the \
EOS token at the very end is meant. --allow-special encodes all of them as control tokens, as TRL does.

With --train-on last a row's completion is its last assistant turn; with all, every assistant turn of the \
conversation is a row with the record's label, and what comes before is its prompt. \
--continue-final-message renders a prompt that ends with the assistant's message as the beginning of the \
completion's; without it, as in TRL, the completion is a further message. --show 3 prints what will be trained.

Rows whose prompt reaches --max-length are dropped and counted. Longer rows are kept whole and counted as truncated: \
kto-train cuts them, because a KL pair joins a prompt with the whole completion of another row.";

const EXAMPLES: &str = "\
Examples:
  kto-tokenize --model qwen2.5 kto.jsonl -o kto.kto.arrow
  kto-convert prefs.jsonl | kto-tokenize --model qwen2.5 | kto-train --model qwen2.5 --data - --out run
  kto-tokenize --model qwen2.5 kto.jsonl --max-length 2048 --report report.json > kto.kto.arrow
  kto-tokenize --model base --chat-template chatml.jinja kto.jsonl -o kto.kto.arrow
  kto-tokenize --model qwen2.5 kto.jsonl --show 3
  kto-tokenize --model qwen2.5 --on-error skip day1.jsonl.gz day2.jsonl.gz -o both.kto.arrow";

/// What the user asked for.
#[derive(Clone, Debug, Parser)]
#[command(name = "kto-tokenize", about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Record files to read, in order, plain or gzip; none or `-` is standard input
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Model directory with tokenizer.json, or org/name[@revision] on the hub
    #[arg(short, long, value_name = "DIR|NAME")]
    pub model: PathBuf,

    /// Write to FILE, which appears whole or not at all, instead of standard output
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Also write the summary as JSON to FILE; `-` is standard output, with -o
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,

    /// Show the tokens of the first N rows on standard output, and write no token file
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..),
          conflicts_with_all = ["output", "report"], help_heading = "Output")]
    pub show: Option<u64>,

    /// Tokens of prompt + completion that training will keep
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=16_777_216),
          help_heading = "Tokens")]
    pub max_length: u32,
    /// Chat template to use: one of the model's by its name, or a file in place of them
    #[arg(long, value_name = "FILE|NAME", help_heading = "Tokens")]
    pub chat_template: Option<PathBuf>,
    /// What of a conversation is trained on: its completion as TRL does, or assistant turns only
    #[arg(long, value_name = "WHAT", default_value = "completion", help_heading = "Tokens")]
    pub train_on: TrainOn,
    /// Let a completion continue the assistant's message that its prompt ends with
    #[arg(long, help_heading = "Tokens")]
    pub continue_final_message: bool,
    /// End-of-sequence token of text rows, when the model names none
    #[arg(long, value_name = "TOKEN", help_heading = "Tokens")]
    pub eos: Option<String>,
    /// Encode control tokens in the rows' text as control tokens, as TRL does
    #[arg(long, help_heading = "Tokens")]
    pub allow_special: bool,
    /// Time that templates see (strftime_now), in seconds since 1970 [default: now]
    #[arg(
        long,
        value_name = "SECONDS",
        env = "SOURCE_DATE_EPOCH",
        allow_hyphen_values = true,
        help_heading = "Tokens"
    )]
    pub now: Option<i64>,

    /// What to do with a row that cannot be used: stop with 65, or count it and go on
    #[arg(long, value_name = "ACTION", default_value = "fail", help_heading = "Rows")]
    pub on_error: OnError,
    /// Accept that no row is left to write
    #[arg(long, help_heading = "Rows")]
    pub allow_empty: bool,
    /// Longest time one row may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..),
          help_heading = "Rows")]
    pub row_timeout: u32,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Rows")]
    pub threads: Option<u16>,

    /// Flags that every tool has.
    #[command(flatten)]
    pub common: Common,
}

/// What of a conversation is trained on. Text rows have one completion either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TrainOn {
    /// All messages of the completion, those of tools and users included, as TRL does
    Completion,
    /// The last assistant turn
    Last,
    /// Every assistant turn, also those in the prompt, each as a row of its own
    All,
}

/// What becomes of a row that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// Stop with 65 and the row's place
    Fail,
    /// Count it, name the first five, go on
    Skip,
}
