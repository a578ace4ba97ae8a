//! The base's weights to the last bit: a hash over all of them, which a resumed run is compared by.
//!
//! The fingerprint of a model is made of samples, so that every tool can tell a model at once. A run that goes on for hours reads
//! every byte anyway, so it can know more. It hashes them once; a later process does so again when the files are not the ones that
//! were hashed ([`FileStamp`]), and always with `--resume=strict`. Called before a run is looked at or begun, not for a dry run.

use crate::{args::Args, resume::Resume, stored::Stored};
use kto_cli::{
    Error, Result, Ui,
    hash::{Sha256Hex, sha256_hex},
    signal,
};
use kto_formats::{
    model_dir::ModelDir,
    tensors::{FileStamp, TensorStore, TensorView},
};
use rayon::prelude::*;

/// Bytes of a tensor that are hashed at a time, and then forgotten. A part of what the hash means.
const PIECE: usize = 4 << 20;

/// The weights of a base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    /// Over name and bytes of every tensor. Equal for one file and for shards of the same tensors.
    pub sha256: String,
    /// The files when they were hashed.
    pub files: Vec<FileStamp>,
}

impl Weights {
    /// Returns the weights of `model`: hashed now, or as the run in `--out` found them when nobody has touched them since.
    pub fn of(model: &ModelDir, args: &Args, ui: &Ui) -> Result<Self> {
        let files: Vec<FileStamp> = model.tensors.stamps().collect();
        let known = Stored::read(&args.out).and_then(|stored| stored.weights());
        match known.filter(|known| args.resume != Some(Resume::Strict) && known.files == files) {
            Some(known) => Ok(known),
            None => Ok(Self { sha256: hash(&model.tensors, ui)?, files }),
        }
    }
}

/// Returns the SHA-256 over all tensors: over each one's name and the hashes of its pieces. On all threads of the pool.
fn hash(tensors: &TensorStore, ui: &Ui) -> Result<String> {
    let pieces = |length: usize| length.div_ceil(PIECE);
    let views: Vec<_> = tensors.views().collect();
    let all = views.iter().flat_map(|view| (0..pieces(view.data.len())).map(move |at| (view, at)));
    let all: Vec<_> = all.collect();
    let total = views.iter().map(|view| view.data.len() as u64).sum();
    let progress = ui.progress(total, "bytes of weights");
    let digest = |(view, at): &(&TensorView, usize)| {
        signal::check().map_err(|e| Error::new(e.kind(), format!("{e} before the first step")))?;
        let bytes = at * PIECE..view.data.len().min((at + 1) * PIECE);
        let digest = sha256_hex(&view.data[bytes.clone()]);
        progress.add(bytes.len() as u64);
        tensors.release_part(view.name, bytes);
        Ok(digest)
    };
    let digests = all.par_iter().map(digest).collect::<Result<Vec<String>>>()?;
    let mut digests = digests.into_iter();
    let mut hash = Sha256Hex::new();
    for view in &views {
        // A name's end is where the digits of fixed length begin, of which the length of the tensor says how many there are.
        hash.update(&(view.name.len() as u64).to_le_bytes());
        hash.update(view.name.as_bytes());
        hash.update(&(view.data.len() as u64).to_le_bytes());
        digests.by_ref().take(pieces(view.data.len())).for_each(|digest| hash.update(digest.as_bytes()));
    }
    Ok(hash.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kto_formats::safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata};
    use safetensors::Dtype;

    #[test]
    fn every_byte_and_every_name_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let of = |names: [&str; 2], large: &[u8], small: &[u8]| {
            let specs = vec![
                TensorSpec::new(names[0], Dtype::U8, [large.len()]),
                TensorSpec::new(names[1], Dtype::U8, [small.len()]),
            ];
            let mut writer = SafetensorsWriter::new(&path, specs, &pt_metadata()).unwrap();
            writer.write(names[0], large).unwrap();
            writer.write(names[1], small).unwrap();
            writer.finish().unwrap();
            hash(&TensorStore::open_file(&path).unwrap(), &Ui::silent("kto-train")).unwrap()
        };
        let large: Vec<u8> = (0..2 * PIECE + 5).map(|i| (i % 251) as u8).collect();
        let whole = of(["a", "b"], &large, b"xyz");
        assert_eq!(of(["a", "b"], &large, b"xyz"), whole);
        for at in [0, PIECE - 1, PIECE, PIECE + PIECE / 2, 2 * PIECE, large.len() - 1] {
            let mut other = large.clone();
            other[at] ^= 1;
            assert_ne!(of(["a", "b"], &other, b"xyz"), whole, "byte {at}");
        }
        assert_ne!(of(["a", "c"], &large, b"xyz"), whole);
        assert_ne!(of(["a", "b"], &large[..large.len() - 1], b"xyz"), whole);
        assert_ne!(of(["a", "b"], &large, b""), whole);
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for threads in [1, 3] {
            assert_eq!(pool(threads).install(|| of(["a", "b"], &large, b"xyz")), whole);
        }
    }
}
