//! Tests of kto-train: one binary.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod adapters;
mod changes;
mod cli;
mod control;
mod disk;
mod engine;
mod evaluation;
mod families;
mod forms;
mod golden;
mod kill;
mod make;
mod mapped;
mod memory;
mod names;
mod nonfinite;
mod optimizer;
mod pace;
mod pipeline;
mod resume;
mod whole;
