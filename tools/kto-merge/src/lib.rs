//! kto-merge: LoRA adapters merged into their base model, mixed, converted, extracted.
//!
//! Arguments become [`inputs`] and a [`Plan`]; one pass over the weights carries it out. Invariants: the result appears whole or not at all,
//! memory does not grow with the model, the same inputs give the same bytes on any number of threads.

#![forbid(unsafe_code)]

mod args;
mod convert;
mod delta;
mod inputs;
mod keep;
mod low_rank;
mod mix;
mod origin;
mod plan;
mod verify;
mod whole;

pub use args::Args;
pub use plan::Plan;

use kto_cli::{Error, Exit, Result, Ui, atomic, signal};

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    args.check()?;
    signal::install();
    let threads = args.threads.map_or(0, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let done = pool.map_err(Error::threads)?.install(|| match (&args.extract, args.to) {
        (Some(tuned), _) => convert::extract(&args, tuned, ui),
        (None, Some(form)) => convert::adapter(&args, form, ui),
        (None, None) => whole::merge(&args, ui),
    });
    done.map_err(|error| atomic::stopped(error, &args.output))
}
