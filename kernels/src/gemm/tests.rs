//! Internals of the matrix product: instruction sets, targets of any strides, the memory around them.
