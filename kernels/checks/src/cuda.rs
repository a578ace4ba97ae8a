//! The checks of the kernels on an NVIDIA GPU.

use crate::{Buffer, Call, Machine};
use candle_core::{Result, bail};
use kto_kernels::{
    Dense,
    gpu::{Machine as _, cuda::Cuda, type_name},
};
use std::sync::Arc;

/// An NVIDIA GPU.
pub struct OnCuda(pub Arc<Cuda>);

impl Machine for OnCuda {
    fn run(&self, call: &Call, buffers: &mut [Buffer]) -> Result<()> {
        let types = [Dense::F32, Dense::Bf16, Dense::F16];
        let of = |t: &Dense| Some((*t, call.kernel.strip_suffix(type_name(*t))?.strip_suffix('_')?));
        let Some((element, kernel)) = types.iter().find_map(of) else {
            bail!("{}: no such type", call.kernel)
        };
        let mut there = Vec::with_capacity(buffers.len());
        for buffer in &*buffers {
            let at = self.0.allocate(buffer.whole().len())?;
            self.0.upload(at, buffer.whole())?;
            there.push(at);
        }
        let pointers: Vec<u64> =
            call.places.iter().map(|place| there[*place] + Buffer::OFFSET as u64).collect();
        self.0.launch(kernel, element, call.grid, &pointers, call.params)?;
        for (buffer, at) in buffers.iter_mut().zip(there) {
            self.0.download(at, buffer.whole_mut())?;
            self.0.free(at);
        }
        Ok(())
    }
}
