//! The checked form of the arguments: everything explicit, nothing left to parse.

use crate::{
    args::{Args, Format, OnError, Order, Policy},
    labels::Labels,
};
use kto_cli::{Error, Result, input};
use kto_formats::{rows::ReadOptions, table::Dialect};
use std::path::PathBuf;

/// Fields that `--map` may fill.
const FIELDS: [&str; 8] =
    ["prompt", "completion", "label", "chosen", "rejected", "messages", "tools", "chat_template_kwargs"];

/// What a run does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Inputs in order; `-` is standard input.
    pub inputs: Vec<PathBuf>,
    /// Where the records go; `None` is standard output.
    pub output: Option<PathBuf>,
    /// Where the JSON summary goes.
    pub report: Option<PathBuf>,
    /// Outputs that would get the bytes they have are left alone.
    pub if_changed: bool,
    /// The form of all inputs, or `None` to tell by name and first character.
    pub format: Option<Format>,
    /// Delimiter of tables; `None`: by format.
    pub delimiter: Option<u8>,
    /// False when `"` is an ordinary character of a table.
    pub quotes: bool,
    /// Caps and repair of the readers.
    pub read: ReadOptions,
    /// (field, column) pairs of `--map`.
    pub map: Vec<(String, String)>,
    /// How a label is found and read.
    pub labels: Labels,
    /// What ends the prompt of a text pair.
    pub split_after: Option<String>,
    /// Order of the records.
    pub order: Order,
    /// Seed of the shuffle.
    pub seed: u64,
    /// What becomes of rows.
    pub rows: RowRules,
}

/// What becomes of bad and odd rows.
#[derive(Clone, Copy, Debug)]
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
    /// Nothing to write is fine.
    pub allow_empty: bool,
    /// Write only what kto-tokenize needs.
    pub drop_extra: bool,
}

impl Plan {
    /// Checks the arguments. Errors are usage errors (2).
    pub fn new(args: &Args) -> Result<Self> {
        let is_stdout = |path: &PathBuf| path.as_os_str() == "-" || path.as_os_str() == "/dev/stdout";
        if args.report.as_ref().is_some_and(is_stdout) && args.output.as_ref().is_none_or(is_stdout) {
            let error = Error::usage("--report - and the records would both go to standard output");
            return Err(error.with_hint("-o FILE takes the records"));
        }
        let empty = if args.skip_empty { Policy::Skip } else { args.empty };
        Ok(Self {
            inputs: input::or_stdin(&args.files)?,
            output: args.output.clone(),
            report: args.report.clone(),
            if_changed: args.common.make.if_changed,
            format: args.in_format,
            delimiter: args.delimiter.as_deref().map(delimiter).transpose()?,
            quotes: !args.no_quotes,
            read: ReadOptions { max_line: size(&args.max_line)?, lossy: args.lossy },
            map: field_map(&args.map)?,
            labels: Labels::new(args.label_field.clone(), &args.label_map, args.label)?,
            split_after: args.split_after.clone().filter(|text| !text.is_empty()),
            order: args.order,
            seed: args.seed,
            rows: RowRules {
                on_error: args.on_error,
                empty,
                ties: args.ties,
                prompts_differ: args.prompts_differ,
                duplicates: !args.no_duplicate_check,
                allow_empty: args.allow_empty,
                drop_extra: args.drop_extra,
            },
        })
    }

    /// The dialect of a table whose own delimiter would be `usual`.
    pub fn dialect(&self, usual: u8) -> Dialect {
        Dialect { delimiter: self.delimiter.unwrap_or(usual), quotes: self.quotes }
    }
}

fn delimiter(text: &str) -> Result<u8> {
    match text.as_bytes() {
        [byte] if byte.is_ascii() && !matches!(byte, b'"' | b'\n' | b'\r') => Ok(*byte),
        b"tab" | b"\\t" => Ok(b'\t'),
        _ => Err(Error::usage(format!("--delimiter must be one ASCII character or tab, found \"{text}\""))),
    }
}

/// Reads `512`, `64K`, `64MiB`, `2G`: powers of 1024.
fn size(text: &str) -> Result<u64> {
    let wrong =
        || Error::usage(format!("--max-line must be a size such as 512K, 64MiB or 1G, found \"{text}\""));
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let shift = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).filter(|n| (1..=1 << 40).contains(n)).ok_or_else(wrong)
}

fn field_map(pairs: &[String]) -> Result<Vec<(String, String)>> {
    let mut map: Vec<(String, String)> = Vec::new();
    for pair in pairs {
        let Some((field, column)) = pair.split_once('=').filter(|(f, c)| !f.is_empty() && !c.is_empty())
        else {
            return Err(Error::usage(format!("--map takes FIELD=COLUMN, found \"{pair}\"")));
        };
        if !FIELDS.contains(&field) {
            let known = FIELDS.join(", ");
            return Err(Error::usage(format!("--map knows no field \"{field}\" (known: {known})")));
        }
        if map.iter().any(|(f, _)| f == field) {
            return Err(Error::usage(format!("--map gives \"{field}\" twice")));
        }
        if map.iter().any(|(_, c)| c == column) {
            return Err(Error::usage(format!("--map takes column \"{column}\" twice")));
        }
        map.push((field.to_owned(), column.to_owned()));
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("64MiB").unwrap(), 64 << 20);
        assert_eq!(size("100").unwrap(), 100);
        assert_eq!(size("2g").unwrap(), 2 << 30);
        for wrong in ["", "0", "x", "1.5G", "-1", "64 M", "99999999999G"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn maps_and_delimiters() {
        assert_eq!(field_map(&["label=a=b".into()]).unwrap(), [("label".into(), "a=b".into())]);
        assert!(field_map(&["label".into()]).is_err());
        assert!(field_map(&["lable=x".into()]).is_err());
        assert!(field_map(&["prompt=x".into(), "completion=x".into()]).is_err());
        assert_eq!(delimiter("tab").unwrap(), b'\t');
        assert!(delimiter(";;").is_err());
    }
}
