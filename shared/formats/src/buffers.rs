//! Large buffers that are used again: fresh pages cost more than what is done with the bytes in them.

use std::{
    mem,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

/// Where buffers wait for their next use. They come back by themselves.
#[derive(Clone)]
pub struct Buffers {
    waiting: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Room of a new buffer.
    capacity: usize,
    /// A buffer that has grown beyond this is given up.
    most: usize,
}

impl Buffers {
    /// Buffers with room for `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self { waiting: Arc::default(), capacity, most: 4 * capacity }
    }

    /// Returns an empty buffer.
    pub fn take(&self) -> Buffer {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = waiting.unwrap_or_else(|| Vec::with_capacity(self.capacity));
        Buffer { bytes, home: Some(self.clone()) }
    }
}

/// A buffer that goes back where it came from.
#[derive(Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    home: Option<Buffers>,
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, home: None }
    }
}

impl Deref for Buffer {
    type Target = Vec<u8>;
    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.take().filter(|home| self.bytes.capacity() <= home.most) else { return };
        let mut bytes = mem::take(&mut self.bytes);
        bytes.clear();
        home.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_empty_unless_they_have_grown() {
        let buffers = Buffers::new(10);
        let mut one = buffers.take();
        one.extend_from_slice(b"0123456789");
        let place = one.as_ptr();
        drop(one);
        let mut again = buffers.take();
        assert!(again.is_empty() && again.as_ptr() == place);
        again.resize(1000, 0);
        drop(again);
        assert!(buffers.take().capacity() < 1000);
    }
}
