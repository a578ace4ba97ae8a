//! `kto-quantize`: a model directory in, the same model in 4 bits out.

use std::process::ExitCode;

fn main() -> ExitCode {
    kto_cli::run("kto-quantize", |args: &kto_quantize::Args| &args.common, kto_quantize::run)
}
