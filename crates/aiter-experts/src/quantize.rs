//! Activations in the form that the GEMMs read: as they arrived, or quantised here.

use fused_moe_core::{BLOCK, Granularity};
use grouped_gemm::{ActivationScale, Activations, Rows};
use half::bf16;
use quant::{QuantError, RowQuantizer, scale_for_amax};
use rayon::prelude::*;

use crate::AiterError;
use crate::rows::Pitched;
use crate::scheme::{Fp8Scheme, Scaling};

/// Elements that are worth a task of their own.
const TASK_ELEMENTS: usize = 16 << 10;

/// Lent room for codes without gaps and their scales.
#[derive(Debug)]
pub(crate) struct Codes<'a> {
    pub(crate) codes: &'a mut [u8],
    pub(crate) scales: &'a mut [f32],
}

/// Rows that one task takes, so that it has [`TASK_ELEMENTS`].
pub(crate) fn rows_per_task(columns: usize) -> usize {
    (TASK_ELEMENTS / columns.max(1)).max(1)
}

impl Fp8Scheme {
    /// Rows that arrived quantised by this scheme: the codes stay where they are. `kept` has room for the scales,
    /// of which the GEMM wants those per row without gaps.
    pub(crate) fn arrived<'a>(
        &self,
        codes: Pitched<'a, u8>,
        scales: Pitched<'a, f32>,
        kept: Codes<'a>,
    ) -> Activations<'a> {
        let scale = match self.scaling {
            Scaling::Block => ActivationScale::Group128(scales.for_gemm()),
            // A scale per tensor came once per row, because every source rank has its own.
            Scaling::Token | Scaling::Tensor => {
                let kept = &mut kept.scales[..scales.rows];
                for (row, kept) in kept.iter_mut().enumerate() {
                    *kept = scales.row(row)[0];
                }
                ActivationScale::PerToken(kept)
            }
        };
        Activations::Fp8 { codes: codes.for_gemm(), kind: self.kind, scale }
    }

    /// Quantises all rows of `x`, in parallel. A scale per tensor is that of all rows of `x`.
    pub(crate) fn quantize<'a>(
        &self,
        x: Pitched<'_, bf16>,
        into: Codes<'a>,
    ) -> Result<Activations<'a>, AiterError> {
        let quantizer = RowQuantizer::new(self.format);
        let per_task = rows_per_task(x.columns);
        let Codes { codes, scales } = into;
        let codes = &mut codes[..x.rows * x.columns];
        let code_rows = codes.par_chunks_mut(x.columns).with_min_len(per_task).enumerate();
        let scale = match self.scaling {
            Scaling::Tensor => {
                let rows = (0..x.rows).into_par_iter().with_min_len(per_task);
                let amax = rows.map(|row| quantizer.amax(x.row(row))).reduce(|| 0.0, f32::max);
                let scale = scale_for_amax(self.format, amax);
                code_rows.try_for_each(|(row, codes)| quantizer.quantize_scaled(x.row(row), scale, codes))?;
                ActivationScale::PerTensor(scale)
            }
            Scaling::Token => {
                let scales = &mut scales[..x.rows];
                let rows = code_rows.zip(scales.par_iter_mut());
                rows.try_for_each(|((row, codes), scale)| -> Result<(), QuantError> {
                    *scale = quantizer.quantize_per_token(x.row(row), codes)?;
                    Ok(())
                })?;
                ActivationScale::PerToken(scales)
            }
            Scaling::Block => {
                let groups = x.columns.div_ceil(BLOCK);
                let scales = &mut scales[..x.rows * groups];
                let rows = code_rows.zip(scales.par_chunks_mut(groups));
                rows.try_for_each(|((row, codes), scales)| {
                    quantizer.quantize_per_group(x.row(row), Granularity::PER_1X128, codes, scales)
                })?;
                ActivationScale::Group128(Rows { values: scales, pitch: groups })
            }
        };
        let codes = Rows { values: &*codes, pitch: x.columns };
        Ok(Activations::Fp8 { codes, kind: self.kind, scale })
    }
}
