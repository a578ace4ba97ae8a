//! 8-bit weights of LLM.int8() as transformers and bitsandbytes store them: one scale a row.
//!
//! For a linear layer `X` the file holds `X.weight` (int8), `X.SCB` (the largest magnitude of each row) and, in most files,
//! `X.weight_format`. Formula: value = code · SCB / 127. Deliberately absent: the 8-bit rounding of activations that bitsandbytes
//! does in its own products, and column-tiled layouts (files older than bitsandbytes 0.37).

use crate::{
    safetensors_out::TensorSpec,
    tensors::{TensorStore, TensorView, float_size},
};
use kto_cli::{Error, Result, escape};
use safetensors::Dtype;

/// An 8-bit weight, still coded.
pub struct Int8Tensor<'a> {
    /// int8, (rows, columns).
    pub codes: TensorView<'a>,
    /// Floats, (rows).
    pub scales: TensorView<'a>,
}

impl<'a> Int8Tensor<'a> {
    /// Returns the weight `name` if it is stored in 8 bits, `None` if it is not. Errors (65) name the part that does not fit.
    pub fn find(store: &'a TensorStore, name: &str) -> Result<Option<Self>> {
        let Some(layer) = name.strip_suffix(".weight") else { return Ok(None) };
        let Some(scales) = store.get(&format!("{layer}.SCB")) else { return Ok(None) };
        let bad =
            |what: String| Error::data(format!("tensor \"{}\": {what} in an 8-bit weight", escape(name)));
        let codes = store.require(name)?;
        if codes.dtype != Dtype::I8 || codes.shape.len() != 2 {
            return Err(bad(format!("dtype {} and shape {:?}", codes.dtype, codes.shape)));
        }
        if float_size(scales.dtype).is_none() || scales.shape != &codes.shape[..1] {
            let rows = codes.shape[0];
            return Err(bad(format!("{} scales {:?} for {rows} rows", scales.dtype, scales.shape)));
        }
        match store.get(&format!("{layer}.weight_format")) {
            Some(format) if format.data.iter().any(|b| *b != 0) => {
                Err(bad("a layout that is not by rows".into()))
            }
            _ => Ok(Some(Self { codes, scales })),
        }
    }
}

/// Describes the tensors that the weight `name` of shape (rows, columns) becomes: codes, scales, and the mark of a layout by rows.
pub fn specs(name: &str, shape: [usize; 2]) -> [TensorSpec; 3] {
    let layer = name.strip_suffix(".weight").unwrap_or(name);
    [
        TensorSpec::new(name, Dtype::I8, shape),
        TensorSpec::new(format!("{layer}.SCB"), Dtype::F32, [shape[0]]),
        TensorSpec::new(format!("{layer}.weight_format"), Dtype::U8, []),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors_out::SafetensorsWriter;
    use std::path::Path;

    #[test]
    fn a_transformers_checkpoint_is_found() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/bnb/tiny_llama_int8");
        let store = TensorStore::open_file(&path.join("model.safetensors")).unwrap();
        let found = store.names().filter(|name| Int8Tensor::find(&store, name).unwrap().is_some());
        assert_eq!(found.count(), 14);
        assert!(Int8Tensor::find(&store, "lm_head.weight").unwrap().is_none());
        let up = Int8Tensor::find(&store, "model.layers.1.mlp.up_proj.weight").unwrap().unwrap();
        assert_eq!((up.codes.shape, up.scales.shape), (&[160, 64][..], &[160][..]));
    }

    #[test]
    fn parts_that_do_not_fit_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let error = |codes: (Dtype, Vec<usize>), scales: (Dtype, Vec<usize>), format: u8| {
            let specs = vec![
                TensorSpec::new("x.weight", codes.0, codes.1),
                TensorSpec::new("x.SCB", scales.0, scales.1),
                TensorSpec::new("x.weight_format", Dtype::U8, []),
            ];
            let mut writer = SafetensorsWriter::new(&path, specs.clone(), &Default::default()).unwrap();
            for spec in &specs {
                writer.write(&spec.name, &vec![format; spec.bytes() as usize]).unwrap();
            }
            writer.finish().unwrap();
            let store = TensorStore::open_file(&path).unwrap();
            Int8Tensor::find(&store, "x.weight").err().map(|e| e.to_string())
        };
        let good = (Dtype::I8, vec![2, 3]);
        assert_eq!(error(good.clone(), (Dtype::F32, vec![2]), 0), None);
        for (codes, scales, format, says) in [
            ((Dtype::U8, vec![2, 3]), (Dtype::F32, vec![2]), 0, "dtype U8 and shape [2, 3]"),
            ((Dtype::I8, vec![6]), (Dtype::F32, vec![6]), 0, "dtype I8 and shape [6]"),
            (good.clone(), (Dtype::F32, vec![3]), 0, "F32 scales [3] for 2 rows"),
            (good.clone(), (Dtype::I32, vec![2]), 0, "I32 scales [2] for 2 rows"),
            (good.clone(), (Dtype::F32, vec![2]), 1, "a layout that is not by rows"),
        ] {
            let says = format!("tensor \"x.weight\": {says} in an 8-bit weight");
            assert_eq!(error(codes, scales, format), Some(says));
        }
    }
}
