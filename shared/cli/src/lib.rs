//! How every KTO tool behaves: arguments, exit codes, messages, streams, atomic outputs, signals.
//!
//! Called by every tool and, for its error type and file wrappers, by `kto-formats` and `kto-model`.
//! Only this crate may print, exit or read the environment. It knows no file format and no device.

pub mod atomic;
mod error;
mod exit;
pub mod input;
pub mod output;
mod run;
mod ui;

pub use error::{Context, Error, Kind, Result, escape};
pub use exit::Exit;
pub use run::run;
pub use ui::{Common, Progress, Ui};
