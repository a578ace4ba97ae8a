//! Options in environment variables: `KTO_BATCH=8`.

use super::{
    file::Origin,
    layers::{Layers, Words},
    option::{Opt, Scope, Shape},
};
use crate::{Error, Kind, Result, escape};
use std::{env, ffi::OsStr};

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

fn words(option: &Opt, value: &OsStr) -> Option<Words> {
    let text = value.to_str().map(str::to_ascii_lowercase);
    let on = match text.as_deref() {
        Some("1" | "true" | "yes" | "on") => Some(true),
        Some("0" | "false" | "no" | "off") => Some(false),
        _ => None,
    };
    let as_switch = on.map(|on| if on { Words::Bare(1) } else { Words::Off });
    match option.shape {
        Shape::Switch => as_switch,
        Shape::Count => match text.as_deref().map(str::parse) {
            Some(Ok(0)) => Some(Words::Off),
            Some(Ok(times)) => Some(Words::Bare(times)),
            _ => as_switch,
        },
        // 1 and 0 may be values of such an option; the words are not.
        Shape::One { optional: true } if text.is_none_or(|t| t.parse::<u8>().is_err()) && on.is_some() => {
            as_switch
        }
        _ => Some(Words::Values(vec![value.to_os_string()])),
    }
}
