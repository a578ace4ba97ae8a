//! The forms in which a tensor can be written, and the tensors of a file that each becomes.

use crate::source::kernel_dtype;
use kto_cli::{Error, Result};
use kto_formats::{
    bnb::{self, FourBitKind, NESTED_BLOCK, Part, QuantState, int8},
    mlx,
    safetensors_out::TensorSpec,
};
use kto_kernels::{
    Dense,
    quant::{Affine, Codec, Float, FourBit, Ggml, Int8, Kind},
};
use safetensors::Dtype;

/// A form of a tensor of floats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// F32, F16 or BF16.
    Float(Dtype),
    /// 4 bits of bitsandbytes.
    FourBit {
        /// Which values.
        kind: FourBitKind,
        /// Values that share a scale.
        block: usize,
        /// Whether the scales are in 8 bits.
        nested: bool,
        /// What decoded values are rounded to.
        dtype: Dtype,
    },
    /// 8 bits of bitsandbytes.
    Int8,
    /// Affine quantization of MLX.
    Affine {
        /// Bits of a code.
        bits: usize,
        /// Values that share a scale.
        group: usize,
        /// Dtype of the scales.
        dtype: Dtype,
    },
    /// A block form of ggml; in GGUF files only.
    Ggml(Ggml),
}

/// Where the bytes of a tensor in a file come from.
pub(crate) enum Origin {
    /// A plane of the codec.
    Plane(usize),
    /// Known at once.
    Bytes(Vec<u8>),
    /// Double quantization of the plane of scales.
    NestedCodes,
    /// The same, the scales of the scales.
    NestedScales,
    /// The text of the state, known at the end.
    State(QuantState),
}

impl Form {
    /// Returns the codec for rows of this length.
    pub fn codec(self, columns: usize) -> Box<dyn Codec> {
        let dense = |dtype| kernel_dtype(dtype).unwrap_or(Dense::F32);
        match self {
            Self::Float(dtype) => Box::new(Float(dense(dtype))),
            Self::FourBit { kind, block, .. } => {
                let kind = if kind == FourBitKind::Nf4 { Kind::Nf4 } else { Kind::Fp4 };
                Box::new(FourBit { kind, block })
            }
            Self::Int8 => Box::new(Int8 { columns }),
            Self::Affine { bits, group, dtype } => Box::new(Affine { bits, group, dtype: dense(dtype) }),
            Self::Ggml(form) => Box::new(form),
        }
    }

    /// Returns why a tensor of this shape cannot have this form, if so.
    pub fn unfit(self, shape: &[usize]) -> Option<String> {
        let columns = shape.last().copied().unwrap_or(1);
        match self {
            Self::Float(_) => None,
            _ if shape.len() != 2 => Some("not a matrix".into()),
            Self::FourBit { .. } | Self::Int8 => None,
            Self::Affine { group, .. } if columns.is_multiple_of(group) => None,
            Self::Affine { group, .. } => {
                Some(format!("{columns} columns are no multiple of the group of {group}"))
            }
            Self::Ggml(form) if columns.is_multiple_of(form.block().0) => None,
            Self::Ggml(form) => {
                Some(format!("{columns} columns are no multiple of the block of {}", form.block().0))
            }
        }
    }

    /// Returns the tensors that the weight `name` becomes in a safetensors file.
    pub(crate) fn tensors(self, name: &str, shape: &[usize]) -> Result<Vec<(TensorSpec, Origin)>> {
        let matrix = || match *shape {
            [rows, columns] => Ok([rows, columns]),
            _ => Err(Error::internal(format!("shape {shape:?} is no matrix"))),
        };
        let planes = |specs: [TensorSpec; 3]| {
            specs.into_iter().enumerate().map(|(i, spec)| (spec, Origin::Plane(i))).collect()
        };
        Ok(match self {
            Self::Float(dtype) => vec![(TensorSpec::new(name, dtype, shape), Origin::Plane(0))],
            Self::FourBit { kind, block, nested, dtype } => {
                let nested_state = nested.then_some((NESTED_BLOCK, 0.0));
                let state = QuantState { kind, dtype, shape: shape.to_vec(), block, nested: nested_state };
                let codec = if kind == FourBitKind::Nf4 { Kind::Nf4 } else { Kind::Fp4 };
                let origin = |part| match part {
                    Part::Codes => Origin::Plane(0),
                    Part::Scales if nested => Origin::NestedCodes,
                    Part::Scales => Origin::Plane(1),
                    Part::Map => Origin::Bytes(floats(&codec.values())),
                    Part::NestedScales => Origin::NestedScales,
                    Part::NestedMap => Origin::Bytes(floats(kto_kernels::quant::dynamic_map::signed())),
                    Part::State => Origin::State(state.clone()),
                };
                bnb::specs(name, &state).into_iter().map(|(spec, part)| (spec, origin(part))).collect()
            }
            Self::Int8 => {
                let [codes, scales, mark] = int8::specs(name, matrix()?);
                vec![(codes, Origin::Plane(0)), (scales, Origin::Plane(1)), (mark, Origin::Bytes(vec![0]))]
            }
            Self::Affine { bits, group, dtype } => planes(mlx::specs(name, matrix()?, bits, group, dtype)),
            Self::Ggml(_) => return Err(Error::internal("a form of ggml in a safetensors file")),
        })
    }

    /// Returns the bytes of all tensors that the weight `name` becomes in a safetensors file: tables and texts too, the most where
    /// their lengths depend on the values.
    pub fn stored_bytes(self, name: &str, shape: &[usize]) -> Result<u64> {
        Ok(self.tensors(name, shape)?.iter().map(|(spec, _)| spec.bytes()).sum())
    }

    /// Returns whether [`Form::stored_bytes`] is what is written, whatever the values.
    pub fn is_exact(self) -> bool {
        !matches!(self, Self::FourBit { nested: true, .. })
    }

    /// Returns the bytes that a tensor of this shape takes, without constants.
    pub fn bytes(self, shape: &[usize]) -> u64 {
        let (n, columns) = (shape.iter().product(), shape.last().copied().unwrap_or(1));
        let planes = self.codec(columns).planes(n).map(|n| n as u64);
        match self {
            Self::FourBit { nested: true, .. } => planes[0] + planes[1] / 4,
            _ => planes.iter().sum(),
        }
    }
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
