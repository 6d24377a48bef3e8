//! Element types and the places where memory lives.

use half::{bf16, f16};

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of an IEEE binary32.
    Bf16,
    /// OCP FP8 E4M3: bias 7, largest value 448, NaN is 0x7F and 0xFF, no infinity.
    Fp8E4M3Fn,
    /// FP8 E4M3 "FNUZ" of gfx942: bias 8, largest value 240, NaN is 0x80 alone, no negative zero.
    Fp8E4M3Fnuz,
    /// Two OCP FP4 E2M1 codes per byte, the even column in the low half: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign.
    /// Shapes and strides count bytes, so a row of `n` codes has `n / 2` elements.
    Fp4E2M1x2,
    /// Scale of MX formats, `2^(code − 127)`; 0xFF is NaN.
    E8M0,
    /// Two's-complement 32-bit integer (expert ids, counts).
    I32,
    /// Raw bytes (workspaces).
    U8,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::Bf16 => 2,
            DType::Fp8E4M3Fn | DType::Fp8E4M3Fnuz | DType::Fp4E2M1x2 | DType::E8M0 | DType::U8 => 1,
        }
    }

    /// Lower-case name as it is printed in plans and errors.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::Fp8E4M3Fn => "fp8_e4m3fn",
            DType::Fp8E4M3Fnuz => "fp8_e4m3fnuz",
            DType::Fp4E2M1x2 => "fp4_e2m1x2",
            DType::E8M0 => "e8m0",
            DType::I32 => "i32",
            DType::U8 => "u8",
        }
    }

    /// Whether this is one of the FP8 types.
    pub const fn is_fp8(self) -> bool {
        matches!(self, DType::Fp8E4M3Fn | DType::Fp8E4M3Fnuz)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A device family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DeviceKind {
    /// The CPU and its memory.
    Host,
    /// An NVIDIA GPU through CUDA.
    Cuda,
    /// An AMD GPU through HIP.
    Hip,
}

/// One device: its family and its index within the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// The family.
    pub kind: DeviceKind,
    /// Ordinal as the vendor's runtime counts; 0 for the host.
    pub index: u32,
}

impl Device {
    /// The host.
    pub const HOST: Device = Device { kind: DeviceKind::Host, index: 0 };
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            DeviceKind::Host => f.write_str("host"),
            DeviceKind::Cuda => write!(f, "cuda:{}", self.index),
            DeviceKind::Hip => write!(f, "hip:{}", self.index),
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type whose values are the elements of tensors of some [`DType`]s.
///
/// FP8 codes are plain `u8`. The trait is sealed: [`crate::TensorView::as_slice`] relies on every bit
/// pattern being valid.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Whether a tensor of `dtype` may be read as a slice of `Self`.
    fn holds(dtype: DType) -> bool;
}

macro_rules! element {
    ($($ty:ty => $($dtype:ident)|+;)*) => {$(
        impl sealed::Sealed for $ty {}
        impl Element for $ty {
            fn holds(dtype: DType) -> bool {
                matches!(dtype, $(DType::$dtype)|+)
            }
        }
    )*};
}

element! {
    f32 => F32;
    f16 => F16;
    bf16 => Bf16;
    i32 => I32;
    u8 => Fp8E4M3Fn | Fp8E4M3Fnuz | Fp4E2M1x2 | E8M0 | U8;
}
