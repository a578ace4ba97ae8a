//! The command line of kto-convert, as the user gives it.

use clap::{Parser, ValueEnum};
use kto_cli::Common;
use std::path::PathBuf;

const ABOUT: &str = "Turn preference data into KTO records: one prompt, one completion, one label a line";

const LONG_ABOUT: &str = "\
Turn preference data into KTO records, one JSON object a line:
  {\"prompt\": …, \"completion\": …, \"label\": true|false, …}

Input is JSON Lines, a JSON array, CSV or TSV, plain or gzip. `[` as the first character makes it an array; the \
name (.csv, .tsv) makes it a table. The shape is decided row by row:
  prompt, completion, label   TRL unpaired, text or message lists; passes through
  prompt, chosen, rejected    TRL paired: two records, the chosen one first
  chosen, rejected            TRL implicit prompt: what both sides begin with
  messages, label             the last assistant turns are the completion
`kto_tag` is a label too. Other columns are kept; `tools` and `chat_template_kwargs` go on to the chat template. \
Rows with images, sound or video are refused.

Where a pair without a prompt column is split:
  HH-RLHF text    behind the last \"\\n\\nAssistant:\" that both sides share
  other text      behind --split-after TEXT; without it, at the last blank that both sides
                  share, never inside a word (a space goes to the completion, a line end
                  stays in the prompt)
  message lists   behind the last turn that both sides share, but before the last turn of
                  the shorter side

By default every row is written, or the run stops at it with 65 and its place: nothing is dropped unasked. Empty \
completions and pairs whose sides have different prompts stop the run. Equal sides (ties), duplicates, and \
completions with both labels are written, counted and named. A label must be a JSON true or false (in a table: the \
word); --label-map accepts other values. A run that fails ends what it has sent down a pipe with a \
{\"kto_error\": …} line, so that the next tool stops too.";

const EXAMPLES: &str = "\
Examples:
  kto-convert prefs.jsonl > kto.jsonl
  kto-convert hh.jsonl.gz --skip-empty -o kto.jsonl
  kto-convert kto_demo.json --order shuffle --seed 7 -o kto.jsonl --report report.json
  kto-convert ratings.csv --map completion=response,label=rating --label-map 5=true,1=false
  kto-convert prefs.jsonl --order trl | head -3
  gzip -dc hh.jsonl.gz | kto-convert --on-error skip > kto.jsonl";

/// What the user asked for.
#[derive(Clone, Debug, Parser)]
#[command(name = "kto-convert", about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Files to read, in order; none or `-` is standard input
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,

    /// Write to FILE, which appears whole or not at all, instead of standard output
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Order of the records
    #[arg(long, value_name = "ORDER", default_value = "interleave", help_heading = "Output")]
    pub order: Order,
    /// Seed of --order shuffle
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Output")]
    pub seed: u64,
    /// Leave out every column that kto-tokenize does not need
    #[arg(long, help_heading = "Output")]
    pub drop_extra: bool,
    /// Also write the summary as JSON to FILE; `-` is standard output, with -o
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,

    /// Form of the input, when neither name nor first character tell
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

    /// What to do with a row that cannot be used: stop with 65, or count it and go on
    #[arg(long, value_name = "ACTION", default_value = "fail", help_heading = "Rows")]
    pub on_error: OnError,
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
    /// Do not look for duplicates (saves about 30 bytes of memory a record)
    #[arg(long, help_heading = "Rows")]
    pub no_duplicate_check: bool,
    /// Do not fail when there is nothing to write
    #[arg(long, help_heading = "Rows")]
    pub allow_empty: bool,

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
    /// A JSON array of objects
    Json,
    /// One JSON object a line
    Jsonl,
    /// Comma-separated, with a header row
    Csv,
    /// Tab-separated, with a header row
    Tsv,
}

/// What becomes of a row that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// Stop with 65 and the row's place
    Fail,
    /// Count it by reason, name the first five, go on
    Skip,
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
