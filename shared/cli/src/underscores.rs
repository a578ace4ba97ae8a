//! Flags as Python's trainers spell them: `--learning_rate 1e-5` is `--learning-rate 1e-5`.
//!
//! Called by [`crate::run`] before clap sees the arguments. Invariant: only the name of a long flag is changed, and only when the
//! tool has it with hyphens and not as it stands: neither values nor what follows `--`.

use clap::Command;
use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

/// The long flags of a tool and of all its subcommands.
#[derive(Default)]
struct Flags {
    names: BTreeSet<String>,
    /// Those whose value may begin with a hyphen.
    greedy: BTreeSet<String>,
}

impl Flags {
    fn add(&mut self, command: &Command) {
        for arg in command.get_arguments() {
            let names = arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default());
            for name in names {
                self.names.insert(name.into());
                if arg.is_allow_hyphen_values_set() {
                    self.greedy.insert(name.into());
                }
            }
        }
        command.get_subcommands().for_each(|sub| self.add(sub));
    }

    /// Returns the argument with hyphens in its name; nothing when it stays as it is.
    fn hyphened(&self, argument: &OsStr) -> Option<OsString> {
        let rest = argument.as_bytes().strip_prefix(b"--")?;
        let end = rest.iter().position(|b| *b == b'=').unwrap_or(rest.len());
        let name = std::str::from_utf8(&rest[..end]).ok()?;
        let hyphened = name.replace('_', "-");
        let is_meant = !self.names.contains(name) && self.names.contains(&hyphened);
        is_meant.then(|| OsString::from_vec([b"--", hyphened.as_bytes(), &rest[end..]].concat()))
    }
}

/// Returns the arguments of `command` with hyphens in the names of long flags.
pub(crate) fn without(command: &Command, mut argv: Vec<OsString>) -> Vec<OsString> {
    let mut flags = Flags::default();
    flags.add(command);
    let mut is_value = false;
    for argument in argv.iter_mut().skip(1) {
        if std::mem::take(&mut is_value) {
            continue;
        }
        if argument == "--" {
            break;
        }
        if let Some(hyphened) = flags.hyphened(argument) {
            *argument = hyphened;
        }
        let name = argument.to_str().and_then(|text| text.strip_prefix("--"));
        is_value = name.is_some_and(|name| flags.greedy.contains(name));
    }
    argv
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Arg;

    fn after(line: &str) -> String {
        let command = Command::new("x")
            .arg(Arg::new("lr").long("lr").alias("learning-rate"))
            .arg(Arg::new("both").long("odd-one"))
            .arg(Arg::new("other").long("odd_one"))
            .arg(Arg::new("now").long("now-at").allow_hyphen_values(true))
            .subcommand(Command::new("score").arg(Arg::new("inner").long("fail-if")));
        let argv = line.split(' ').map(OsString::from).collect();
        let words = without(&command, argv).into_iter().map(|w| w.into_string().unwrap());
        words.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn names_get_hyphens_and_nothing_else_does() {
        for (given, expected) in [
            ("x --learning_rate 1_0", "x --learning-rate 1_0"),
            ("x --learning_rate=a_b --lr a_b", "x --learning-rate=a_b --lr a_b"),
            ("x score --fail_if a_b", "x score --fail-if a_b"),
            // An exact name is what it says.
            ("x --odd_one 1 --odd-one 2", "x --odd_one 1 --odd-one 2"),
            // clap names what is unknown as it was typed.
            ("x --never_heard 1 __lr _a -l_r", "x --never_heard 1 __lr _a -l_r"),
            ("x --lr 1 -- --learning_rate", "x --lr 1 -- --learning_rate"),
            ("x --now_at --learning_rate --learning_rate", "x --now-at --learning_rate --learning-rate"),
            ("x --now_at=1 --learning_rate", "x --now-at=1 --learning-rate"),
            ("--learning_rate", "--learning_rate"),
        ] {
            assert_eq!(after(given), expected);
        }
        let odd = OsString::from_vec(b"--l\xff_r".to_vec());
        let argv = without(&Command::new("x"), vec!["x".into(), odd.clone()]);
        assert_eq!(argv[1], odd);
    }
}
