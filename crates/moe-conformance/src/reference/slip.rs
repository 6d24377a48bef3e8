//! Roundings at the wrong place or to the wrong type. Only saboteurs have any.

use fused_moe_core::{Granularity, QuantScheme};
use half::bf16;

use crate::oracle::Codec;

/// One wrong rounding in otherwise right experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slip {
    /// The activation is not rounded to bf16 before it is quantised (FP8) or multiplied (bf16).
    UnroundedActivation,
    /// The scales of the second quantisation are those of the activation before it was rounded.
    UnroundedScale,
    /// The activation is cut off to bf16 instead of rounded.
    TruncatedActivation,
    /// Gate and up are rounded to bf16 before the activation.
    RoundedGateUp,
    /// The activation function is off by up to 2⁻¹¹ of its value, as a coarse exponential makes it.
    CoarseExponential,
    /// The outputs of gemm2 are rounded to bf16 before they are weighted and added up.
    RoundedOutputs,
    /// The routing weight of every token's first slot is rounded to bf16.
    NarrowRoutingWeight,
    /// The scales of the weights are kept in bf16.
    NarrowWeightScales,
}

impl Slip {
    /// Gate and up as the activation takes them.
    pub(super) fn gate_up(self, gate: f32, up: f32) -> (f32, f32) {
        match self {
            Slip::RoundedGateUp => (bf16::from_f32(gate).to_f32(), bf16::from_f32(up).to_f32()),
            _ => (gate, up),
        }
    }

    /// The activation before it is rounded.
    pub(super) fn activation(self, value: f64) -> f64 {
        match self {
            // Depends on the value in a way that has no mean.
            Slip::CoarseExponential => value * (1.0 + 2f64.powi(-11) * (value * 1e4).sin()),
            Slip::TruncatedActivation => {
                let kept = (value as f32).to_bits() & 0xffff_0000;
                f64::from(f32::from_bits(kept))
            }
            _ => value,
        }
    }

    /// An output of gemm2.
    pub(super) fn output(self, value: f32) -> f32 {
        if self == Slip::RoundedOutputs { bf16::from_f32(value).to_f32() } else { value }
    }

    /// The routing weight of a slot.
    pub(super) fn routing_weight(self, slot: usize, weight: f32) -> f32 {
        let narrow = self == Slip::NarrowRoutingWeight && slot == 0;
        if narrow { bf16::from_f32(weight).to_f32() } else { weight }
    }

    /// Whether the second quantisation reads the activation before it was rounded.
    pub(super) fn reads_unrounded(self) -> bool {
        matches!(self, Slip::UnroundedActivation | Slip::UnroundedScale)
    }

    /// The second quantisation of `[rows, width]`: what is multiplied, from the activation before and after it was
    /// rounded.
    pub(super) fn requantize(
        self,
        quant: QuantScheme,
        (unrounded, rounded): (&[f32], &[bf16]),
        width: usize,
        out: &mut [f32],
    ) {
        let coded: Vec<f32> = match self {
            Slip::UnroundedScale => rounded.iter().map(|x| x.to_f32()).collect(),
            _ => unrounded.to_vec(),
        };
        let (Some(format), Some(granularity)) = (quant.fp8(), quant.activation_granularity()) else {
            out.copy_from_slice(&coded);
            return;
        };
        let codec = Codec::new(format);
        let (row, group) = match granularity {
            Granularity::Group(columns) => (width, columns.get()),
            Granularity::Tensor => (coded.len().max(1), coded.len().max(1)),
            _ => (width, width),
        };
        let groups = |xs| <[f32]>::chunks(xs, row).flat_map(move |row| row.chunks(group));
        let outputs = out.chunks_mut(row).flat_map(|row| row.chunks_mut(group));
        for ((coded, scaled), out) in groups(&coded).zip(groups(unrounded)).zip(outputs) {
            let scale = codec.scale(scaled.iter().fold(0f32, |m, x| m.max(x.abs())));
            for (out, &x) in out.iter_mut().zip(coded) {
                *out = codec.decode(codec.quantize(x, scale)) as f32 * scale;
            }
        }
    }
}
