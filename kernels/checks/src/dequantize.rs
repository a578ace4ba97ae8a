//! The quantized forms against the CPU's widening, bit for bit.

use crate::{Arg, Buffer, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{
    AffineParts, Dense, Nf4Parts, Nf4Scales, Stored,
    gpu::{DequantizeAffine, DequantizeInt8, DequantizeNf4, Grid, float_code},
    quant::{dynamic_map, nf4::CODE},
    random,
};

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for float in TYPES {
            for (rows, columns, grid) in MATRICES {
                let case = Case { element, float, rows, columns, grid };
                for block in [2, 64, 128] {
                    case.nf4(m, block, false)?;
                    case.nf4(m, block, true)?;
                }
                case.int8(m)?;
            }
            for (rows, columns, group) in [(1, 32, 32), (7, 64, 32), (3, 192, 64), (65, 128, 128)] {
                for bits in [2, 3, 4, 5, 6, 8] {
                    Case { element, float, rows, columns, grid: grid(3, 65) }.affine(m, bits, group)?;
                }
            }
        }
    }
    Ok(())
}

/// Values of type `element` from a matrix whose file has floats of type `float`.
struct Case {
    element: Dense,
    float: Dense,
    rows: usize,
    columns: usize,
    grid: Grid,
}

fn bytes(n: usize, salt: u64) -> Vec<u8> {
    (0..n as u64).map(|i| (random::key(&[salt, i]) >> 20) as u8).collect()
}

impl Case {
    fn nf4(&self, m: &dyn Machine, block: usize, nested: bool) -> Result<()> {
        const NESTED: usize = 4;
        let n = self.rows * self.columns;
        let blocks = n.div_ceil(block);
        let (packed, map) = (bytes(n.div_ceil(2), 1), dynamic_map::signed());
        let (codes, absmax) = (bytes(blocks, 2), noise(Dense::F32, blocks.div_ceil(NESTED), 3));
        let plain = encode(self.float, &noise(self.float, blocks, 4));
        let scales = match nested {
            false => Nf4Scales::Plain(self.float, plain.clone().into()),
            true => Nf4Scales::Nested {
                codes: codes.clone().into(),
                map: Box::new(*map),
                absmax: absmax.clone(),
                block: NESTED,
                offset: 0.131,
            },
        };
        let parts = Nf4Parts { packed: packed.clone().into(), code: CODE, scales, block, round: self.float };
        let p = DequantizeNf4 {
            elements: n as u64,
            shift: block.ilog2(),
            nested_shift: NESTED.ilog2(),
            nested: u32::from(nested),
            scale_type: float_code(self.float),
            round_type: float_code(self.float),
            offset: 0.131,
            code: CODE,
        };
        let scales = Buffer::new(if nested { &codes } else { &plain });
        let (packed, map) = (Buffer::new(&packed), buffer(Dense::F32, map));
        let (mut out, absmax) = (results(self.element, n), buffer(Dense::F32, &absmax));
        let args =
            &mut [Arg::Out(&mut out), Arg::In(&packed), Arg::In(&scales), Arg::In(&map), Arg::In(&absmax)];
        launch(m, &named("dequantize_nf4", self.element), self.grid, args, &p)?;
        self.compare(
            &format!("nf4 in blocks of {block}, nested {nested}"),
            &out,
            Stored::nf4(parts, self.rows, self.columns)?,
        )
    }

    fn int8(&self, m: &dyn Machine) -> Result<()> {
        let codes = bytes(self.rows * self.columns, 5);
        let scales = encode(self.float, &noise(self.float, self.rows, 6));
        let stored =
            Stored::int8(codes.clone().into(), self.float, scales.clone().into(), self.rows, self.columns)?;
        let p = DequantizeInt8 {
            rows: self.rows as u64,
            columns: self.columns as u32,
            scale_type: float_code(self.float),
        };
        let mut out = results(self.element, codes.len());
        let (codes, scales) = (Buffer::new(&codes), Buffer::new(&scales));
        let args = &mut [Arg::Out(&mut out), Arg::In(&codes), Arg::In(&scales)];
        launch(m, &named("dequantize_int8", self.element), self.grid, args, &p)?;
        self.compare("int8", &out, stored)
    }

    fn affine(&self, m: &dyn Machine, bits: usize, group: usize) -> Result<()> {
        let n = self.rows * self.columns;
        let packed = bytes(n * bits / 8, 7);
        let [scales, biases] = [8, 9].map(|salt| encode(self.float, &noise(self.float, n / group, salt)));
        let parts = AffineParts {
            packed: packed.clone().into(),
            dtype: self.float,
            scales: scales.clone().into(),
            biases: biases.clone().into(),
            bits,
            group,
        };
        let p = DequantizeAffine {
            elements: n as u64,
            bits: bits as u32,
            shift: group.ilog2(),
            float: float_code(self.float),
            unused: 0,
        };
        let mut out = results(self.element, n);
        let [packed, scales, biases] = [packed, scales, biases].map(|b| Buffer::new(&b));
        let args = &mut [Arg::Out(&mut out), Arg::In(&packed), Arg::In(&scales), Arg::In(&biases)];
        launch(m, &named("dequantize_affine", self.element), self.grid, args, &p)?;
        self.compare(
            &format!("affine {bits} bits in groups of {group}"),
            &out,
            Stored::affine(parts, self.rows, self.columns)?,
        )
    }

    fn compare(&self, form: &str, out: &Buffer, stored: Stored) -> Result<()> {
        let mut expected = vec![0.0; self.rows * self.columns];
        stored.widen_flat(0, &mut expected);
        let what = case("dequantize", self.element, self.rows, self.columns, self.grid);
        same_bits(&format!("{what}, {form}, floats {:?}", self.float), self.element, out, &expected)
    }
}
