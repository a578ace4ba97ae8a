//! Kernels launched on NVIDIA GPUs through candle's device: the pattern, with `rms_norm`.
//!
//! The modules are compiled to PTX for compute capability 8.0 when the crate is built (`build.rs`); a driver compiles them for
//! its card when the first kernel of a module is asked for. Not run on a GPU yet.

use super::{Grid, RmsNorm};
use crate::{Dense, gpu::type_name};
use candle_core::{
    CpuStorage, CudaStorage, DType, InplaceOp3, Layout, Result, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::driver::{CudaView, CudaViewMut, LaunchConfig, PushKernelArg},
    },
};
use half::{bf16, f16};

/// A Rust type whose kernels exist.
pub(crate) trait Element: CudaDType {
    /// The type in the dialect.
    const DENSE: Dense;
    /// The module's text.
    const PTX: &'static str;
}

macro_rules! element {
    ($type:ty, $dense:ident, $name:literal) => {
        impl Element for $type {
            const DENSE: Dense = Dense::$dense;
            const PTX: &'static str = include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx"));
        }
    };
}
element!(f32, F32, "f32");
element!(bf16, Bf16, "bf16");
element!(f16, F16, "f16");

/// Returns the PTX of all kernels for one type.
pub fn ptx(element: Dense) -> &'static str {
    match element {
        Dense::F32 => f32::PTX,
        Dense::Bf16 => bf16::PTX,
        Dense::F16 => f16::PTX,
    }
}

/// Returns the memory of a contiguous tensor for reading.
fn view<'a, T: Element>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let all = storage.as_cuda_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) if end <= all.len() => Ok(all.slice(start..end)),
        _ => bail!(
            "expected a contiguous tensor, found {:?} with strides {:?}",
            layout.shape(),
            layout.stride()
        ),
    }
}

/// Returns the memory of a contiguous tensor for writing.
fn view_mut<'a, T: Element>(storage: &'a mut CudaStorage, layout: &Layout) -> Result<CudaViewMut<'a, T>> {
    let all = storage.as_cuda_slice_mut::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) if end <= all.len() => Ok(all.slice_mut(start..end)),
        _ => bail!(
            "expected a contiguous tensor, found {:?} with strides {:?}",
            layout.shape(),
            layout.stride()
        ),
    }
}

impl Grid {
    fn config(self) -> LaunchConfig {
        LaunchConfig { grid_dim: (self.blocks, 1, 1), block_dim: (self.threads, 1, 1), shared_mem_bytes: 0 }
    }
}

struct Norm {
    p: RmsNorm,
    grid: Grid,
}

/// As [`crate::rms_norm`], whose checks of shapes and types come first.
pub(crate) fn rms_norm(out: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<()> {
    let (rows, columns) = x.dims2()?;
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let p = RmsNorm {
        rows: rows as u64,
        columns: u32::try_from(columns).map_err(candle_core::Error::wrap)?,
        eps: eps as f32,
    };
    out.inplace_op3(x, w, &Norm { p, grid: Grid::rows(rows, columns) })
}

impl Norm {
    fn run<T: Element>(
        &self,
        (out, out_layout): (&mut CudaStorage, &Layout),
        (x, x_layout): (&CudaStorage, &Layout),
        (w, w_layout): (&CudaStorage, &Layout),
    ) -> Result<()> {
        let name = type_name(T::DENSE);
        let device = out.device().clone();
        let kernel =
            device.get_or_load_custom_func(&format!("rms_norm_{name}"), &format!("kto_{name}"), T::PTX)?;
        let (mut y, x, w) =
            (view_mut::<T>(out, out_layout)?, view::<T>(x, x_layout)?, view::<T>(w, w_layout)?);
        let mut call = kernel.builder();
        call.arg(&mut y).arg(&x).arg(&w).arg(&self.p);
        // SAFETY: the arguments are those of the kernel, in order; shapes were compared with the parameters, and the kernel stays
        // inside them for any grid, as the emulator shows.
        unsafe { call.launch(self.grid.config()) }.w()?;
        Ok(())
    }
}

impl InplaceOp3 for Norm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        _: &mut CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<()> {
        bail!("tensors on the CPU do not come here")
    }

    fn cuda_fwd(
        &self,
        out: &mut CudaStorage,
        out_layout: &Layout,
        x: &CudaStorage,
        x_layout: &Layout,
        w: &CudaStorage,
        w_layout: &Layout,
    ) -> Result<()> {
        let (out, x, w) = ((out, out_layout), (x, x_layout), (w, w_layout));
        match x.0.dtype() {
            DType::F32 => self.run::<f32>(out, x, w),
            DType::BF16 => self.run::<bf16>(out, x, w),
            DType::F16 => self.run::<f16>(out, x, w),
            other => bail!("rms_norm: kernels work in f32, bf16 and f16, not {other:?}"),
        }
    }
}
