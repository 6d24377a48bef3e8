//! The trip of activations through the codes of a scheme.

use fused_moe_core::{ExpertMatrices, Granularity, QuantScheme, ScaleSource};
use half::bf16;

use super::codec::{dequantize_rows, quantize_rows_scaled};
use super::fp4;

/// How the activations before one of the two GEMMs are quantised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Codes {
    /// The scheme.
    pub(crate) quant: QuantScheme,
    /// The static scale of FP8, the global scale of NVFP4; not read for other schemes.
    pub(crate) input_scale: Option<f32>,
}

impl Codes {
    /// Before gemm1: with the largest input scale of all gates and ups.
    pub(crate) fn of_gemm1(quant: QuantScheme, experts: &[ExpertMatrices<'_>]) -> Self {
        let scales = experts.iter().flat_map(|e| [e.gate.input_scale, e.up.input_scale]);
        Self { quant, input_scale: scales.flatten().reduce(f32::max) }
    }

    /// Before gemm2: with the largest input scale of all downs.
    pub(crate) fn of_gemm2(quant: QuantScheme, experts: &[ExpertMatrices<'_>]) -> Self {
        let scales = experts.iter().filter_map(|e| e.down.input_scale);
        Self { quant, input_scale: scales.reduce(f32::max) }
    }

    /// Whether all rows of a call share a scale that depends on them.
    pub(crate) fn couples_rows(&self) -> bool {
        self.quant.activation_granularity() == Some(Granularity::Tensor)
            && self.quant.scale_source() == ScaleSource::Dynamic
    }

    /// The static FP8 scale, for schemes that have one.
    pub(crate) fn static_scale(&self) -> Option<f32> {
        self.input_scale.filter(|_| self.quant.scale_source() == ScaleSource::Static)
    }

    /// Rows `[rows, width]` as the GEMM reads them; exact for schemes that leave activations alone.
    pub(crate) fn through(&self, rows: &[bf16], width: usize) -> Vec<f64> {
        match (self.quant.fp8(), self.quant.activation_granularity()) {
            (Some(format), Some(granularity)) => {
                let codes = quantize_rows_scaled(format, granularity, (rows, width), self.static_scale());
                dequantize_rows(format, granularity, &codes, width)
            }
            // A global scale that is missing makes the answer visibly wrong.
            _ if self.quant == QuantScheme::Nvfp4 => {
                fp4::nv_rows(rows, width, self.input_scale.unwrap_or(f32::NAN))
            }
            _ => rows.iter().map(|x| x.to_f64()).collect(),
        }
    }
}
