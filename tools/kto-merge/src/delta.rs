//! What adapters change of a weight, row by row.

use crate::{args::Method, mix::Mix};
use kto_formats::lora::LoraModule;
use kto_kernels::add_low_rank;
use kto_weights::{Changed, Values};

/// One adapter's part in a weight.
pub struct Part<'a> {
    /// Its matrices.
    pub module: &'a LoraModule,
    /// Its weight in the mixture.
    pub weight: f64,
    /// Which adapter it is of.
    pub adapter: usize,
}

impl Part<'_> {
    /// Writes the change of whole rows from `first` on into `out`. `base` are these rows of the base: DoRA's change depends on them.
    pub fn rows(&self, first: usize, base: &[f32], out: &mut [f32]) {
        let (m, columns) = (self.module, self.module.in_features);
        let Some(magnitude) = &m.magnitude else {
            out.fill(0.0);
            return self.add_product(first, m.scale, out);
        };
        out.copy_from_slice(base);
        self.add_product(first, m.scale, out);
        let rows = out.chunks_mut(columns).zip(base.chunks(columns));
        for ((out, base), magnitude) in rows.zip(&magnitude[first..]) {
            let length = out.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
            // A row of zeros has no direction.
            let factor = if length > 0.0 { (f64::from(*magnitude) / length) as f32 } else { 0.0 };
            out.iter_mut().zip(base).for_each(|(o, b)| *o = *o * factor - b);
        }
    }
}

impl Part<'_> {
    /// Adds factor · B · A to whole rows from `first` on.
    fn add_product(&self, first: usize, factor: f64, rows: &mut [f32]) {
        let m = self.module;
        let b = &m.b[first * m.r..][..rows.len() / m.in_features * m.r];
        add_low_rank(rows, m.in_features, b, &m.a, factor as f32);
    }
}

/// All that is added to a weight.
pub struct Change<'a> {
    /// The adapters' parts, in their order.
    pub parts: Vec<Part<'a>>,
    /// How they are mixed.
    pub mix: Mix,
    /// Factor of the whole.
    pub scale: f64,
}

impl Change<'_> {
    /// Adds the change to whole rows from `first` on, which hold the base.
    pub fn add_to(&self, first: usize, columns: usize, rows: &mut [f32]) {
        let plain =
            self.mix.method == Method::Linear && self.parts.iter().all(|p| p.module.magnitude.is_none());
        if plain {
            return self
                .parts
                .iter()
                .for_each(|p| p.add_product(first, p.module.scale * p.weight * self.scale, rows));
        }
        let n = rows.len();
        let mut changes = vec![0.0; n * self.parts.len()];
        for (part, change) in self.parts.iter().zip(changes.chunks_mut(n)) {
            part.rows(first, rows, change);
        }
        let mut mixed = vec![0.0; n];
        self.mix.mix(&self.parts, first * columns, &mut changes, &mut mixed);
        let scale = self.scale as f32;
        rows.iter_mut().zip(&mixed).for_each(|(w, d)| *w += scale * *d);
    }
}

/// Returns a weight of the base with the change added.
pub fn merged<'a>(base: Box<dyn Values + 'a>, change: Change<'a>) -> Changed<'a> {
    let columns = base.columns();
    let change = Box::new(move |start, out: &mut [f32]| change.add_to(start / columns, columns, out));
    Changed { values: base, change }
}

/// Returns a weight of the base, moved by a part of the way to values that are held.
pub fn moved<'a>(base: Box<dyn Values + 'a>, to: &'a [f32], part: f32) -> Changed<'a> {
    let change = Box::new(move |start, out: &mut [f32]| {
        let to = &to[start..start + out.len()];
        out.iter_mut().zip(to).for_each(|(v, t)| *v += part * (t - *v));
    });
    Changed { values: base, change }
}
