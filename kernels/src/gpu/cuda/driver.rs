//! The CUDA driver: whether it is there, its errors as ours, modules and events.

use crate::gpu::machine::{Failure, Mark};
use candle_core::Result;
use cudarc::driver::{
    result::{self as cu, DriverError},
    sys,
};
use std::{
    collections::BTreeMap,
    ffi::{CString, c_void},
};

/// Turns the driver's answer into ours. `what` says what was tried.
pub fn check<T>(answer: std::result::Result<T, DriverError>, what: &str) -> Result<T> {
    answer.map_err(|e| {
        let text = e.error_string().map(|t| t.to_string_lossy().into_owned());
        Failure::Driver(format!("{what}: {} ({:?})", text.unwrap_or_else(|_| "unknown error".into()), e.0))
            .into()
    })
}

fn missing(text: &str) -> candle_core::Error {
    let hint = "install NVIDIA's driver (525 or newer), or --device cpu";
    Failure::Missing(text.into(), hint.into()).into()
}

/// Fails unless the driver is there and answers.
pub fn present() -> Result<()> {
    // SAFETY: loads a library, whose initialisers run.
    if !unsafe { sys::is_culib_present() } {
        return Err(missing("no NVIDIA driver: libcuda.so.1 was not found"));
    }
    match cu::init() {
        Ok(()) => Ok(()),
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(missing("no NVIDIA GPU was found")),
        Err(e) => Err(missing(&format!("the NVIDIA driver does not start: {:?}", e.0))),
    }
}

/// Returns the CUDA version that the driver serves, as "13.0".
pub fn version() -> Result<String> {
    let mut version = 0;
    // SAFETY: writes the integer.
    check(unsafe { sys::cuDriverGetVersion(&mut version) }.result(), "asking for the driver's version")?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// Returns a device's compute capability.
pub fn capability(device: sys::CUdevice) -> Result<(u32, u32)> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let of = |attribute| -> Result<u32> {
        // SAFETY: a device of the driver.
        let number =
            check(unsafe { cu::device::get_attribute(device, attribute) }, "asking for a capability")?;
        Ok(number as u32)
    };
    Ok((of(MAJOR)?, of(MINOR)?))
}

/// Kernels as the driver has compiled them.
pub struct Module {
    module: sys::CUmodule,
    functions: BTreeMap<String, sys::CUfunction>,
}

impl Module {
    /// Compiles PTX for the device of the current context.
    pub fn load(ptx: &str) -> Result<Self> {
        let text = CString::new(ptx).map_err(candle_core::Error::wrap)?;
        // SAFETY: text that ends with a zero.
        let module = unsafe { cu::module::load_data(text.as_ptr().cast::<c_void>()) };
        Ok(Self { module: check(module, "compiling the kernels")?, functions: BTreeMap::new() })
    }

    /// Returns a kernel by its name.
    pub fn function(&mut self, name: &str) -> Result<sys::CUfunction> {
        if let Some(function) = self.functions.get(name) {
            return Ok(*function);
        }
        let text = CString::new(name).map_err(candle_core::Error::wrap)?;
        // SAFETY: a module that is loaded.
        let function = check(unsafe { cu::module::get_function(self.module, text) }, name)?;
        self.functions.insert(name.into(), function);
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded, and no kernel of it is queued any more.
        let _ = unsafe { cu::module::unload(self.module) };
    }
}

/// A point in a stream.
pub struct Event(sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Returns the point that a stream ends at now.
    pub fn record(stream: sys::CUstream) -> Result<Self> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = Self(check(cu::event::create(flags), "creating an event")?);
        // SAFETY: event and stream of this context.
        check(unsafe { cu::event::record(event.0, stream) }, "recording an event")?;
        Ok(event)
    }

    /// Returns the event of a mark.
    pub fn of(mark: &Mark) -> Result<&Self> {
        match mark.downcast_ref() {
            Some(event) => Ok(event),
            None => Err(Failure::Driver("a mark of another device".into()).into()),
        }
    }

    /// Lets what a stream gets from now on wait.
    pub fn follow(&self, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream of this context.
        check(unsafe { cu::stream::wait_event(stream, self.0, flags) }, "ordering the streams")
    }

    /// Waits.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: an event of this context.
        check(unsafe { cu::event::synchronize(self.0) }, "waiting for the device")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the driver keeps an event until the work that waits for it has seen it.
        let _ = unsafe { cu::event::destroy(self.0) };
    }
}
