//! AdamW against the CPU operation, bit for bit.

use crate::{Arg, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{AdamW, Dense, adamw_step, gpu};

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (n, grid) in LENGTHS {
            let [p, m1, v] = [1, 2, 3].map(|salt| noise(Dense::F32, n, salt));
            let v: Vec<f32> = v.iter().map(|v| v * v).collect();
            let g = noise(element, n, 4);
            let update = AdamW {
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.01,
                step: 7,
                gradient_scale: 0.7,
            };
            let [mut bp, mut bm, mut bv] = [&p, &m1, &v].map(|x| buffer(Dense::F32, x));
            let bg = buffer(element, &g);
            let args = &mut [Arg::Out(&mut bp), Arg::Out(&mut bm), Arg::Out(&mut bv), Arg::In(&bg)];
            launch(m, &named("adamw", element), grid, args, &gpu::AdamW::new(update, n))?;

            let [tp, tm, tv, tg] = [&p, &m1, &v, &g].map(|x| single(x, 1, n));
            let (tp, tm, tv) = (tp?, tm?, tv?);
            adamw_step(&tp, &tm, &tv, &tg?, update)?;
            let what = case("adamw", element, 1, n, grid);
            for (name, found, expected) in
                [("parameters", bp, tp), ("first moment", bm, tm), ("second moment", bv, tv)]
            {
                same_bits(&format!("{what} {name}"), Dense::F32, &found, &values(&expected)?)?;
            }
        }
    }
    Ok(())
}
