//! Kernels on an NVIDIA GPU, through candle's device. Not run yet: no machine at hand had one.

use crate::{Buffer, Call, Machine};
use candle_core::{
    CudaDevice, Device, Result, bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg},
    },
};
use kto_kernels::{
    Dense,
    gpu::{ptx, type_name},
};

/// An NVIDIA GPU.
pub struct Cuda(CudaDevice);

impl Cuda {
    /// Opens device `ordinal`. Fails without a driver or a card.
    pub fn new(ordinal: usize) -> Result<Self> {
        Device::new_cuda(ordinal)?.as_cuda_device().cloned().map(Self)
    }
}

impl Machine for Cuda {
    fn run(&self, call: &Call, buffers: &mut [Buffer]) -> Result<()> {
        let types = [Dense::F32, Dense::Bf16, Dense::F16];
        let ends = |t: &&Dense| call.kernel.ends_with(&format!("_{}", type_name(**t)));
        let Some(element) = types.iter().find(ends) else { bail!("{}: no such type", call.kernel) };
        let module = format!("kto_{}", type_name(*element));
        let kernel = self.0.get_or_load_custom_func(call.kernel, &module, ptx(*element))?;
        let stream = self.0.cuda_stream();
        let mut there = Vec::with_capacity(buffers.len());
        for buffer in &*buffers {
            there.push(stream.clone_htod(buffer.whole()).w()?);
        }
        let at = |place: &usize| there[*place].device_ptr(&stream).0 + Buffer::OFFSET as u64;
        let pointers: Vec<u64> = call.places.iter().map(at).collect();
        let mut launch = kernel.builder();
        for pointer in &pointers {
            launch.arg(pointer);
        }
        let Some(params) = call.params.first() else { bail!("{}: no parameters", call.kernel) };
        launch.arg(params);
        let grid_dim = (call.grid.blocks, 1, 1);
        let config = LaunchConfig { grid_dim, block_dim: (call.grid.threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: pointers to memory that lives until it is copied back, then the address of the parameters, as many bytes as
        // the kernel takes: the emulator compares numbers and sizes for the same calls.
        unsafe { launch.launch(config) }.w()?;
        for (buffer, there) in buffers.iter_mut().zip(&there) {
            stream.memcpy_dtoh(there, buffer.whole_mut()).w()?;
        }
        stream.synchronize().w()
    }
}
