//! Weights of a model: read from any form that files have them in, and written in any form.
//!
//! Called by kto-quantize and kto-merge, which say what becomes of each tensor, and by kto-model, which wraps frozen weights for its
//! kernels. Data flows one way: [`Source`] → [`Weight`] (or other [`Values`]) → [`encode()`] with a codec of `kto-kernels` → [`Layout`].
//! Invariants: a tensor goes through memory a piece at a time; the bytes depend neither on the number of threads nor on where an earlier
//! run stopped; nothing that is not finite is written. Deliberately absent: which tensor gets which form (the tools decide).

#![forbid(unsafe_code)]

mod encode;
mod errors;
mod form;
pub mod gguf;
mod layout;
mod resume;
pub mod roles;
mod source;
mod values;
mod weight;

pub use encode::{Keep, encode};
pub use errors::Errors;
pub use form::Form;
pub use layout::{Content, Item, Layout, MAX_SHARD, Written};
pub use resume::{resume, source};
pub use source::Source;
pub use values::{Changed, Held, Values};
pub use weight::{Weight, check_finite_all, weights};
