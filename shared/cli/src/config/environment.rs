//! Options in environment variables: `KTO_BATCH=8`.

use super::{
    file::Origin,
    layers::{Layers, Words},
    option::{Opt, Scope, Shape, on},
};
use crate::{Error, Kind, Result, escape};
use std::{env, ffi::OsStr};

/// Every tool's variables, `scripts/ci-manners` compares: what another tool has is no misspelt name of this one.
const KNOWN: &str = include_str!("variables.txt");

impl Layers {
    /// Adds the variables of the options that `wanted` takes. An empty variable is not set. Error (78): a switch that
    /// is neither on nor off.
    pub fn add_environment(&mut self, scope: &Scope, wanted: impl Fn(&Opt) -> bool) -> Result<()> {
        for (index, option) in scope.options.iter().enumerate().filter(|(_, o)| wanted(o)) {
            let set = |name: &&String| env::var_os(name).is_some_and(|v| !v.is_empty());
            let Some(name) = option.variables.iter().find(set) else { continue };
            let value = env::var_os(name).unwrap_or_default();
            let words = words(option, &value).ok_or_else(|| {
                let value = escape(&value.to_string_lossy());
                Error::new(
                    Kind::Config,
                    format!("{name}: --{} is on (1) or off (0), found \"{value}\"", option.key),
                )
            })?;
            self.set(index, words, Origin::Variable(name.clone()));
        }
        Ok(())
    }
}

/// Returns what to say about set variables that nobody knows and that look like one of the scope's. Other names are left alone:
/// they may be somebody else's.
pub(super) fn misspelt(scope: &Scope) -> Vec<String> {
    let mut told: Vec<String> = env::vars_os()
        .filter(|(_, value)| !value.is_empty())
        .filter_map(|(name, _)| {
            let name = name.into_string().ok()?;
            let near = nearest(scope, &name)?;
            Some(format!("{} is no variable of the KTO tools; {near} is", escape(&name)))
        })
        .collect();
    told.sort();
    told
}

/// Returns the variable that `name` was perhaps meant to be; nothing for one that is known.
fn nearest<'a>(scope: &'a Scope, name: &str) -> Option<&'a str> {
    let own = name.strip_prefix("KTO_")?;
    let variables = scope.options.iter().flat_map(|option| &option.variables);
    if KNOWN.lines().any(|known| known == name) || variables.clone().any(|known| known == name) {
        return None;
    }
    let distance = |known: &str| Some(strsim::damerau_levenshtein(own, known.strip_prefix("KTO_")?));
    let near = variables.filter_map(|known| Some((distance(known)?, known.as_str())));
    // Two slips, and in a short name one: the shorter a name, the more of its neighbours are other words.
    near.min().filter(|(slips, _)| *slips <= 2 && slips * 4 <= own.len()).map(|(_, known)| known)
}

fn words(option: &Opt, value: &OsStr) -> Option<Words> {
    let text = value.to_str();
    let on = text.and_then(on);
    let as_switch = on.map(|on| if on { Words::Bare(1) } else { Words::Off });
    match option.shape {
        Shape::Switch => as_switch,
        Shape::Count => match text.map(str::parse) {
            Some(Ok(0)) => Some(Words::Off),
            Some(Ok(times)) => Some(Words::Bare(times)),
            _ => as_switch,
        },
        // None of these words is a value of such an option: KTO_RESUME=1 is --resume.
        Shape::One { optional: true } if on.is_some() => as_switch,
        _ => Some(Words::Values(vec![value.to_os_string()])),
    }
}
