//! SHA-256 in hexadecimal: fingerprints of data, tokenizers, templates and models.

use sha2::{Digest, Sha256};
use std::{fmt::Write as _, io};

/// Returns the SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    let mut hash = Sha256Hex::new();
    hash.update(bytes);
    hash.finish()
}

/// A SHA-256 computed piece by piece; also an [`io::Write`].
#[derive(Clone, Default)]
pub struct Sha256Hex {
    state: Sha256,
}

impl Sha256Hex {
    /// Returns the hash of nothing so far.
    pub fn new() -> Self {
        Self::default()
    }
    /// Takes in `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
    }
    /// Returns the 64 digits.
    pub fn finish(self) -> String {
        let mut text = String::with_capacity(64);
        for byte in self.state.finalize() {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

impl io::Write for Sha256Hex {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_fips_180() {
        assert_eq!(sha256_hex(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let mut pieces = Sha256Hex::new();
        pieces.update(b"a");
        pieces.update(b"bc");
        assert_eq!(pieces.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
