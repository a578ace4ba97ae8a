//! One function compiled for several instruction sets: the machine's baseline, AVX2 and AVX-512; the processor at hand chooses.
//!
//! The widths give the same bits. Fused multiply-adds, where the body asks for them by `FUSED`, differ in the last bit from the
//! baseline of processors without them.

/// Defines a function whose body is also compiled with AVX2 and AVX-512 and chosen at run time. Everything it calls must be inlined.
/// The body may use `FUSED`: whether fused multiply-adds are instructions.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident$(<$t:ident: Real>)?($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name$(<$t: Real>)?($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$($t: Real,)? const FUSED: bool>($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,fma")]
                fn avx512$(<$t: Real>)?($($arg: $type),*) $(-> $ret)? {
                    body::<$($t,)? true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2$(<$t: Real>)?($($arg: $type),*) $(-> $ret)? {
                    body::<$($t,)? true>($($arg),*)
                }
                if is_x86_feature_detected!("fma") {
                    if is_x86_feature_detected!("avx512f") {
                        // SAFETY: the processor has the features that the function is compiled for.
                        return unsafe { avx512($($arg),*) };
                    }
                    if is_x86_feature_detected!("avx2") {
                        // SAFETY: as above.
                        return unsafe { avx2($($arg),*) };
                    }
                }
            }
            body::<$($t,)? { cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use simd;
