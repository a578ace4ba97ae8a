//! `kto-convert`: preference data of many shapes in, KTO records out.

use std::process::ExitCode;

fn main() -> ExitCode {
    kto_cli::run("kto-convert", |args: &kto_convert::Args| &args.common, kto_convert::run)
}
