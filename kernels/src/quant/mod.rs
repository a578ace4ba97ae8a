//! Quantization codecs.
