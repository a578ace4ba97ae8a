//! Which device a run computes on: what was asked for, what is there, and whether its kernels give right results.

use crate::numeric::Numeric;
use kto_cli::Result;
use kto_kernels::{
    Dense,
    device::self_test,
    gpu::{DeviceInfo, Machine},
};
use std::sync::Arc;

/// What the user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// A GPU if there is one that can be used, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU by its number.
    Cuda(usize),
}

impl Choice {
    /// Reads `auto`, `cpu`, `cuda` or `cuda:N`.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(number))) => Ok(Self::Cuda(number)),
            _ => Err("must be auto, cpu, cuda or cuda:N".into()),
        }
    }
}

/// A GPU that was opened.
pub struct Opened {
    /// The device.
    pub machine: Arc<dyn Machine>,
    /// What it is.
    pub info: DeviceInfo,
}

impl Opened {
    /// Returns the element type that it computes in when nobody says: bf16, or f16 on cards without it.
    pub fn element(&self) -> Dense {
        if self.info.capability >= (8, 0) { Dense::Bf16 } else { Dense::F16 }
    }
}

/// Opens what was asked for; nothing is the processor. Error (69): a driver, library or device that is not there or is too old.
pub fn open(choice: Choice) -> Result<Option<Opened>> {
    match choice {
        Choice::Cpu => Ok(None),
        Choice::Auto => Ok(machine(0).and_then(opened).ok()),
        Choice::Cuda(number) => machine(number).and_then(opened).map(Some).numeric(),
    }
}

fn opened(machine: Arc<dyn Machine>) -> candle_core::Result<Opened> {
    let info = machine.info()?;
    Ok(Opened { machine, info })
}

/// Returns every NVIDIA GPU with the result of its self-test. Error (69) as for [`open`].
pub fn check_all() -> Result<Vec<(DeviceInfo, std::result::Result<(), String>)>> {
    let mut found = Vec::new();
    for number in 0..count().numeric()? {
        let Opened { machine, info } = machine(number).and_then(opened).numeric()?;
        let result = self_test(machine).map_err(|e| e.to_string());
        found.push((info, result));
    }
    Ok(found)
}

#[cfg(feature = "cuda")]
fn count() -> candle_core::Result<usize> {
    kto_kernels::gpu::cuda::count()
}

#[cfg(feature = "cuda")]
fn machine(number: usize) -> candle_core::Result<Arc<dyn Machine>> {
    Ok(kto_kernels::gpu::cuda::Cuda::open(number)?)
}

#[cfg(not(feature = "cuda"))]
fn count() -> candle_core::Result<usize> {
    Err(without_cuda())
}

#[cfg(not(feature = "cuda"))]
fn machine(_: usize) -> candle_core::Result<Arc<dyn Machine>> {
    Err(without_cuda())
}

#[cfg(not(feature = "cuda"))]
fn without_cuda() -> candle_core::Error {
    kto_kernels::gpu::Failure::Missing(
        "this program was built without CUDA".into(),
        "build it with make cuda, or --device cpu".into(),
    )
    .into()
}
