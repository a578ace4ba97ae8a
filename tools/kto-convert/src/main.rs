//! `kto-convert`: preference data of many shapes in, KTO records out.

use std::process::ExitCode;

/// Rows are many small pieces that one thread makes and another frees, which glibc's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    kto_cli::run("kto-convert", |args: &kto_convert::Args| &args.common, kto_convert::run)
}
