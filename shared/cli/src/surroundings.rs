//! Variables of other programs that the tools obey, such as those of the Hugging Face cache.

use std::{env, ffi::OsString};

/// Returns a variable of the environment; None when it is not set or empty.
pub fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}
