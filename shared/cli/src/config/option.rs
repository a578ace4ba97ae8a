//! The options of a tool as its clap definition has them.

use crate::Common;
use clap::{Arg, ArgAction, ArgMatches, Args, Command};
use std::{any::TypeId, collections::BTreeSet, ffi::OsString, path::PathBuf};

/// Options that say where values come from; no file holds them.
const STEERING: [&str; 3] = ["config", "print_config", "from_manifest"];

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Nothing; it is there or not.
    Switch,
    /// Nothing; it may be repeated.
    Count,
    /// One value, or with `optional` perhaps none.
    One { optional: bool },
    /// Values.
    Many,
}

/// One option or positional argument.
#[derive(Clone, Debug)]
pub(super) struct Opt {
    /// clap's name.
    pub id: String,
    /// Key in a file: the long flag, or of a positional argument its id.
    pub key: String,
    /// Other names that the flag has.
    pub aliases: Vec<String>,
    /// Environment variables, the first one counts.
    pub variables: Vec<String>,
    pub shape: Shape,
    pub defaults: Vec<OsString>,
    /// The default that the tool finds itself, as its help names it.
    pub derived: Option<String>,
    /// A text even when it looks like a number.
    pub text: bool,
    /// True or false as a value.
    pub boolean: bool,
    pub positional: bool,
    /// It says where values come from.
    pub steering: bool,
    /// Every tool has it; it does not touch results.
    pub common: bool,
    /// As clap's messages name it.
    pub shown: String,
}

impl Opt {
    fn new(arg: &Arg, common: &BTreeSet<String>) -> Self {
        let id = arg.get_id().to_string();
        let key = arg.get_long().map_or_else(|| id.replace('_', "-"), str::to_string);
        let kind = arg.get_value_parser().type_id();
        let optional = arg.get_num_args().is_some_and(|n| n.min_values() == 0 && n.takes_values());
        let shape = match arg.get_action() {
            ArgAction::SetTrue | ArgAction::SetFalse => Shape::Switch,
            ArgAction::Count => Shape::Count,
            ArgAction::Append => Shape::Many,
            _ => Shape::One { optional },
        };
        let aliases: Vec<String> =
            arg.get_all_aliases().unwrap_or_default().into_iter().map(str::to_string).collect();
        let names = [&key].into_iter().chain(&aliases).filter(|_| !arg.is_positional());
        let own = names.map(|name| format!("KTO_{}", name.replace('-', "_").to_ascii_uppercase()));
        let other = arg.get_env().map(|name| name.to_string_lossy().into_owned());
        Self {
            variables: own.chain(other).collect(),
            aliases,
            shape,
            defaults: arg.get_default_values().iter().map(OsString::from).collect(),
            text: kind == TypeId::of::<String>()
                || kind == TypeId::of::<PathBuf>()
                || kind == TypeId::of::<OsString>(),
            boolean: kind == TypeId::of::<bool>() && !matches!(shape, Shape::Switch),
            derived: arg.get_help().and_then(|help| derived(&help.to_string())),
            positional: arg.is_positional(),
            steering: STEERING.contains(&id.as_str()),
            common: common.contains(&id),
            shown: arg.to_string(),
            id,
            key,
        }
    }
    /// Whether `name` is its key or another name of it, perhaps with underscores.
    pub fn is_called(&self, name: &str) -> bool {
        let is = |name: &str| self.key == name || self.aliases.iter().any(|alias| alias == name);
        is(name) || is(&name.replace('_', "-"))
    }
}

/// The options that a call can have: the tool's and those of the subcommand at hand.
pub(super) struct Scope {
    /// The tool.
    pub tool: String,
    /// In the order of the help; the tool's own come first.
    pub options: Vec<Opt>,
    /// How many of them stand before the subcommand.
    pub own: usize,
    /// The subcommand.
    pub sub: Option<String>,
    /// The other subcommands with their options: keys that a file may hold though this call has no use for them.
    pub others: Vec<(String, Vec<Opt>)>,
}

impl Scope {
    /// Lists the options of `command` for a call with these arguments.
    pub fn new(command: &Command, typed: &ArgMatches) -> Self {
        let common = Common::augment_args(Command::new(""));
        let common: BTreeSet<String> = common.get_arguments().map(|a| a.get_id().to_string()).collect();
        // Only a built definition knows how many values each option takes.
        let mut command = command.clone();
        command.build();
        let list = |command: &Command, inner: bool| -> Vec<Opt> {
            let ours = |arg: &&Arg| !(is_help(arg) || inner && arg.is_global_set());
            command.get_arguments().filter(ours).map(|arg| Opt::new(arg, &common)).collect()
        };
        let mut options = list(&command, false);
        let own = options.len();
        let sub = typed.subcommand_name().map(str::to_string);
        let mut others = Vec::new();
        for each in command.get_subcommands().filter(|c| c.get_name() != "help") {
            if sub.as_deref() == Some(each.get_name()) {
                options.extend(list(each, true));
            } else {
                others.push((each.get_name().to_string(), list(each, true)));
            }
        }
        Self { tool: command.get_name().into(), options, own, sub, others }
    }
    /// Returns the option that a file calls `name`.
    pub fn find(&self, name: &str) -> Option<&Opt> {
        self.options.iter().find(|o| !o.steering && o.is_called(name))
    }
    /// Whether another subcommand has an option that a file calls `name`.
    pub fn is_of_another(&self, name: &str) -> bool {
        self.others.iter().flat_map(|(_, list)| list).any(|o| o.is_called(name))
    }
    /// Returns all keys that a file may hold.
    pub fn keys(&self) -> Vec<&str> {
        let others = self.others.iter().flat_map(|(_, list)| list);
        self.options.iter().chain(others).filter(|o| !o.steering).map(|o| o.key.as_str()).collect()
    }
    /// Returns the tool's name with its subcommand.
    pub fn full_name(&self, tool: &str) -> String {
        self.sub.as_ref().map_or_else(|| tool.to_string(), |sub| format!("{tool} {sub}"))
    }
    /// Returns the matches that hold an option's value.
    pub fn matches<'a>(&self, index: usize, matches: &'a ArgMatches) -> &'a ArgMatches {
        match matches.subcommand() {
            Some((_, inner)) if index >= self.own => inner,
            _ => matches,
        }
    }
}

/// Returns what a word says of a switch, in any case.
pub(super) fn on(word: &str) -> Option<bool> {
    match word.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// What stands in `[default: …]` of a help.
fn derived(help: &str) -> Option<String> {
    let (_, behind) = help.split_once("[default: ")?;
    behind.split_once(']').map(|(text, _)| text.replace('\n', " "))
}

fn is_help(arg: &Arg) -> bool {
    use ArgAction::{Help, HelpLong, HelpShort, Version};
    matches!(arg.get_action(), Help | HelpShort | HelpLong | Version)
}
