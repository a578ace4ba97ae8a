//! `kto-tokenize`: KTO records in, a token file out.

use std::process::ExitCode;

fn main() -> ExitCode {
    kto_cli::run("kto-tokenize", |args: &kto_tokenize::Args| &args.common, kto_tokenize::run)
}
