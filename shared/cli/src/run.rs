//! From `main` to an exit code.

use crate::{Common, Exit, Kind, Result, Ui};
use clap::Parser;
use std::{io::Write, process::ExitCode};

/// Parses the arguments, runs the tool, prints its one error line, returns the exit code.
pub fn run<A: Parser>(tool: &'static str, common: impl Fn(&A) -> &Common, body: impl FnOnce(A, &Ui) -> Result<Exit>) -> ExitCode {
    let args = A::parse();
    let ui = Ui::new(tool, common(&args));
    match body(args, &ui) {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(error) => {
            if error.kind() != Kind::ClosedPipe {
                let mut err = std::io::stderr().lock();
                let _ = writeln!(err, "{tool}: {error}");
                if let Some(hint) = error.hint() {
                    let _ = writeln!(err, "hint: {hint}");
                }
            }
            ExitCode::from(error.kind().code())
        }
    }
}
