//! What a fresh adapter looks like: which linear layers it is on, with which ranks and scales, and the numbers it begins with.
//!
//! Called by [`crate::lora`] and the memory plan. Which modules the settings mean is decided in [`kto_formats::peft`].
//! Numbers are a pure function of the seed and the place. Deliberately absent: initialisations that change the base (pissa, olora).

use crate::{
    architecture::{Architecture, Module},
    whole::{self, Shapes},
};
use kto_cli::{Error, Result};
use kto_formats::peft::PeftConfig;
use kto_kernels::random;

/// An adapter of one rank on some modules of every block.
#[derive(Clone, Debug)]
pub struct LoraSpec {
    /// R, at least 1.
    pub rank: usize,
    /// alpha
    pub alpha: f64,
    /// The adapted modules, as the checkpoint has them.
    pub modules: Vec<Module>,
}

/// The factors of one linear layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// R, at least 1.
    pub rank: usize,
    /// Factor of B·A.
    pub scale: f64,
}

/// What is trained of a whole decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLayout {
    /// By block and [`Module::NAMED`]; nothing where a layer is not adapted.
    pub blocks: Vec<[Option<Place>; Module::NAMED.len()]>,
    /// What is trained whole beside them.
    pub whole: Shapes,
    /// Whether rows have trained lengths.
    pub dora: bool,
    /// What the factors begin with.
    pub init: Init,
}

/// What the factors of a fresh adapter begin with: PEFT's `init_lora_weights`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// A uniform in ±1/√in (kaiming with a = √5), B zero.
    #[default]
    Kaiming,
    /// A normal with deviation 1/R, B zero.
    Gaussian,
    /// A and B in orthogonal halves of R dimensions, so that B·A is zero and neither is.
    Orthogonal,
}

impl LoraLayout {
    /// Lays out an adapter of one rank.
    pub fn uniform(architecture: &Architecture, spec: &LoraSpec) -> Self {
        let place = Place { rank: spec.rank, scale: spec.alpha / spec.rank as f64 };
        let block = Module::NAMED.map(|m| spec.modules.contains(&m).then_some(place));
        let blocks = vec![block; architecture.layers];
        Self { blocks, whole: Shapes::new(), dora: false, init: Init::Kaiming }
    }

    /// Lays out what settings ask for. Errors (65): they name no linear layer; an initialisation that is not known.
    pub fn of_config(architecture: &Architecture, config: &PeftConfig) -> Result<Self> {
        let mut blocks = vec![[None; Module::NAMED.len()]; architecture.layers];
        for (layer, block) in blocks.iter_mut().enumerate() {
            for module in architecture.modules().iter().copied() {
                let path = module.path(layer);
                if config.adapts(&path)? {
                    let (rank, scale) = (config.rank(&path)?, config.scale(&path)?);
                    block[module as usize] = Some(Place { rank, scale });
                }
            }
        }
        if blocks.iter().flatten().all(Option::is_none) {
            return Err(Error::data("no linear layer of the model is adapted"));
        }
        let whole = whole::chosen(architecture, config)?;
        Ok(Self { blocks, whole, dora: config.use_dora, init: Init::named(&config.init_lora_weights)? })
    }

    /// Returns the adapted layers with their places: (block, module, place).
    pub fn places(&self) -> impl Iterator<Item = (usize, Module, Place)> {
        self.blocks.iter().enumerate().flat_map(|(layer, block)| {
            Module::NAMED.into_iter().zip(block).filter_map(move |(m, place)| Some((layer, m, (*place)?)))
        })
    }
}

impl Init {
    /// Returns the initialisation that PEFT calls `name`. Error (65): it is not known here.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "true" => Ok(Self::Kaiming),
            "gaussian" => Ok(Self::Gaussian),
            "orthogonal" => Ok(Self::Orthogonal),
            other => {
                Err(Error::data(format!("init_lora_weights \"{}\" is not supported", kto_cli::escape(other))))
            }
        }
    }

    /// Draws A (R, in) and B (out, R).
    pub(crate) fn draw(
        self,
        [seed, layer, module]: [u64; 3],
        rank: usize,
        out: usize,
        input: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let stream = |name: &[u8; 8]| random::key(&[seed, u64::from_le_bytes(*name), layer, module]);
        let key = stream(b"lorainit");
        match self {
            Self::Kaiming => {
                let bound = 1.0 / (input as f64).sqrt();
                let value = |i: usize| (2.0 * random::uniform(key, i as u64) - 1.0) * bound;
                ((0..rank * input).map(|i| value(i) as f32).collect(), vec![0.0; out * rank])
            }
            Self::Gaussian => {
                let value = |i: usize| (normal(key, i as u64) / rank as f64) as f32;
                ((0..rank * input).map(value).collect(), vec![0.0; out * rank])
            }
            Self::Orthogonal => {
                let basis = orthonormal(stream(b"lorabase"), rank);
                let (odd, even): (Vec<_>, Vec<_>) =
                    basis.into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
                let mixed = |key: u64, n: usize, half: &[(usize, Vec<f64>)]| -> Vec<Vec<f64>> {
                    let of = |i: usize| {
                        let mut sum = vec![0.0; rank];
                        for (j, (_, row)) in half.iter().enumerate() {
                            let weight = normal(key, (i * half.len() + j) as u64) / 10.0;
                            sum.iter_mut().zip(row).for_each(|(s, r)| *s += weight * r);
                        }
                        sum
                    };
                    (0..n).map(of).collect()
                };
                let columns = mixed(key, input, &odd);
                let a = (0..rank).flat_map(|r| columns.iter().map(move |c| c[r] as f32)).collect();
                let rows = mixed(stream(b"lorainiB"), out, &even);
                (a, rows.into_iter().flatten().map(|v| v as f32).collect())
            }
        }
    }
}

/// Draw `i` of a stream, normal with deviation 1 (Box and Muller).
fn normal(key: u64, i: u64) -> f64 {
    let (u, v) = (random::uniform(key, 2 * i), random::uniform(key, 2 * i + 1));
    // 1 - u is never 0.
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Returns n orthonormal rows (n, n): normal ones, made so one after the other, twice over for the last digits.
fn orthonormal(key: u64, n: usize) -> Vec<Vec<f64>> {
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(n);
    for i in 0..n {
        let mut row: Vec<f64> = (0..n).map(|j| normal(key, (i * n + j) as u64)).collect();
        for _ in 0..2 {
            for other in &rows {
                let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let length = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        row.iter_mut().for_each(|v| *v /= length);
        rows.push(row);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        (mean, variance.sqrt())
    }

    #[test]
    fn numbers_have_the_spread_of_peft() {
        let (rank, out, input) = (8, 100, 900);
        for (init, deviation) in [(Init::Kaiming, 1.0 / (3.0f64 * 900.0).sqrt()), (Init::Gaussian, 1.0 / 8.0)]
        {
            let (a, b) = init.draw([1, 2, 3], rank, out, input);
            let (mean, found) = statistics(&a);
            assert!(
                mean.abs() < 0.03 * deviation && (found / deviation - 1.0).abs() < 0.03,
                "{init:?} {found}"
            );
            assert!(b.len() == out * rank && b.iter().all(|v| *v == 0.0));
            assert!(init.draw([1, 2, 4], rank, out, input).0 != a);
        }
    }

    #[test]
    fn orthogonal_factors_have_no_product() {
        let (rank, out, input) = (6, 30, 40);
        let (a, b) = Init::Orthogonal.draw([5, 0, 1], rank, out, input);
        let mut largest = 0.0f32;
        for i in 0..out {
            for j in 0..input {
                let product: f32 = (0..rank).map(|r| b[i * rank + r] * a[r * input + j]).sum();
                largest = largest.max(product.abs());
            }
        }
        assert!(largest < 1e-7, "{largest}");
        // Each is a mixture of three orthonormal rows with weights of deviation 0.1.
        for side in [&a, &b] {
            let (_, deviation) = statistics(side);
            assert!((deviation / (0.1 * 0.5f64.sqrt()) - 1.0).abs() < 0.25, "{deviation}");
        }
    }
}
