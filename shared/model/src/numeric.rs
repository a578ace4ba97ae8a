//! From the errors of tensor operations to the tools' one error type.

use kto_cli::{Error, Kind, Result};
use kto_kernels::gpu::Failure;

/// Turns a failed tensor operation into an error: that of the device, or an internal one, as shapes were checked when the model was
/// loaded.
pub(crate) trait Numeric<T> {
    /// Converts the error.
    fn numeric(self) -> Result<T>;
}

impl<T> Numeric<T> for candle_core::Result<T> {
    fn numeric(self) -> Result<T> {
        self.map_err(|e| match &e {
            candle_core::Error::Cuda(inner) => match inner.downcast_ref::<Failure>() {
                Some(failure) => of_device(failure),
                None => Error::new(Kind::Internal, format!("tensor operation: {e}")),
            },
            _ => Error::new(Kind::Internal, format!("tensor operation: {e}")),
        })
    }
}

/// Returns the tools' error for what a device says.
pub(crate) fn of_device(failure: &Failure) -> Error {
    match failure {
        Failure::OutOfMemory { .. } => Error::new(Kind::OutOfMemory, failure.to_string())
            .with_hint("another program may use the device; --memory lower, or --max-length"),
        Failure::Driver(_) => Error::new(Kind::Unavailable, failure.to_string()),
        Failure::Missing(_, hint) => {
            Error::new(Kind::Unavailable, failure.to_string()).with_hint(hint.clone())
        }
    }
}
