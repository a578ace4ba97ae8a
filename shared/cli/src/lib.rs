//! How every KTO tool behaves: arguments, exit codes, messages, streams, atomic outputs, locks, signals.
//!
//! Called by every tool and, for its error type and file wrappers, by `kto-formats` and `kto-model`.
//! Only this crate may print, exit or read the environment. It knows no file format and no device.

#![forbid(unsafe_code)]

pub mod atomic;
mod config;
mod depfile;
pub mod disk;
mod error;
mod exit;
pub mod foreign;
mod generate;
pub mod guard;
pub mod hash;
pub mod input;
pub mod lock;
mod make;
mod manifest;
pub mod memory;
pub mod number;
pub mod output;
mod progress;
mod record;
mod run;
pub mod signal;
mod stale;
pub mod surroundings;
pub mod tally;
pub mod tool;
mod ui;
mod underscores;
pub mod units;
pub mod version;

pub use error::{Context, Error, Kind, Result, escape};
pub use exit::{EXIT_STATUS, Exit};
pub use make::Make;
pub use manifest::timestamp;
pub use progress::Progress;
pub use record::Record;
pub use run::run;
pub use ui::{Common, Ui, When};
