//! `org/name[@revision]`.

use std::fmt;

/// A model on the hub, at a revision: a branch, a tag, or a commit of 40 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName {
    /// `org/name`.
    pub repo: String,
    /// `main` when none is given.
    pub revision: String,
}

/// The revision when none is given.
const MAIN: &str = "main";
/// Characters of each part, at most, as on the hub.
const LONGEST: usize = 96;

impl ModelName {
    /// Takes a text that could be a name apart; None when it cannot be one and so must be a path.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (org, name) = repo.split_once('/')?;
        let valid = is_part(org) && is_part(name) && is_revision(revision);
        valid.then(|| Self { repo: repo.into(), revision: revision.into() })
    }

    /// Returns the name of the model's folder in the cache.
    pub fn folder(&self) -> String {
        format!("models--{}", self.repo.replace('/', "--"))
    }

    /// Returns whether the revision is a commit, which never changes.
    pub fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

/// Returns whether a text is a commit's hash.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Letters, digits, `-`, `_`, `.`; no `--` (it stands for the slash in the cache) and no `..`.
fn is_part(text: &str) -> bool {
    (1..=LONGEST).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
        && !text.contains("--")
        && !text.contains("..")
}

/// A git reference, which may hold slashes: `v1.0`, `refs/pr/3`.
fn is_revision(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 200
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./+".contains(&b))
        && text.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.contains(".."))
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_told_apart() {
        let name = ModelName::parse("Qwen/Qwen2.5-0.5B@refs/pr/3").unwrap();
        assert_eq!((name.repo.as_str(), name.revision.as_str()), ("Qwen/Qwen2.5-0.5B", "refs/pr/3"));
        assert_eq!(name.folder(), "models--Qwen--Qwen2.5-0.5B");
        assert_eq!(ModelName::parse("a/b").unwrap().to_string(), "a/b");
        assert_eq!(name.to_string(), "Qwen/Qwen2.5-0.5B@refs/pr/3");
        for path in [
            "qwen",
            "./a/b",
            "/a/b",
            "a/b/c",
            "a//b",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a/b@x/../y",
            "a--b/c",
            "a/b c",
            "a/b@/x",
            "a/b@x//y",
            "a/.b",
            "",
        ] {
            assert_eq!(ModelName::parse(path), None, "{path}");
        }
        assert!(is_commit(&"0a".repeat(20)) && !is_commit(&"0A".repeat(20)) && !is_commit("main"));
    }
}
