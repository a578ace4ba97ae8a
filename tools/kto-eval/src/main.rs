//! `kto-eval`: see `kto_eval::Args`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kto_cli::run("kto-eval", |args: &kto_eval::Args| &args.common, kto_eval::run)
}
