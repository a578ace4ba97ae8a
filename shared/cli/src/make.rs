//! Flags that make, cron and whoever repeats a run need. Every tool has them.

use crate::config::Resolution;
use clap::Args;
use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

/// Configuration, manifest and dependencies.
#[derive(Args, Clone, Debug, Default)]
pub struct Make {
    /// Take options from FILE (TOML): keys are the flags' names, tables such as [kto-train] are for one tool
    #[arg(long, value_name = "FILE", global = true, help_heading = "Make")]
    pub config: Option<PathBuf>,
    /// Print every option with its value and where that comes from, and do nothing
    #[arg(long, global = true, hide_short_help = true, help_heading = "Make")]
    pub print_config: bool,
    /// Repeat the run of this manifest; flags given beside it win
    #[arg(long, value_name = "FILE", conflicts_with = "config", global = true, hide_short_help = true)]
    #[arg(help_heading = "Make")]
    pub from_manifest: Option<PathBuf>,
    /// Where the manifest goes: FILE, or `none` [default: beside the output]
    ///
    /// It holds the configuration, the inputs and outputs with their SHA-256, and, in "environment", the time and the
    /// machine. Beside a file it is called OUT.manifest.json, in a directory manifest.json. A model that is an input is
    /// told by its fingerprint (settings, tensor names, shapes and samples of the numbers). kto-train always writes run.json;
    /// FILE gets a copy of it.
    #[arg(long, value_name = "FILE", global = true, hide_short_help = true, help_heading = "Make")]
    pub manifest: Option<PathBuf>,
    /// Write a rule for make to FILE: the outputs, and the files that they depend on
    #[arg(long, value_name = "FILE", global = true, hide_short_help = true, help_heading = "Make")]
    pub depfile: Option<PathBuf>,
    /// Leave outputs alone that would get the bytes they have
    #[arg(long, global = true, hide_short_help = true, help_heading = "Make")]
    pub if_changed: bool,
    /// What all options are; set by [`crate::run`].
    #[arg(skip)]
    pub(crate) resolution: Arc<OnceLock<Resolution>>,
}

impl Make {
    /// Returns what all options are; nothing in a library call.
    pub(crate) fn resolution(&self) -> Resolution {
        self.resolution.get().cloned().unwrap_or_default()
    }
}
