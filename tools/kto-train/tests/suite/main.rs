//! Tests of kto-train: one binary.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod cli;
mod engine;
mod forms;
mod golden;
mod make;
mod memory;
mod pace;
mod pipeline;
mod resume;
