//! The instruction sets a machine may offer, detected once.

use std::fmt;
use std::sync::OnceLock;

/// The instruction set that a call runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// x86-64 with AVX-512 F, BW, VBMI and BF16: `vdpbf16ps` products, `vpermi2b` fp8 decoding.
    Avx512Bf16,
    /// x86-64 with AVX2 and FMA: f32 fused multiply-adds on widened operands. Gives the bits of [`Portable`](Isa::Portable).
    Avx2Fma,
    /// Plain Rust that the compiler vectorises for the target's baseline. Runs everywhere.
    Portable,
}

impl Isa {
    /// All of them, the fastest first.
    pub const ALL: [Isa; 3] = [Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable];

    /// The fastest instruction set of this machine. The choice is made and logged once per process.
    pub fn detect() -> Isa {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let isa = Isa::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Portable);
            tracing::info!(%isa, "grouped GEMM instruction set");
            isa
        })
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Fma => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Bf16 | Isa::Avx2Fma => false,
            Isa::Portable => true,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Avx2Fma => "avx2-fma",
            Isa::Portable => "portable",
        })
    }
}
