//! `kto-merge`: base and adapter in, one model directory out.

use std::process::ExitCode;

fn main() -> ExitCode {
    kto_cli::run("kto-merge", |args: &kto_merge::Args| &args.common, kto_merge::run)
}
