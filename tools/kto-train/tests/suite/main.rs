//! Tests of kto-train: one binary.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod cli;
mod engine;
mod forms;
mod golden;
mod memory;
mod optimizer;
mod pace;
mod pipeline;
mod resume;
