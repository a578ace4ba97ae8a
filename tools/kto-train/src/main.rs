//! `kto-train`: see `kto_train::Args`.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(feature = "cuda")]
    kto_cli::version::compiled_with("cuda");
    kto_cli::run("kto-train", |args: &kto_train::Args| &args.common, kto_train::run)
}
