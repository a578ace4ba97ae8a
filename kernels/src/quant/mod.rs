//! Quantization codecs: pure functions on slices, no tensors and no files.
//!
//! Called by kto-quantize and by the readers of quantized weights.

pub mod dynamic_map;
pub mod nf4;
