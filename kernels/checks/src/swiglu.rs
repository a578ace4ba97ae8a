//! The gated activation against the CPU operation, bit for bit where that has fused multiply-adds too.

use crate::{Arg, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{gpu::Swiglu, swiglu, swiglu_backward};

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (n, grid) in LENGTHS {
            let p = Swiglu { elements: n as u64 };
            let mut x = [1, 2, 3].map(|salt| noise(element, n, salt));
            // Both ends of the exponential.
            x[1][0] *= 50.0;
            x[1][n - 1] *= -50.0;
            x[1] = rounded(element, &x[1]);
            let [mut y, mut gate, mut up] = x.each_ref().map(|v| buffer(element, v));
            let mut forward = results(element, n);
            let args = &mut [Arg::Out(&mut forward), Arg::In(&gate), Arg::In(&up)];
            launch(m, &named("swiglu", element), grid, args, &p)?;
            let args = &mut [Arg::Out(&mut y), Arg::Out(&mut gate), Arg::Out(&mut up)];
            launch(m, &named("swiglu_backward", element), grid, args, &p)?;

            let [ty, tgate, tup] = x.each_ref().map(|v| single(v, 1, n));
            let (ty, tgate, tup) = (ty?, tgate?, tup?);
            let expected = ty.copy()?;
            swiglu(&expected, &tgate, &tup)?;
            swiglu_backward(&ty, &tgate, &tup)?;
            let what = case("swiglu", element, 1, n, grid);
            for (name, found, expected) in
                [("", forward, expected), (" result", y, ty), (" gate", gate, tgate), (" up", up, tup)]
            {
                let what = format!("{what}{name}");
                if fused() {
                    same_bits(&what, element, &found, &values(&expected)?)?;
                } else {
                    close(&what, element, &found, &wide(&expected)?, 16.0 * U32)?;
                }
            }
        }
    }
    Ok(())
}
