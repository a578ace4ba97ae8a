//! The name of the running tool, for lines that are written where no [`crate::Ui`] is at hand.

use std::sync::OnceLock;

static NAME: OnceLock<&'static str> = OnceLock::new();

/// Sets the name; the first call counts.
pub(crate) fn set_name(name: &'static str) {
    let _ = NAME.set(name);
}

/// Returns the name, or "kto" in a process that is none of the tools.
pub fn name() -> &'static str {
    NAME.get().copied().unwrap_or("kto")
}
