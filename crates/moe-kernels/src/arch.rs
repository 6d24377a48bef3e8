//! The devices that kernels are compiled for.

use fused_moe_core::{DeviceKind, Fp8Format};

/// What a code object is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// NVIDIA H100, H200.
    Sm90a,
    /// AMD MI300X, MI325X.
    Gfx942,
    /// AMD MI350X, MI355X.
    Gfx950,
}

impl Arch {
    /// All of them.
    pub const ALL: [Arch; 3] = [Arch::Sm90a, Arch::Gfx942, Arch::Gfx950];

    /// As compilers call it.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Sm90a => "sm_90a",
            Arch::Gfx942 => "gfx942",
            Arch::Gfx950 => "gfx950",
        }
    }

    /// Whose runtime launches it.
    pub const fn device(self) -> DeviceKind {
        match self {
            Arch::Sm90a => DeviceKind::Cuda,
            Arch::Gfx942 | Arch::Gfx950 => DeviceKind::Hip,
        }
    }

    /// The FP8 of its instructions.
    pub const fn fp8(self) -> Fp8Format {
        match self {
            Arch::Sm90a | Arch::Gfx950 => Fp8Format::E4M3Fn,
            Arch::Gfx942 => Fp8Format::E4M3Fnuz,
        }
    }

    /// Lanes of a warp, or of a wave.
    pub const fn warp(self) -> u32 {
        match self {
            Arch::Sm90a => 32,
            Arch::Gfx942 | Arch::Gfx950 => 64,
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
