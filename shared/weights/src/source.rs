//! A base weight in the form that its file holds: found by name, and wrapped for the kernels without a copy.
//!
//! Called by kto-model (shapes, from headers alone, and the frozen base) and by [`crate::Weight`]. The form is decided for each weight, because
//! mixed checkpoints exist. Deliberately absent: what the bytes of a form mean (`kto-formats` and the kernels know).

use kto_cli::{Error, Kind, Result, escape};
use kto_formats::{
    bnb::{Int8Tensor, Nf4Tensor, Scales},
    mlx::{AffineTensor, MicroTensor, Mode},
    model_dir::ModelDir,
    tensors::{TensorStore, TensorView},
};
use kto_kernels::{AffineParts, Bytes, Dense, MicroFloat, Nf4Parts, Nf4Scales, Stored};
use safetensors::Dtype;

/// A matrix as stored.
pub enum Source<'a> {
    /// As floats.
    Float(TensorView<'a>),
    /// 4-bit codes of bitsandbytes.
    Nf4(Nf4Tensor<'a>),
    /// 8-bit codes of bitsandbytes.
    Int8(Int8Tensor<'a>),
    /// Codes of MLX.
    Affine(AffineTensor<'a>),
    /// Small floats of MLX.
    Micro(MicroTensor<'a>),
}

impl<'a> Source<'a> {
    /// Returns the weight `name`. Errors (65): it is missing, or a part of a quantized form does not fit.
    pub fn find(directory: &'a ModelDir, name: &str) -> Result<Self> {
        let store = &directory.tensors;
        if let Some(packed) = Nf4Tensor::find(store, name)? {
            return Ok(Self::Nf4(packed));
        }
        if let Some(coded) = Int8Tensor::find(store, name)? {
            return Ok(Self::Int8(coded));
        }
        if let Some(packed) = MicroTensor::find(directory, name)? {
            return Ok(Self::Micro(packed));
        }
        Ok(match AffineTensor::find(directory, name)? {
            Some(packed) => Self::Affine(packed),
            None => Self::Float(store.require(name)?),
        })
    }

    /// Fails (65), naming the weight, unless it is a (rows, columns) matrix.
    pub fn expect_shape(&self, name: &str, rows: usize, columns: usize) -> Result<()> {
        let found = match self {
            Self::Float(view) => return view.expect_shape(&[rows, columns]),
            Self::Int8(coded) => return coded.codes.expect_shape(&[rows, columns]),
            Self::Nf4(packed) => &packed.state.shape[..],
            Self::Affine(packed) => &packed.shape,
            Self::Micro(packed) => &packed.shape,
        };
        if *found == [rows, columns] {
            return Ok(());
        }
        let name = escape(name);
        Err(Error::data(format!("tensor \"{name}\" has shape {found:?}, expected [{rows}, {columns}]")))
    }

    /// Returns the names of the tensors whose bytes [`Source::wrap`] leaves in the file.
    pub fn parts(&self, name: &str) -> Vec<String> {
        let layer = name.strip_suffix(".weight").unwrap_or(name);
        let mut parts = vec![name.to_string()];
        match self {
            Self::Float(_) => {}
            Self::Nf4(_) => parts.push(format!("{name}.absmax")),
            Self::Int8(_) => parts.push(format!("{layer}.SCB")),
            Self::Affine(_) => parts.extend(["scales", "biases"].map(|part| format!("{layer}.{part}"))),
            Self::Micro(_) => parts.push(format!("{layer}.scales")),
        }
        parts
    }

    /// Wraps the matrix for the kernels. Errors (65): a dtype that is no float, or another shape.
    pub fn wrap(self, store: &TensorStore, name: &str, rows: usize, columns: usize) -> Result<Stored> {
        self.expect_shape(name, rows, columns)?;
        let parts = self.parts(name);
        let bytes = |i: usize| bytes(store, &parts[i]);
        let wrapped = match self {
            Self::Float(view) => Stored::dense(float(&view)?, bytes(0)?, rows, columns),
            Self::Nf4(packed) => {
                let block = packed.state.block;
                let codes = bytes(1)?;
                let scales = match packed.scales {
                    Scales::Plain(view) => Nf4Scales::Plain(float(&view)?, codes),
                    Scales::Nested { map, absmax, block, offset, .. } => {
                        Nf4Scales::Nested { codes, map, absmax, block, offset }
                    }
                };
                let round = kernel_dtype(packed.state.dtype).unwrap_or(Dense::F32);
                let parts = Nf4Parts { packed: bytes(0)?, code: packed.map, scales, block, round };
                Stored::nf4(parts, rows, columns)
            }
            Self::Int8(coded) => Stored::int8(bytes(0)?, float(&coded.scales)?, bytes(1)?, rows, columns),
            Self::Affine(packed) => {
                let AffineTensor { scales, bits, group, .. } = packed;
                let (dtype, packed, scales, biases) = (float(&scales)?, bytes(0)?, bytes(1)?, bytes(2)?);
                Stored::affine(AffineParts { packed, dtype, scales, biases, bits, group }, rows, columns)
            }
            Self::Micro(packed) => {
                let kind = match packed.mode {
                    Mode::Nvfp4 => MicroFloat::Nvfp4,
                    Mode::Mxfp8 => MicroFloat::Mxfp8,
                    Mode::Mxfp4 | Mode::Affine => MicroFloat::Mxfp4,
                };
                Stored::micro(kind, bytes(0)?, bytes(1)?, rows, columns)
            }
        };
        wrapped.map_err(|e| Error::new(Kind::Internal, format!("tensor \"{}\": {e}", escape(name))))
    }
}

/// The kernels' name of a float dtype. Error 65 that names the tensor for any other.
pub(crate) fn float(view: &TensorView) -> Result<Dense> {
    match kernel_dtype(view.dtype) {
        Some(dtype) => Ok(dtype),
        None => {
            Err(view.to_f32().err().unwrap_or_else(|| Error::internal("a float that kernels do not know")))
        }
    }
}

pub(crate) fn kernel_dtype(dtype: Dtype) -> Option<Dense> {
    match dtype {
        Dtype::F32 => Some(Dense::F32),
        Dtype::F16 => Some(Dense::F16),
        Dtype::BF16 => Some(Dense::Bf16),
        _ => None,
    }
}

pub(crate) fn bytes(store: &TensorStore, name: &str) -> Result<Bytes> {
    let found = store.bytes(name).and_then(|(map, range)| Bytes::new(map, range));
    found.ok_or_else(|| Error::internal(format!("tensor \"{}\" lies outside its file", escape(name))))
}
