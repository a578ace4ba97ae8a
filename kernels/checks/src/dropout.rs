//! Dropout against the CPU operation: the same mask and the same bits.

use crate::{Arg, Buffer, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{DropoutKey, dropout, gpu::Dropout, random};

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (rows, columns, grid) in MATRICES {
            let x = noise(element, rows * columns, 1);
            let keys: Vec<u64> = (0..rows as u64).map(|i| random::key(&[9, i])).collect();
            let row_keys = Buffer::new(&keys.iter().flat_map(|k| k.to_le_bytes()).collect::<Vec<u8>>());
            for p in [0.0, 0.1, 0.5, 0.999] {
                let mask = DropoutKey { p, key: random::key(&[columns as u64, 3]) };
                let mut y = buffer(element, &x);
                let args = &mut [Arg::Out(&mut y), Arg::Again(0), Arg::In(&row_keys)];
                let params = Dropout::new(mask, rows, columns as u32);
                launch(m, &named("dropout", element), grid, args, &params)?;
                let expected = dropout(&single(&x, rows, columns)?, mask, &keys)?;
                let what = format!("{} p {p}", case("dropout", element, rows, columns, grid));
                same_bits(&what, element, &y, &values(&expected)?)?;
            }
        }
    }
    Ok(())
}
