//! Where each option's value comes from: flag, environment, file, default, in this order.
//!
//! Called by [`crate::run`]. Everything follows from the tool's clap definition ([`option`]): the layers below the
//! command line become arguments of a second parse ([`layers`]), so that conflicts, requirements and value parsers see
//! them as if they had been typed. Deliberately absent: a list of options by hand, and values that only a file can set.

mod environment;
mod file;
mod layers;
mod negated;
mod option;
mod print;
mod resolution;

pub use resolution::{Resolution, Value};

use crate::{Error, Kind, Result, manifest};
use clap::{
    Arg, ArgMatches, Command, Id,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
};
use file::Origin;
use layers::Layers;
use option::{Opt, Scope};
use std::{ffi::OsString, path::PathBuf};

/// The part of every long help that tells about it.
pub(crate) const CONFIGURATION: &str = "\
Configuration:
  Every option can be set in these ways; the first that is there counts:
    --batch 8      the flag (underscores in a long flag are hyphens; --no-NAME or
                   --NAME=false turns a switch off)
    KTO_BATCH=8    an environment variable; a switch is 1 or 0
    batch = 8      a key of the TOML file of --config: at its top, for every tool that
                   reads it, or in a table for one: [kto-train]
  --print-config shows every option's value and where it comes from.";

/// What the arguments and everything around them ask for.
pub(crate) enum Found {
    /// To run with these arguments.
    Run(ArgMatches, Resolution),
    /// To print the configuration, and these warnings.
    Print(String, Vec<String>),
}

/// What is wrong.
pub(crate) enum Wrong {
    /// The command line alone; also: help or version were asked for.
    Line(clap::Error),
    /// A value from a lower layer, as clap sees it; its place, and that layer's exit code.
    Place(clap::Error, String),
    /// All else.
    Other(Error),
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Finds the value of every option of `tool`, whose definition is `command`.
pub(crate) fn resolve(tool: &'static str, command: &Command, argv: &[OsString]) -> Result<Found, Wrong> {
    let (argv, off) = negated::take(command, argv);
    let typed = match relaxed(command.clone()).try_get_matches_from(&argv) {
        Ok(matches) => matches,
        // The relaxed definition shows another usage line.
        Err(first) => {
            return Err(Wrong::Line(command.clone().try_get_matches_from(argv).err().unwrap_or(first)));
        }
    };
    let scope = Scope::new(command, &typed);
    let layers = collect(tool, &scope, (&typed, &off))?;
    let argv = layers.argv(&scope, tool);
    let print = layers.is_on(&scope, "print_config");
    // What is required may be missing from a configuration that is only shown.
    let parsed = if print { relaxed(command.clone()) } else { command.clone() }.try_get_matches_from(argv);
    let matches = parsed.map_err(|error| placed(error, &scope, &layers))?;
    let mut resolution = Resolution::new(tool, &scope, &layers, &matches);
    resolution.warnings = environment::misspelt(&scope);
    if print {
        return Ok(Found::Print(print::toml(&resolution), resolution.warnings));
    }
    Ok(Found::Run(matches, resolution))
}

/// The layers, the lowest first. A manifest takes the place of file and environment: a run is repeated as it was.
fn collect(tool: &str, scope: &Scope, (typed, off): (&ArgMatches, &[String])) -> Result<Layers> {
    let mut layers = Layers::default();
    let mut flags = Layers::default();
    flags.add_typed(scope, typed);
    flags.add_off(scope, off);
    let typed_manifest = flags.path(scope, "from_manifest");
    let mut variable = Layers::default();
    variable.add_environment(scope, |option| option.id == "from_manifest")?;
    if let Some(path) = typed_manifest.clone().or_else(|| variable.path(scope, "from_manifest")) {
        // A manifest that is typed beats a file that a variable names; of two variables neither does.
        let wanted = |option: &Opt| typed_manifest.is_none() || !option.steering;
        layers.add_environment(scope, |option| option.common && wanted(option))?;
        manifest::configuration(&path, &scope.full_name(tool))?
            .into_iter()
            .try_for_each(|(key, value)| layers.add_manifest(scope, &path, &key, &value))?;
    } else {
        let mut environment = Layers::default();
        environment.add_environment(scope, |_| true)?;
        let file: Option<PathBuf> = flags.path(scope, "config").or_else(|| environment.path(scope, "config"));
        if let Some(path) = file {
            layers.add_file(tool, scope, &path)?;
        }
        layers.extend(environment);
    }
    layers.extend(flags);
    Ok(layers)
}

/// The definition without required arguments: a lower layer may have them.
fn relaxed(command: Command) -> Command {
    let optional = |arg: Arg| arg.required(false).required_unless_present(Resettable::<Id>::Reset);
    let groups: Vec<Id> = command.get_groups().map(|group| group.get_id().clone()).collect();
    let of_args = command.mut_args(optional).mut_subcommands(relaxed);
    groups.into_iter().fold(of_args, |command, id| command.mut_group(id, |group| group.required(false)))
}

/// Says where a wrong value stands, when it was not typed.
fn placed(error: clap::Error, scope: &Scope, layers: &Layers) -> Wrong {
    let kinds = [ContextKind::InvalidArg, ContextKind::PriorArg];
    let named = kinds.iter().filter_map(|kind| error.get(*kind)).flat_map(names);
    let origin = named.filter_map(|name| layers.origin_of(scope, &name)).find(|o| **o != Origin::Flag);
    match origin {
        Some(origin) if error.kind() != ErrorKind::MissingRequiredArgument => {
            let place = origin.to_string();
            Wrong::Place(error, place)
        }
        _ => Wrong::Line(error),
    }
}

fn names(value: &ContextValue) -> Vec<String> {
    match value {
        ContextValue::String(name) => vec![name.clone()],
        ContextValue::Strings(names) => names.clone(),
        _ => Vec::new(),
    }
}

/// Returns a mismatch error (78) at a place, with the name that was perhaps meant.
fn unknown(place: &str, what: &str, name: &str, known: &[&str]) -> Error {
    let error = Error::new(Kind::Config, format!("{place}: unknown {what} \"{}\"", crate::escape(name)));
    let near = known.iter().map(|k| (strsim::jaro_winkler(k, name), *k)).max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        Some((score, near)) if score > 0.8 => error.with_hint(format!("did you mean \"{near}\"?")),
        _ => error,
    }
}
