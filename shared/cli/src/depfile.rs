//! A rule for make: outputs, and what they depend on.

use crate::{Error, Result, escape};
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// Returns `outputs: inputs`, and an empty rule for each input, so that make goes on when one is gone and the next run
/// says what is missing. Error (2): a name that no rule of make can hold.
pub(crate) fn rule(outputs: &[PathBuf], inputs: &[PathBuf]) -> Result<String> {
    let words = |paths: &[PathBuf], target| paths.iter().map(|p| word(p, target)).collect::<Result<Vec<_>>>();
    let mut text = format!("{}:", words(outputs, true)?.join(" "));
    let needed = words(inputs, false)?;
    needed.iter().for_each(|input| text += &format!(" \\\n  {input}"));
    text.push('\n');
    for input in words(inputs, true)? {
        let _ = write!(text, "\n{input}:\n");
    }
    Ok(text)
}

/// Spells a name as GNU make reads it.
fn word(path: &Path, target: bool) -> Result<String> {
    let shown = escape(&path.display().to_string());
    let Some(name) = path.to_str().filter(|n| !n.contains(['\n', '\r'])) else {
        return Err(Error::usage(format!("--depfile: no rule of make can hold the name \"{shown}\"")));
    };
    let mut out = String::with_capacity(name.len());
    let mut slashes = 0;
    for c in name.chars() {
        match c {
            '$' => out.push('$'),
            // Backslashes before a character that is escaped are halved by make.
            ' ' | '\t' | '#' | ':' => out.extend(std::iter::repeat_n('\\', slashes + 1)),
            '%' if target => out.extend(std::iter::repeat_n('\\', slashes + 1)),
            '*' | '?' | '[' => out.push('\\'),
            _ => {}
        }
        slashes = if c == '\\' { slashes + 1 } else { 0 };
        out.push(c);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_spelled_for_make() {
        let spelled = |name: &str| word(Path::new(name), true).unwrap();
        assert_eq!(spelled("a b#c$d:e%f"), "a\\ b\\#c$$d\\:e\\%f");
        assert_eq!(spelled("plain/na-me.jsonl"), "plain/na-me.jsonl");
        assert_eq!(word(Path::new("50%"), false).unwrap(), "50%");
        assert!(word(Path::new("a\nb"), false).is_err());
    }

    #[test]
    fn a_missing_input_does_not_stop_make() {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let text = rule(&paths(&["out"]), &paths(&["a", "b"])).unwrap();
        assert_eq!(text, "out: \\\n  a \\\n  b\n\na:\n\nb:\n");
        assert_eq!(rule(&paths(&["x", "y"]), &[]).unwrap(), "x y:\n");
    }
}
