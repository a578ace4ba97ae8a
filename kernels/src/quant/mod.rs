//! Quantization codecs: pure functions on slices, no tensors and no files.
//!
//! Called by kto-quantize and kto-merge through [`Codec`], and by the readers of quantized weights. A codec knows the bytes of one
//! form and nothing of names, files or threads. Deliberately absent: calibration; every codec rounds values on their own.

mod affine;
pub mod dynamic_map;
mod float;
mod four_bit;
pub mod ggml;
mod int8;
pub mod nf4;

pub use affine::Affine;
pub use float::Float;
pub use four_bit::{FourBit, Kind};
pub use ggml::Ggml;
pub use int8::Int8;

/// Arrays of bytes that a form consists of, at most: codes, scales, biases.
pub const PLANES: usize = 3;

/// A form in which values are stored: units of values that become bytes in one to three planes.
///
/// A tensor is encoded in pieces that begin at multiples of [`Codec::unit`]; only the last one may be no multiple of it. The bytes do
/// not depend on the pieces.
pub trait Codec: Send + Sync {
    /// Returns how many values belong together.
    fn unit(&self) -> usize;
    /// Returns the bytes of each plane that the first `n` values take; 0 for planes that the form does not have.
    fn planes(&self, n: usize) -> [usize; PLANES];
    /// Encodes finite values into planes of the sizes that [`Codec::planes`] gives. Returns whether everything stored is
    /// finite: `false` when the values are too large for the form.
    fn encode(&self, values: &[f32], planes: [&mut [u8]; PLANES]) -> bool;
    /// Decodes what [`Codec::encode`] made, to what readers of the form see.
    fn decode(&self, planes: [&[u8]; PLANES], out: &mut [f32]);
}
