//! What was built and what it runs on: `--version`, run manifests.

use std::sync::OnceLock;

/// Returns the version of the workspace, for example `0.1.0`.
pub fn number() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Returns the git revision this was built from, or `unknown`.
pub fn revision() -> &'static str {
    env!("KTO_REVISION")
}

/// Back ends that a tool was compiled with, beside the processor's.
static MORE: OnceLock<&'static str> = OnceLock::new();

/// Says, before [`crate::run`], that the tool was compiled with one more back end.
pub fn compiled_with(feature: &'static str) {
    let _ = MORE.set(feature);
}

/// Returns the back ends that were compiled in.
pub fn features() -> String {
    ["cpu"].iter().chain(MORE.get()).copied().collect::<Vec<_>>().join(" ")
}

/// Returns the SIMD sets this processor has, out of those our dependencies choose at run time.
pub fn simd() -> String {
    let mut seen: Vec<&str> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! ask {
            ($($name:tt)*) => { $( if std::arch::is_x86_feature_detected!($name) { seen.push($name); } )* };
        }
        ask!("sse4.2" "avx" "f16c" "fma" "avx2" "avx512f" "avx512vnni" "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! ask {
            ($($name:tt)*) => { $( if std::arch::is_aarch64_feature_detected!($name) { seen.push($name); } )* };
        }
        ask!("neon" "dotprod" "fp16" "bf16" "i8mm" "sve");
    }
    if seen.is_empty() {
        seen.push("none");
    }
    seen.join(" ")
}

/// The text after the tool's name in `--version`.
pub(crate) fn long() -> String {
    format!(
        "{} (git {})\ntarget: {}\nfeatures: {}\nsimd: {}",
        number(),
        revision(),
        env!("KTO_TARGET"),
        features(),
        simd()
    )
}
