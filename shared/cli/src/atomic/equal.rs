//! Whether an output that is there has the bytes that would take its place.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

/// Bytes compared at a time.
const BUFFER: usize = 1 << 20;

/// Whether two regular files have the same bytes. What cannot be read differs.
pub(super) fn files(a: &Path, b: &Path) -> bool {
    let length = |path: &Path| fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|m| m.len());
    match (length(a), length(b)) {
        (Some(x), Some(y)) if x == y => same_bytes(a, b).unwrap_or(false),
        _ => false,
    }
}

/// Whether two directories have the same files with the same bytes, apart from a file called `but` in them.
pub(super) fn trees(a: &Path, b: &Path, but: Option<&str>) -> bool {
    let names = |path: &Path| -> io::Result<BTreeSet<OsString>> {
        let names =
            fs::read_dir(path)?.map(|e| e.map(|e| e.file_name())).collect::<io::Result<BTreeSet<_>>>()?;
        Ok(names.into_iter().filter(|n| but.is_none_or(|but| n != but)).collect())
    };
    let (Ok(of_a), Ok(of_b)) = (names(a), names(b)) else { return false };
    of_a == of_b
        && of_a.iter().all(|name| {
            let (a, b) = (a.join(name), b.join(name));
            files(&a, &b) || a.is_dir() && b.is_dir() && trees(&a, &b, None)
        })
}

/// Gives the files of `new` that are equal to those of `old` the times of those: make need not look at them again.
pub(super) fn keep_times(new: &Path, old: &Path) -> io::Result<()> {
    for entry in fs::read_dir(new)? {
        let (from, to) = (old.join(entry?.file_name()), new);
        let to = to.join(from.file_name().unwrap_or_default());
        if to.is_dir() {
            keep_times(&to, &from)?;
        } else if files(&to, &from) {
            let time = fs::metadata(&from)?.modified()?;
            File::options().write(true).open(&to)?.set_modified(time)?;
        }
    }
    Ok(())
}

fn same_bytes(a: &Path, b: &Path) -> io::Result<bool> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    let (mut of_a, mut of_b) = (vec![0; BUFFER], vec![0; BUFFER]);
    loop {
        let n = a.read(&mut of_a)?;
        if n == 0 {
            return Ok(b.read(&mut of_b[..1])? == 0);
        }
        b.read_exact(&mut of_b[..n])?;
        if of_a[..n] != of_b[..n] {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_compared_file_by_file() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for root in [&a, &b] {
            fs::create_dir_all(root.join("in")).unwrap();
            fs::write(root.join("in/x"), vec![7; 3 << 20]).unwrap();
            fs::write(root.join("m"), root.to_str().unwrap()).unwrap();
        }
        assert!(trees(&a, &b, Some("m")) && !trees(&a, &b, None));
        fs::write(b.join("in/x"), [vec![7; (3 << 20) - 1], vec![8]].concat()).unwrap();
        assert!(!trees(&a, &b, Some("m")));
        fs::remove_file(b.join("in/x")).unwrap();
        assert!(!trees(&a, &b, Some("m")) && !trees(&b, &a, Some("m")));
    }

    #[test]
    fn equal_files_keep_their_times() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        for root in [&old, &new] {
            fs::create_dir(root).unwrap();
            fs::write(root.join("same"), "1").unwrap();
            fs::write(root.join("other"), root.to_str().unwrap()).unwrap();
        }
        let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1000);
        for name in ["same", "other"] {
            File::options().write(true).open(old.join(name)).unwrap().set_modified(long_ago).unwrap();
        }
        keep_times(&new, &old).unwrap();
        let time = |name: &str| fs::metadata(new.join(name)).unwrap().modified().unwrap();
        assert_eq!(time("same"), long_ago);
        assert_ne!(time("other"), long_ago);
    }
}
