//! Proof of every operation of the crate, one module per operation.
//!
//! Forward passes are held against short f64 loops written here, backward passes against candle's autograd on composed operations
//! and against central differences, f32 against f64, and any number of threads against one, bit for bit.
//! Deliberately absent: timings, and goldens of other programs except the rotation angles and 8-bit AdamW.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // clippy knows test functions, not their helpers

mod adamw;
mod adamw8;
mod adamw8_golden;
mod attention;
mod attention_layout;
mod attention_refusals;
mod attention_rules;
mod column_sums;
mod dropout;
mod elementwise;
mod gated;
mod layer_norm;
mod logprob;
mod matmul;
mod matmul_bits;
mod matmul_refusals;
mod random;
mod rms_norm;
mod rope;
mod rows;
mod support;
mod threads;
