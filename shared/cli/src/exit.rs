//! The one exit-code table of the KTO tools.

/// How a tool that did not fail ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: the job is done.
    Ok,
    /// 1: an assertion of `kto-eval --fail-if` was not met.
    AssertionFailed,
}

impl Exit {
    /// Returns the process exit code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::AssertionFailed => 1,
        }
    }
}
