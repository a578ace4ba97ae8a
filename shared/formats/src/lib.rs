//! Every file format that the KTO tools read and write. No tensors, no devices.
