//! The checked form of the arguments: everything explicit, nothing left to parse.

mod parse;

use crate::{
    args::{
        Args, Balance, BothBad, Conflicts, Dedup, Dialogues, Form, Format, Order, OutFormat, Pii, Policy,
    },
    filters::Filters,
    labels::Labels,
    shapes::{self, Shape},
    thresholds::Thresholds,
};
use kto_cli::{Error, Result, input};
use kto_formats::{rows::ReadOptions, table::Dialect};
use parse::{delimiter, field_map, shard, size, splits};
use std::path::{Path, PathBuf};

pub use parse::Split;

/// What a run does.
#[derive(Clone)]
pub struct Plan {
    /// Inputs in order; `-` is standard input.
    pub inputs: Vec<PathBuf>,
    /// Where the records go; `None` is standard output.
    pub output: Option<PathBuf>,
    /// Where the JSON summary goes.
    pub report: Option<PathBuf>,
    /// Outputs that would get the bytes they have are left alone.
    pub if_changed: bool,
    /// An existing output directory is replaced.
    pub force: bool,
    /// The form of all inputs, or `None` to tell by name and first bytes.
    pub format: Option<Format>,
    /// Delimiter of tables; `None`: by format.
    pub delimiter: Option<u8>,
    /// False when `"` is an ordinary character of a table.
    pub quotes: bool,
    /// Caps and repair of the readers.
    pub read: ReadOptions,
    /// The shape of all rows; `None`: each row's own.
    pub from: Option<&'static Shape>,
    /// Show how the shapes were found.
    pub explain: bool,
    /// (field, column) pairs of `--map`.
    pub map: Vec<(String, String)>,
    /// How a label is found and read.
    pub labels: Labels,
    /// How shapes are taken apart.
    pub shapes: ShapeRules,
    /// Texts become messages.
    pub chat: bool,
    /// Blanks around texts are removed.
    pub trim: bool,
    /// What is written.
    pub to: Form,
    /// In which file format.
    pub out_format: OutFormat,
    /// Files of the output directory and their shares; empty: one output.
    pub splits: Vec<Split>,
    /// Add `_src` and `_line`.
    pub provenance: bool,
    /// Order of the records.
    pub order: Order,
    /// Seed of everything random.
    pub seed: u64,
    /// What becomes of rows.
    pub rows: RowRules,
    /// Which records are left out, by what is in them.
    pub filters: Filters,
    /// Threads that convert.
    pub threads: usize,
    /// Bytes for what needs all records at once.
    pub memory: usize,
    /// (part, parts), from 0.
    pub shard: Option<(u64, u64)>,
}

/// Choices about single shapes.
#[derive(Clone, Debug)]
pub struct ShapeRules {
    /// What ends the prompt of a text pair.
    pub split_after: Option<String>,
    /// HH-RLHF dialogues stay text.
    pub dialogue_as_text: bool,
    /// A vote against both gives two undesirable completions.
    pub both_bad: bool,
    /// The least difference of two scores.
    pub min_margin: Option<f64>,
    /// The least ratio of two scores.
    pub min_ratio: Option<f64>,
    /// The score of a log.
    pub score: Option<String>,
}

/// What becomes of bad, odd and repeated rows.
#[derive(Clone, Debug)]
pub struct RowRules {
    /// A row that cannot be used.
    pub on_error: OnError,
    /// A blank completion.
    pub empty: Policy,
    /// A pair with equal sides.
    pub ties: Policy,
    /// A pair whose sides have different prompts.
    pub prompts_differ: Policy,
    /// Look for duplicates and contradictions.
    pub duplicates: bool,
    /// Which repeated records are left out.
    pub dedup: Dedup,
    /// From which similarity completions are nearly the same.
    pub near: f64,
    /// Records that say good and bad of one completion.
    pub conflicts: Conflicts,
    /// How labels are made equally frequent.
    pub balance: Balance,
    /// Personal data.
    pub pii: Pii,
    /// Nothing to write is fine.
    pub allow_empty: bool,
    /// Write only what kto-tokenize needs.
    pub drop_extra: bool,
}

/// What becomes of a row that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The run stops with 65 and the row's place.
    Stop,
    /// It is counted by reason, the first five are named.
    Skip,
    /// The same, and it is written to a file with the reason.
    Quarantine(PathBuf),
}

impl Plan {
    /// Checks the arguments. Errors are usage errors (2).
    pub fn new(args: &Args) -> Result<Self> {
        let is_stdout = |path: &PathBuf| path.as_os_str() == "-" || path.as_os_str() == "/dev/stdout";
        if args.report.as_ref().is_some_and(is_stdout) && args.output.as_ref().is_none_or(is_stdout) {
            let error = Error::usage("--report - and the records would both go to standard output");
            return Err(error.with_hint("-o FILE takes the records"));
        }
        let plan = Self {
            inputs: input::or_stdin(&args.files)?,
            output: args.output.clone(),
            report: args.report.clone(),
            if_changed: args.common.make.if_changed,
            force: args.force,
            format: args.in_format,
            delimiter: args.delimiter.as_deref().map(delimiter).transpose()?,
            quotes: !args.no_quotes,
            read: ReadOptions { max_line: size("--max-line", &args.max_line)?, lossy: args.lossy },
            from: from(&args.from)?,
            explain: args.explain,
            map: field_map(&args.map)?,
            labels: Labels::new(args.label_field.clone(), &args.label_map, args.label)?
                .with_thresholds(Thresholds::new(args.desirable.as_deref(), args.undesirable.as_deref())?),
            shapes: shape_rules(args),
            chat: args.chat,
            trim: args.trim,
            to: args.to,
            out_format: out_format(args)?,
            splits: splits(&args.split, args.to == Form::Mlx)?,
            provenance: args.provenance,
            order: args.order,
            seed: args.seed,
            rows: row_rules(args)?,
            filters: Filters::new(args)?,
            threads: args.threads.map_or_else(cores, usize::from),
            memory: usize::try_from(size("--memory", &args.memory)?).unwrap_or(usize::MAX).max(8 << 20),
            shard: args.shard.as_deref().map(shard).transpose()?,
        };
        plan.check()?;
        Ok(plan)
    }

    /// Refuses what does not go together.
    fn check(&self) -> Result<()> {
        let alone = |what: &str| {
            Err(Error::usage(format!("--shard sees a part of the records only, {what} needs all")))
        };
        if self.shard.is_some() {
            if self.needs_all() || self.order != Order::Interleave {
                return alone("this order, --dedup, --conflicts drop, --balance or --split");
            }
            if self.inputs.iter().any(|path| path == Path::new("-")) {
                return Err(Error::usage("--shard needs files: standard input has no parts"));
            }
        }
        let named = self.output.as_ref().is_some_and(|path| path != Path::new("-"));
        if !self.splits.is_empty() && !named {
            return Err(Error::usage("--split and --to mlx write several files").with_hint("-o DIR"));
        }
        if !self.splits.is_empty() && self.out_format == OutFormat::Parquet {
            return Err(Error::usage("--split writes jsonl only"));
        }
        Ok(())
    }

    /// True when a record can be written only after all of them have been seen.
    pub fn needs_all(&self) -> bool {
        self.order == Order::Shuffle
            || self.rows.dedup != Dedup::None
            || self.rows.conflicts == Conflicts::Drop
            || self.rows.balance != Balance::None
            || !self.splits.is_empty()
    }

    /// True when repeated records are written and counted.
    pub fn counts_duplicates(&self) -> bool {
        self.rows.duplicates && self.rows.dedup == Dedup::None && self.rows.conflicts == Conflicts::Keep
    }

    /// The dialect of a table whose own delimiter would be `usual`.
    pub fn dialect(&self, usual: u8) -> Dialect {
        Dialect { delimiter: self.delimiter.unwrap_or(usual), quotes: self.quotes }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn from(name: &str) -> Result<Option<&'static Shape>> {
    if name == "auto" {
        return Ok(None);
    }
    shapes::named(name).map(Some).ok_or_else(|| {
        let known: Vec<&str> = shapes::names().collect();
        Error::usage(format!("--from knows no shape \"{name}\" (known: auto, {})", known.join(", ")))
    })
}

fn shape_rules(args: &Args) -> ShapeRules {
    ShapeRules {
        split_after: args.split_after.clone().filter(|text| !text.is_empty()),
        dialogue_as_text: args.dialogues == Dialogues::Text,
        both_bad: args.both_bad == BothBad::Undesirable,
        min_margin: args.min_margin,
        min_ratio: args.min_ratio,
        score: args.score.clone(),
    }
}

fn row_rules(args: &Args) -> Result<RowRules> {
    if !(0.1..=1.0).contains(&args.near) {
        return Err(Error::usage(format!("--near must be from 0.1 to 1, found {}", args.near)));
    }
    Ok(RowRules {
        on_error: match args.on_error.as_str() {
            "stop" | "fail" => OnError::Stop,
            "skip" => OnError::Skip,
            other => match other.strip_prefix("quarantine=").filter(|file| !file.is_empty()) {
                Some(file) => OnError::Quarantine(file.into()),
                None => {
                    let what = format!("--on-error takes stop, skip or quarantine=FILE, found \"{other}\"");
                    return Err(Error::usage(what));
                }
            },
        },
        empty: if args.skip_empty { Policy::Skip } else { args.empty },
        ties: args.ties,
        prompts_differ: args.prompts_differ,
        duplicates: !args.no_duplicate_check,
        dedup: args.dedup,
        near: args.near,
        conflicts: args.conflicts,
        balance: args.balance,
        pii: args.pii,
        allow_empty: args.allow_empty,
        drop_extra: args.drop_extra,
    })
}

fn out_format(args: &Args) -> Result<OutFormat> {
    let by_name = args.output.as_ref().is_some_and(|path| path.extension().is_some_and(|e| e == "parquet"));
    Ok(args.out_format.unwrap_or(if by_name { OutFormat::Parquet } else { OutFormat::Jsonl }))
}
