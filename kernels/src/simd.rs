//! One function compiled twice: for the machine's baseline, and for AVX2 when the processor at hand has it.
//!
//! No operation is contracted or reordered, so both give the same bits; the second is wider.

/// Defines a function whose body is also compiled with AVX2 and chosen at run time. Everything it calls must be inlined.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<T: Real>($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name<T: Real>($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body<T: Real>($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2<T: Real>($($arg: $type),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has the feature that the function is compiled for.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use simd;
