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

/// The table as `--help` and the man page show it. [`crate::run`] appends it to every tool's long help.
pub const EXIT_STATUS: &str = "\
Exit status:
    0  ok (also: the reader closed our standard output)
    1  assertion of kto-eval --fail-if not met
    2  usage
   65  bad input data
   66  input missing
   69  device or back end unavailable
   70  internal error
   71  out of memory
   73  cannot create output
   74  I/O error
   75  try again (lock held)
   78  configuration or resume mismatch
  129  SIGHUP
  130  SIGINT
  143  SIGTERM";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn the_table_lists_every_code() {
        use Kind::*;
        let kinds = [
            Usage,
            Data,
            NoInput,
            Unavailable,
            Internal,
            OutOfMemory,
            CantCreate,
            Io,
            TryAgain,
            Config,
            ClosedPipe,
            HungUp,
            Interrupted,
            Terminated,
        ];
        for code in kinds.iter().map(|k| k.code()).chain([Exit::Ok.code(), Exit::AssertionFailed.code()]) {
            let listed =
                EXIT_STATUS.lines().skip(1).filter(|l| l.trim().starts_with(&format!("{code} "))).count();
            assert_eq!(listed, 1, "code {code}");
        }
    }
}
