//! The command line of kto-convert, as the user gives it.

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets")]

use clap::{Parser, ValueEnum};
use kto_cli::Common;
use std::path::PathBuf;

const ABOUT: &str = "Turn preference data into KTO records: one prompt, one completion, one label a line";

const LONG_ABOUT: &str = "\
Turn preference data into KTO records, one JSON object a line:
  {\"prompt\": …, \"completion\": …, \"label\": true|false, …}

Input is JSON Lines, a JSON array, JSON values one behind the other, CSV, TSV, Parquet or Arrow (stream or file), each plain, \
gzip or Zstandard, told by the first bytes; a table of text is told by its name (.csv, .tsv). A directory stands for the data files \
in it, in the order of their names, as `datasets` saves or downloads them.

The shape is decided row by row, by the row's columns; --explain shows how, --from NAME fixes it:
  kto               prompt, completion, label (TRL unpaired, kto-mix)
  paired            prompt, chosen, rejected (TRL paired, UltraFeedback binarized)
  implicit          chosen, rejected: what both sides begin with is the prompt
  hh-rlhf           the same as text with \"\\n\\nHuman:\" and \"\\n\\nAssistant:\"
  messages          messages and label, kto_tag, feedback, thumb, rating or score
  sharegpt          conversations (from, value) and such a label; sharegpt-pair: with chosen, rejected
  swift, openai     messages, rejected_response; input, preferred_output, non_preferred_output
  question-pair     system, question or instruction, input; chosen, rejected (Orca, LLaMA-Factory)
  question-answer   the same with one answer (output, response, …) and a label or rating (Alpaca, axolotl)
  ultrafeedback, distilabel   several rated answers
  alpacaeval, arena, arena-table, shp, stack-exchange   votes and scores
  llamafactory-v1, oasst, openwebui, langfuse, langsmith
Text stays text in TRL's forms (kto, paired, implicit) and becomes messages elsewhere; --chat makes messages of all. \
Other columns are kept; `tools` and `chat_template_kwargs` go on to the chat template. Rows with images, sound or video are refused.

Where a pair without a prompt column is split:
  HH-RLHF text    behind the last \"\\n\\nAssistant:\" that both sides share
  other text      behind --split-after TEXT; without it, at the last blank that both sides
                  share, never inside a word (a space goes to the completion, a line end
                  stays in the prompt)
  message lists   behind the last turn that both sides share, but before the last turn of
                  the shorter side

By default every row is written, or the run stops at it with 65 and its place: nothing is dropped unasked but ties, ratings in the \
middle and rows that nobody rated, which are counted. Empty completions and pairs whose sides have different prompts stop \
the run. Equal sides, duplicates, and completions with both labels are written, counted and named. `label` and `kto_tag` \
must be a JSON true or false (in a table: the word); --label-map accepts other values, --desirable and --undesirable \
take ratings. A run that fails ends what it has sent down a pipe with a {\"kto_error\": …} line, so that the next tool stops too.";

const EXAMPLES: &str = "\
Examples:
  kto-convert prefs.jsonl > kto.jsonl
  kto-convert hh.jsonl.gz --skip-empty -o kto.jsonl
  kto-convert kto_demo.json --order shuffle --seed 7 -o kto.jsonl --stats stats.json
  kto-convert ratings.csv --desirable '>=4' --undesirable '<=2' --chat -o kto.jsonl
  kto-convert prefs.jsonl --dedup near --balance down --pii redact -o kto.jsonl
  kto-convert prefs.jsonl --order trl | head -3
  gzip -dc hh.jsonl.gz | kto-convert --on-error skip > kto.jsonl";

/// What the user asked for.
#[derive(Clone, Debug, Parser)]
#[command(name = "kto-convert", about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Files or directories to read, in order; none or `-` is standard input
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,

    /// Write to FILE, which appears whole or not at all, instead of standard output
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// What to write
    #[arg(long, value_name = "FORM", default_value = "kto", help_heading = "Output")]
    pub to: Form,
    /// File format [default: by the name of -o, else jsonl]
    #[arg(long, value_name = "FORMAT", help_heading = "Output")]
    pub out_format: Option<OutFormat>,
    /// Write NAME.jsonl files into the directory -o, by a hash of the prompt: train=0.9,valid=0.05,test=0.05
    #[arg(long, value_name = "NAME=SHARE,…", value_delimiter = ',', help_heading = "Output")]
    pub split: Vec<String>,
    /// Replace the directory -o, if it exists
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Add the columns _src and _line, which say where a record came from
    #[arg(long, help_heading = "Output")]
    pub provenance: bool,
    /// Order of the records
    #[arg(long, value_name = "ORDER", default_value = "interleave", help_heading = "Output")]
    pub order: Order,
    /// Seed of --order shuffle, --balance and --split
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Output")]
    pub seed: u64,
    /// Leave out every column that kto-tokenize does not need
    #[arg(long, help_heading = "Output")]
    pub drop_extra: bool,
    /// Also write the summary as JSON to FILE; `-` is standard output, with -o
    #[arg(long, visible_alias = "stats", value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,

    /// Shape of all rows, instead of the shape that each row's columns tell
    #[arg(long, value_name = "SHAPE", default_value = "auto", help_heading = "Input")]
    pub from: String,
    /// Show for each shape the first row of it, its columns, and what becomes of them
    #[arg(long, help_heading = "Input")]
    pub explain: bool,
    /// Form of the input, when neither name nor first bytes tell
    #[arg(long, value_name = "FORMAT", help_heading = "Input")]
    pub in_format: Option<Format>,
    /// Read a field from another column: completion=response,label=rating
    #[arg(long, value_name = "FIELD=COLUMN,…", value_delimiter = ',', help_heading = "Input")]
    pub map: Vec<String>,
    /// Column that holds the label, instead of label or kto_tag
    #[arg(long, value_name = "COLUMN", help_heading = "Input")]
    pub label_field: Option<String>,
    /// Label of rows that have none
    #[arg(long, value_name = "BOOL", help_heading = "Input")]
    pub label: Option<bool>,
    /// Values that mean true and false: yes=true,no=false
    #[arg(long, value_name = "VALUE=BOOL,…", value_delimiter = ',', help_heading = "Input")]
    pub label_map: Vec<String>,
    /// Ratings that make a completion desirable: '>=4', '>0', '4..5', '=good', several with commas
    #[arg(long, value_name = "CONDITION", allow_hyphen_values = true, help_heading = "Input")]
    pub desirable: Option<String>,
    /// Ratings that make it undesirable; what neither takes is left out and counted
    #[arg(long, value_name = "CONDITION", allow_hyphen_values = true, help_heading = "Input")]
    pub undesirable: Option<String>,
    /// The score to use of a log that has several
    #[arg(long, value_name = "NAME", help_heading = "Input")]
    pub score: Option<String>,
    /// Leave out scored pairs whose scores differ by less
    #[arg(long, value_name = "X", help_heading = "Input")]
    pub min_margin: Option<f64>,
    /// Leave out SHP pairs whose score_ratio is less
    #[arg(long, value_name = "X", help_heading = "Input")]
    pub min_ratio: Option<f64>,
    /// A vote that calls both answers bad: leave it out, or write two undesirable completions
    #[arg(long, value_name = "ACTION", default_value = "skip", help_heading = "Input")]
    pub both_bad: BothBad,
    /// Make messages of text prompts and completions
    #[arg(long, help_heading = "Input")]
    pub chat: bool,
    /// Remove blanks around texts
    #[arg(long, help_heading = "Input")]
    pub trim: bool,
    /// What HH-RLHF dialogues become
    #[arg(long, value_name = "FORM", default_value = "chat", help_heading = "Input")]
    pub dialogues: Dialogues,
    /// Text that ends the prompt of a chosen/rejected pair of texts, such as '### Response:'
    #[arg(long, value_name = "TEXT", help_heading = "Input")]
    pub split_after: Option<String>,
    /// Between the cells of a table: one character, or `tab`
    #[arg(long, value_name = "CHAR", help_heading = "Input")]
    pub delimiter: Option<String>,
    /// Take `"` in a table as ordinary text
    #[arg(long, help_heading = "Input")]
    pub no_quotes: bool,
    /// Longest line, array element or table row
    #[arg(long, value_name = "SIZE", default_value = "64MiB", help_heading = "Input")]
    pub max_line: String,
    /// Replace invalid UTF-8 and lone surrogates by U+FFFD, and count them
    #[arg(long, help_heading = "Input")]
    pub lossy: bool,

    /// What to do with a row that cannot be used: stop with 65, skip and count it, or
    /// quarantine=FILE: write it with the reason to FILE, and count it
    #[arg(long, value_name = "ACTION", default_value = "stop", help_heading = "Rows")]
    pub on_error: String,
    /// What to do with an empty or blank completion; `skip` keeps the other side of a pair
    #[arg(long, value_name = "ACTION", default_value = "fail", help_heading = "Rows")]
    pub empty: Policy,
    /// The same as --empty skip
    #[arg(long, conflicts_with = "empty", help_heading = "Rows")]
    pub skip_empty: bool,
    /// What to do with a pair whose sides are equal
    #[arg(long, value_name = "ACTION", default_value = "keep", help_heading = "Rows")]
    pub ties: Policy,
    /// What to do with a pair whose sides have different prompts; `keep` gives each side its own
    #[arg(long, value_name = "ACTION", default_value = "fail", help_heading = "Rows")]
    pub prompts_differ: Policy,
    /// Leave out records seen before: the same, or nearly the same, prompt and completion
    #[arg(long, value_name = "WHICH", default_value = "none", help_heading = "Rows")]
    pub dedup: Dedup,
    /// Share of common word sequences from which completions are nearly the same
    #[arg(long, value_name = "X", default_value_t = 0.8, help_heading = "Rows")]
    pub near: f64,
    /// What to do with a completion that has both labels: write both records, or neither
    #[arg(long, value_name = "ACTION", default_value = "keep", help_heading = "Rows")]
    pub conflicts: Conflicts,
    /// Make both labels equally frequent: leave out records of the frequent one, or repeat those of the rare one
    #[arg(long, value_name = "HOW", default_value = "none", help_heading = "Rows")]
    pub balance: Balance,
    /// Leave out records whose completion has fewer characters
    #[arg(long, value_name = "N", help_heading = "Rows")]
    pub min_chars: Option<usize>,
    /// Leave out records whose completion has more characters
    #[arg(long, value_name = "N", help_heading = "Rows")]
    pub max_chars: Option<usize>,
    /// Leave out records whose prompt has more characters
    #[arg(long, value_name = "N", help_heading = "Rows")]
    pub max_prompt_chars: Option<usize>,
    /// Leave out dialogues with a turn of this role: system, tool, …
    #[arg(long, value_name = "ROLE,…", value_delimiter = ',', help_heading = "Rows")]
    pub drop_role: Vec<String>,
    /// Keep only records in which prompt or completion match
    #[arg(long, value_name = "REGEX", help_heading = "Rows")]
    pub keep_match: Option<String>,
    /// Leave out records in which prompt or completion match
    #[arg(long, value_name = "REGEX", help_heading = "Rows")]
    pub drop_match: Option<String>,
    /// Personal data (e-mail, phone, IBAN, card, IP address, key): count it, replace it by its kind, or leave such records out
    #[arg(long, value_name = "ACTION", default_value = "off", help_heading = "Rows")]
    pub pii: Pii,
    /// Do not look for duplicates
    #[arg(long, help_heading = "Rows")]
    pub no_duplicate_check: bool,
    /// Do not fail when there is nothing to write
    #[arg(long, help_heading = "Rows")]
    pub allow_empty: bool,

    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Work")]
    pub threads: Option<u16>,
    /// Memory for what needs all records at once (duplicates, shuffling, balance); more goes to a temporary file
    #[arg(long, value_name = "SIZE", default_value = "256MiB", help_heading = "Work")]
    pub memory: String,
    /// Convert the I-th of N parts of the inputs; the outputs of all parts in order are the whole output
    #[arg(long, value_name = "I/N", help_heading = "Work")]
    pub shard: Option<String>,

    /// Flags of all tools
    #[command(flatten)]
    pub common: Common,
}

/// The order in which records are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// As the rows come, chosen before rejected, so that completions of one prompt are neighbours
    Interleave,
    /// All records in a random order of --seed (held in memory)
    Shuffle,
    /// As TRL unpairs: of every 1000 rows, all chosen, then all rejected
    Trl,
}

/// The form of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A JSON array of objects, or objects one behind the other
    Json,
    /// One JSON object a line
    Jsonl,
    /// Comma-separated, with a header row
    Csv,
    /// Tab-separated, with a header row
    Tsv,
    /// A Parquet file
    Parquet,
    /// An Arrow IPC stream or file
    Arrow,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// Records: prompt, completion, label
    Kto,
    /// Pairs: prompt, chosen, rejected; what has no partner in its row is left out and counted
    Paired,
    /// Desirable prompt and completion as one text
    SftText,
    /// Desirable dialogues as messages
    SftChat,
    /// A directory with train, valid and test.jsonl of desirable dialogues or texts for mlx-lm
    Mlx,
}

/// The file format of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutFormat {
    /// One JSON object a line
    Jsonl,
    /// Parquet with Zstandard
    Parquet,
}

/// What becomes of a vote that calls both answers bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BothBad {
    /// Leave it out and count it
    Skip,
    /// Two undesirable completions
    Undesirable,
}

/// What HH-RLHF dialogues become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dialogues {
    /// Messages of user and assistant
    Chat,
    /// Text as it is, as in TRL
    Text,
}

/// Which repeated records are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dedup {
    /// None, but they are counted
    None,
    /// The same prompt, completion and label
    Exact,
    /// The same, and completions of one label that are nearly the same (MinHash)
    Near,
}

/// What becomes of a completion with both labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Conflicts {
    /// Write all of its records and count them
    Keep,
    /// Write none of them
    Drop,
}

/// How the labels are made equally frequent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Balance {
    /// Not at all
    None,
    /// Leave out records of the more frequent label
    Down,
    /// Repeat records of the less frequent label
    Up,
}

/// What becomes of personal data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pii {
    /// It is not looked for
    Off,
    /// Count it and name the first records
    Report,
    /// Replace it by its kind, such as [EMAIL]
    Redact,
    /// Leave such records out
    Drop,
}

/// What becomes of a row that can be used but is odd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Treat it as a row that cannot be used
    Fail,
    /// Leave it out and count it
    Skip,
    /// Write it and count it
    Keep,
}
