//! What a sweep on a GPU needs beside its work space: the frozen weights, resident or streamed, and the adapter with its gradient.

pub(crate) mod adapter;
pub(crate) mod weights;
