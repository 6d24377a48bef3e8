//! Values and scales of a weight matrix as a checkpoint stores them.

use fused_moe_core::Fp8Format;
use half::bf16;

/// The values of a matrix.
#[derive(Clone, Debug)]
pub(crate) enum Values {
    Bf16(Vec<bf16>),
    Fp8(Vec<u8>, Fp8Format),
    /// Pairs of codes.
    Fp4(Vec<u8>),
}

/// Their scales.
#[derive(Clone, Debug)]
pub(crate) enum Scale {
    None,
    Tensor(f32),
    Channel(Vec<f32>),
    Block(Vec<f32>),
    Mx(Vec<u8>),
    Nv(Vec<u8>, f32),
}

impl Values {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Values::Bf16(values) => size_of_val(values.as_slice()),
            Values::Fp8(codes, _) | Values::Fp4(codes) => codes.len(),
        }
    }
}

impl Scale {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Scale::None => 0,
            Scale::Tensor(_) => size_of::<f32>(),
            Scale::Channel(scales) | Scale::Block(scales) => size_of_val(scales.as_slice()),
            Scale::Mx(scales) => scales.len(),
            Scale::Nv(scales, _) => scales.len() + size_of::<f32>(),
        }
    }

    /// With f32 scales rounded to bf16.
    pub(crate) fn narrow(self) -> Self {
        let narrow = |scale: f32| bf16::from_f32(scale).to_f32();
        let all = |scales: Vec<f32>| scales.into_iter().map(narrow).collect();
        match self {
            Scale::Tensor(scale) => Scale::Tensor(narrow(scale)),
            Scale::Channel(scales) => Scale::Channel(all(scales)),
            Scale::Block(scales) => Scale::Block(all(scales)),
            other => other,
        }
    }
}
