//! Directories as inputs: what `datasets.save_to_disk` writes, what a download of a data set holds, or just a folder.

use kto_cli::{Error, Kind, Result, escape};
use std::path::{Path, PathBuf};

/// Ends of the names of data files, before `.gz` or `.zst`.
const DATA: [&str; 8] = ["jsonl", "json", "ndjson", "csv", "tsv", "parquet", "arrow", "feather"];
/// JSON files that describe a data set.
const NOT_DATA: [&str; 5] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"];
/// Folders in folders, at most.
const DEPTH: u32 = 16;

/// Replaces directories by the data files in them, in the order of their names. Files stay as they are.
pub fn expand(inputs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in inputs {
        if path == Path::new("-") || !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        below(path, 0, &mut files)?;
        if files.len() == before {
            let what = format!("{}: a directory without data files", escape(&path.display().to_string()));
            return Err(Error::new(Kind::NoInput, what)
                .with_hint("data files end in .jsonl, .json, .csv, .tsv, .parquet or .arrow"));
        }
    }
    Ok(files)
}

fn below(folder: &Path, depth: u32, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = folder.read_dir().and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>());
    let mut paths: Vec<PathBuf> =
        entries.map_err(|e| Error::reading(folder, &e))?.into_iter().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let Some(name) = path.file_name().map(|n| n.to_string_lossy().into_owned()) else { continue };
        if name.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            if depth < DEPTH {
                below(&path, depth + 1, files)?;
            }
        } else if is_data(&name) {
            files.push(path);
        }
    }
    Ok(())
}

/// True for data; manifests of ours and the cache of `datasets.map` are none.
fn is_data(name: &str) -> bool {
    let plain = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    let ours = NOT_DATA.contains(&name) || name.ends_with(".manifest.json") || name.starts_with("cache-");
    !ours && plain.rsplit_once('.').is_some_and(|(stem, end)| !stem.is_empty() && DATA.contains(&end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_files_are_told_by_name() {
        for (name, data) in [
            ("data-00000-of-00001.arrow", true),
            ("train.jsonl.gz", true),
            ("a.csv.zst", true),
            ("state.json", false),
            ("dataset_info.json", false),
            ("cache-1f.arrow", false),
            ("README.md", false),
            ("kto.jsonl.manifest.json", false),
            (".jsonl", false),
        ] {
            assert_eq!(is_data(name), data, "{name}");
        }
    }
}
