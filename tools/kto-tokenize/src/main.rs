//! `kto-tokenize`: KTO records in, a token file out.

use std::process::ExitCode;

/// Rows are many small pieces that one thread makes and another frees, which glibc's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    kto_cli::run("kto-tokenize", |args: &kto_tokenize::Args| &args.common, kto_tokenize::run)
}
