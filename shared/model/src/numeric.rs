//! From the errors of tensor operations to the tools' one error type.

use kto_cli::{Error, Kind, Result};

/// Turns a failed tensor operation into an internal error: shapes were checked when the model was loaded.
pub(crate) trait Numeric<T> {
    /// Converts the error.
    fn numeric(self) -> Result<T>;
}

impl<T> Numeric<T> for candle_core::Result<T> {
    fn numeric(self) -> Result<T> {
        self.map_err(|e| Error::new(Kind::Internal, format!("tensor operation: {e}")))
    }
}
