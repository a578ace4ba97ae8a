//! Flags whose values have a form of their own.

use kto_cli::{Error, Result};

/// Fields that `--map` may fill.
const FIELDS: [&str; 21] = [
    "prompt",
    "completion",
    "label",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "tools",
    "chat_template_kwargs",
    "system",
    "question",
    "instruction",
    "input",
    "response",
    "output",
    "rating",
    "feedback",
    "completions",
    "generations",
    "ratings",
    "history",
];

/// A file of the output directory.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// Its name, without `.jsonl`.
    pub name: String,
    /// The end of its part of all hashes, as a share from 0 to 1.
    pub end: f64,
}

/// Reads NAME=SHARE pairs. mlx-lm has names and usual shares of its own.
pub fn splits(pairs: &[String], mlx: bool) -> Result<Vec<Split>> {
    let usual = ["train=0.9".to_owned(), "valid=0.05".to_owned(), "test=0.05".to_owned()];
    let pairs = if pairs.is_empty() && mlx { &usual[..] } else { pairs };
    let mut splits: Vec<Split> = Vec::new();
    let mut end = 0.0;
    for pair in pairs {
        let parsed = pair.split_once('=').and_then(|(name, share)| Some((name, share.parse::<f64>().ok()?)));
        let plain = |name: &str| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
        };
        let Some((name, share)) = parsed.filter(|(name, share)| plain(name) && *share > 0.0 && *share <= 1.0)
        else {
            return Err(Error::usage(format!(
                "--split takes NAME=SHARE, such as train=0.9, found \"{pair}\""
            )));
        };
        if splits.iter().any(|s| s.name == name) {
            return Err(Error::usage(format!("--split names \"{name}\" twice")));
        }
        end += share;
        splits.push(Split { name: name.to_owned(), end });
    }
    if !splits.is_empty() && (end - 1.0).abs() > 1e-9 {
        return Err(Error::usage(format!("the shares of --split add up to {end}, not to 1")));
    }
    Ok(splits)
}

/// Reads `2/4`, the second of four parts, as (1, 4).
pub fn shard(text: &str) -> Result<(u64, u64)> {
    let parsed =
        text.split_once('/').and_then(|(i, n)| Some((i.parse::<u64>().ok()?, n.parse::<u64>().ok()?)));
    match parsed {
        Some((part, parts)) if (1..=parts).contains(&part) => Ok((part - 1, parts)),
        _ => Err(Error::usage(format!("--shard takes I/N with I from 1 to N, found \"{text}\""))),
    }
}

/// Reads the delimiter of a table.
pub fn delimiter(text: &str) -> Result<u8> {
    match text.as_bytes() {
        [byte] if byte.is_ascii() && !matches!(byte, b'"' | b'\n' | b'\r') => Ok(*byte),
        b"tab" | b"\\t" => Ok(b'\t'),
        _ => Err(Error::usage(format!("--delimiter must be one ASCII character or tab, found \"{text}\""))),
    }
}

/// Reads `512`, `64K`, `64MiB`, `2G`: powers of 1024.
pub fn size(flag: &str, text: &str) -> Result<u64> {
    let wrong = || Error::usage(format!("{flag} must be a size such as 512K, 64MiB or 1G, found \"{text}\""));
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

/// Reads FIELD=COLUMN pairs.
pub fn field_map(pairs: &[String]) -> Result<Vec<(String, String)>> {
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
        assert_eq!(size("--max-line", "64MiB").unwrap(), 64 << 20);
        assert_eq!(size("--max-line", "100").unwrap(), 100);
        assert_eq!(size("--max-line", "2g").unwrap(), 2 << 30);
        for wrong in ["", "0", "x", "1.5G", "-1", "64 M", "99999999999G"] {
            assert!(size("--max-line", wrong).is_err(), "{wrong}");
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

    #[test]
    fn shards_and_splits() {
        assert_eq!(shard("2/4").unwrap(), (1, 4));
        for wrong in ["0/4", "5/4", "1", "a/b", "1/0"] {
            assert!(shard(wrong).is_err(), "{wrong}");
        }
        let of = |pairs: &[&str]| splits(&pairs.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>(), false);
        assert_eq!(of(&["train=0.9", "test=0.1"]).unwrap()[0], Split { name: "train".into(), end: 0.9 });
        for wrong in [&["train=0.9"][..], &["a=0.5", "a=0.5"], &["a/b=1"], &["a=0", "b=1"], &["a"]] {
            assert!(of(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(splits(&[], true).unwrap().len(), 3);
    }
}
