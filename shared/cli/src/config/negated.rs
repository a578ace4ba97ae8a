//! Switches that a typed word turns off: `--no-force` and `--force=false`, for what a file or a variable has turned on.
//!
//! Called by [`super::resolve`] before clap sees the arguments, for every tool: clap's own switches know no off. Invariant: a name that the
//! tool has as it stands (`--no-kl`) means what it says. Of `--force` and `--no-force` the last one counts.

use super::option::on;
use clap::{Arg, ArgAction, Command};
use std::ffi::OsString;

/// The arguments for clap, and the long flags of the switches that were turned off.
pub(super) fn take(command: &Command, argv: &[OsString]) -> (Vec<OsString>, Vec<String>) {
    let called = argv.iter().skip(1).find_map(|word| command.find_subcommand(word));
    let args: Vec<&Arg> =
        command.get_arguments().chain(called.into_iter().flat_map(Command::get_arguments)).collect();
    let find = |name: &str| args.iter().find(|arg| long_names(arg).any(|known| known == name)).copied();
    let (mut kept, mut off) = (Vec::with_capacity(argv.len()), Vec::new());
    let mut words = argv.iter();
    kept.extend(words.next().cloned());
    for word in words.by_ref() {
        let Some(text) =
            word.to_str().and_then(|text| text.strip_prefix("--")).filter(|text| !text.is_empty())
        else {
            kept.push(word.clone());
            if word == "--" {
                break;
            }
            continue;
        };
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let turned = match (find(name), value) {
            (Some(arg), None) => Some((arg, true)),
            (Some(arg), Some(value)) if is_switch(arg) => on(value).map(|on| (arg, on)),
            (None, None) => name
                .replace('_', "-")
                .strip_prefix("no-")
                .and_then(find)
                .filter(|a| can_be_off(a))
                .map(|a| (a, false)),
            _ => None,
        };
        let key = turned.and_then(|(arg, _)| arg.get_long()).unwrap_or_default();
        match turned {
            Some((arg, true)) => {
                off.retain(|other| other != key);
                kept.push(if is_switch(arg) { format!("--{name}").into() } else { word.clone() });
            }
            Some((arg, false)) => {
                kept.retain(|earlier: &OsString| {
                    !earlier
                        .to_str()
                        .and_then(|e| e.strip_prefix("--"))
                        .is_some_and(|e| long_names(arg).any(|n| n == e))
                });
                off.push(key.to_string());
            }
            None => kept.push(word.clone()),
        }
    }
    kept.extend(words.cloned());
    (kept, off)
}

fn long_names(arg: &Arg) -> impl Iterator<Item = &str> {
    arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default())
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

/// A switch, or an option that may stand without a value, as --resume.
fn can_be_off(arg: &Arg) -> bool {
    is_switch(arg) || arg.get_num_args().is_some_and(|n| n.min_values() == 0 && n.takes_values())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(line: &str) -> (String, Vec<String>) {
        let switch = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let command = Command::new("x")
            .arg(switch("keep").alias("hold"))
            .arg(switch("no-kl"))
            .arg(Arg::new("again").long("again").num_args(0..=1))
            .arg(Arg::new("lr").long("lr"))
            .subcommand(Command::new("score").arg(switch("rows")))
            .subcommand(Command::new("other").arg(switch("columns")));
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let (kept, off) = take(&command, &argv);
        (kept.into_iter().map(|w| w.into_string().unwrap()).collect::<Vec<_>>().join(" "), off)
    }

    #[test]
    fn switches_are_turned_off_and_nothing_else_is() {
        for (given, kept, off) in [
            ("x --no-keep --lr 1", "x --lr 1", &["keep"][..]),
            ("x --keep=false", "x", &["keep"]),
            ("x --keep=1 --hold=true", "x --keep --hold", &[]),
            ("x --keep --no-keep", "x", &["keep"]),
            ("x --hold --keep=off", "x", &["keep"]),
            ("x --no-keep --keep", "x --keep", &[]),
            ("x --no-kl --no-kl=no", "x", &["no-kl"]),
            ("x --no-kl", "x --no-kl", &[]),
            ("x --again=false --no-again", "x --again=false", &["again"]),
            ("x score --no-rows", "x score", &["rows"]),
            // What clap refuses stays.
            (
                "x score --no-columns --no-lr --keep=perhaps",
                "x score --no-columns --no-lr --keep=perhaps",
                &[],
            ),
            ("x -- --no-keep", "x -- --no-keep", &[]),
        ] {
            assert_eq!(taken(given), (kept.into(), off.iter().map(|o| o.to_string()).collect()), "{given}");
        }
    }
}
