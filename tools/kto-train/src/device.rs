//! The device of a run: opened before anything is planned, because the plan depends on its memory and element type.

use crate::{
    args::{Args, ElementKind},
    plan::Plan,
};
use kto_cli::{Error, Exit, Result, number::Size, output::Output, units};
use kto_kernels::{
    Dense,
    device::Device,
    gpu::{DeviceInfo, Gpu},
};
use kto_model::{
    devices::{self, Choice, Opened},
    whole,
};

/// Share of a GPU's free memory that a run takes when nobody says.
const DEFAULT_SHARE: f64 = 0.9;

/// Where a run computes.
pub enum RunDevice {
    /// The processor, in f32.
    Cpu,
    /// A GPU; without one, a plan for one.
    Gpu(Option<Opened>, Dense),
}

impl RunDevice {
    /// Opens what --device asks for. A dry run with --memory plans for a GPU that is not there.
    /// Errors: (2) --dtype without a GPU; (69) no such device.
    pub fn choose(args: &Args) -> Result<Self> {
        let element = args.dtype.map(Dense::from);
        let chosen = match devices::open(args.device) {
            Ok(None) => Self::Cpu,
            Ok(Some(opened)) => {
                let own = opened.element();
                if element == Some(Dense::Bf16) && own != Dense::Bf16 {
                    let (major, minor) = opened.info.capability;
                    let text = format!(
                        "--dtype bf16: {} (compute capability {major}.{minor}) has none",
                        opened.info.name
                    );
                    return Err(Error::usage(text).with_hint("--dtype f16, or leave it out"));
                }
                Self::Gpu(Some(opened), element.unwrap_or(own))
            }
            Err(_)
                if args.dry_run
                    && matches!((args.device, args.memory), (Choice::Cuda(_), Some(Size::Bytes(_)))) =>
            {
                Self::Gpu(None, element.unwrap_or(Dense::Bf16))
            }
            Err(e) => return Err(e),
        };
        match (&chosen, args.dtype) {
            (Self::Cpu, Some(kind)) if kind != ElementKind::F32 => {
                Err(Error::usage("--dtype is for GPUs: the processor computes in f32"))
            }
            _ => Ok(chosen),
        }
    }

    /// Fails (69) when the plan asks for what is not computed there.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        if !plan.typed.whole.is_empty() && matches!(self, Self::Gpu(..)) {
            return Err(whole::not_on_gpu());
        }
        Ok(())
    }

    /// Returns what the plan says of it.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu f32".into(),
            Self::Gpu(_, Dense::Bf16) => "cuda bf16".into(),
            Self::Gpu(_, Dense::F16) => "cuda f16".into(),
            Self::Gpu(_, Dense::F32) => "cuda f32".into(),
        }
    }

    /// Returns the bytes of a GPU that a run may take, and where the number comes from.
    pub fn limit(&self, asked: Option<Size>) -> Option<(u64, String)> {
        let Self::Gpu(opened, _) = self else { return None };
        let free = opened.as_ref().map_or(0, |o| o.info.memory.1);
        let share = |share: f64| (free as f64 * share) as u64;
        Some(match asked {
            // Others use the card too: a plan beyond what they leave would end in the middle of the upload.
            Some(Size::Bytes(bytes)) if opened.is_some() && free < bytes => {
                (free, "what is free, less than --memory".into())
            }
            Some(Size::Bytes(bytes)) => (bytes, "--memory".into()),
            Some(Size::Share(part)) => (share(part), format!("{:.0} % of what is free", part * 100.0)),
            None => (share(DEFAULT_SHARE), format!("{:.0} % of what is free", DEFAULT_SHARE * 100.0)),
        })
    }

    /// Returns the device for the engine, of which at most `limit` bytes are taken.
    pub fn for_engine(&self, limit: u64) -> Option<Device> {
        let Self::Gpu(Some(opened), element) = self else { return None };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Some(Device::Gpu(Gpu::new(opened.machine.clone(), limit), *element))
    }
}

/// Prints the GPUs and what their self-tests say. Error (69): none, or one whose kernels are wrong.
pub fn check() -> Result<Exit> {
    let found = devices::check_all()?;
    let mut out = Output::create(None)?;
    let mut wrong = None;
    for (number, (info, result)) in found.iter().enumerate() {
        let DeviceInfo { name, capability: (major, minor), memory: (all, free), versions } = info;
        let (all, free) = (units::size(*all), units::size(*free));
        let result = match result {
            Ok(()) => "kernels right",
            Err(e) => wrong.get_or_insert(format!("cuda:{number}: {e}")),
        };
        let line = format!(
            "cuda:{number}  {name}, compute capability {major}.{minor}, {free} of {all} free, {versions}: {result}\n"
        );
        out.write(line.as_bytes())?;
    }
    out.finish()?;
    match wrong {
        None => Ok(Exit::Ok),
        Some(text) => Err(Error::new(kto_cli::Kind::Unavailable, text)),
    }
}
