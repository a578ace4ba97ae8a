//! The gated activations against the CPU operation, bit for bit where that has fused multiply-adds too.

use crate::{Arg, Machine, launch, support::*};
use candle_core::{Result, Tensor};
use kto_kernels::{geglu, geglu_backward, gpu::Gated, swiglu, swiglu_backward};

/// An operation of the host on (y, gate, up).
type Operation = fn(&Tensor, &Tensor, &Tensor) -> Result<()>;

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    check_kind(m, "swiglu", swiglu, swiglu_backward)?;
    check_kind(m, "geglu", geglu, geglu_backward)
}

fn check_kind(m: &dyn Machine, kernel: &str, forward_of: Operation, backward_of: Operation) -> Result<()> {
    for element in TYPES {
        for (n, grid) in LENGTHS {
            let p = Gated { elements: n as u64 };
            let mut x = [1, 2, 3].map(|salt| noise(element, n, salt));
            // Both ends of the exponential.
            x[1][0] *= 50.0;
            x[1][n - 1] *= -50.0;
            x[1] = rounded(element, &x[1]);
            let [mut y, mut gate, mut up] = x.each_ref().map(|v| buffer(element, v));
            let mut forward = results(element, n);
            let args = &mut [Arg::Out(&mut forward), Arg::In(&gate), Arg::In(&up)];
            launch(m, &named(kernel, element), grid, args, &p)?;
            let args = &mut [Arg::Out(&mut y), Arg::Out(&mut gate), Arg::Out(&mut up)];
            launch(m, &named(&format!("{kernel}_backward"), element), grid, args, &p)?;

            let [ty, tgate, tup] = x.each_ref().map(|v| single(v, 1, n));
            let (ty, tgate, tup) = (ty?, tgate?, tup?);
            let expected = ty.copy()?;
            forward_of(&expected, &tgate, &tup)?;
            backward_of(&ty, &tgate, &tup)?;
            let what = case(kernel, element, 1, n, grid);
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
