//! Activations in the form that the GEMMs read: as they arrived, or quantised here.

use fused_moe_core::{BLOCK, Granularity};
use half::bf16;
use quant::fp4::Nvfp4Rows;
use quant::{QuantError, RowQuantizer, scale_for_amax};
use rayon::prelude::*;

use super::error::ExpertsError;
use super::rows::Pitched;
use super::scheme::{Fp8Scheme, Scaling, Scheme};
use crate::{ActivationScale, Activations, Rows};

/// Elements that are worth a task of their own.
const TASK_ELEMENTS: usize = 16 << 10;

/// Lent room for quantised activations without gaps: codes and their scales, or the values of NVFP4 codes.
#[derive(Debug)]
pub struct Codes<'a> {
    /// Codes, row after row.
    pub codes: &'a mut [u8],
    /// Scales, row after row.
    pub scales: &'a mut [f32],
    /// Products of codes and group scales, row after row.
    pub values: &'a mut [bf16],
}

/// Rows that one task takes, so that it is worth a task.
pub(super) fn rows_per_task(columns: usize) -> usize {
    (TASK_ELEMENTS / columns.max(1)).max(1)
}

impl Scheme {
    /// Rows in bf16 as the GEMMs of this scheme read them: as they are, or quantised, in parallel. A dynamic scale per
    /// tensor is that of all rows of `x`. Only schemes that have one read `input_scale`,
    /// [`PackedExperts::input_scales`](super::PackedExperts::input_scales).
    ///
    /// # Errors
    /// [`ExpertsError::Quant`].
    pub fn activations<'a>(
        self,
        x: Pitched<'a, bf16>,
        input_scale: f32,
        into: Codes<'a>,
    ) -> Result<Activations<'a>, ExpertsError> {
        if self.reads_bf16() {
            return Ok(Activations::Bf16(x.for_gemm()));
        }
        self.quantize_rows(([x.rows, x.columns], |row| x.row(row)), input_scale, into)
    }

    /// As [`Scheme::activations`] for the rows of `x` that `gather` names, in its order, for schemes that do not
    /// [read bf16](Scheme::reads_bf16). Other rows are not read.
    ///
    /// # Errors
    /// [`ExpertsError::Quant`].
    pub fn quantize_gathered<'a>(
        self,
        (x, gather): (Pitched<'_, bf16>, &[u32]),
        input_scale: f32,
        into: Codes<'a>,
    ) -> Result<Activations<'a>, ExpertsError> {
        let row = |row: usize| x.row(gather[row] as usize);
        self.quantize_rows(([gather.len(), x.columns], row), input_scale, into)
    }

    fn quantize_rows<'a, 'x>(
        self,
        (dims, x): ([usize; 2], impl Fn(usize) -> &'x [bf16] + Sync),
        input_scale: f32,
        into: Codes<'a>,
    ) -> Result<Activations<'a>, ExpertsError> {
        if let Scheme::Fp8(fp8) = self {
            return fp8.quantize_rows((dims, x), input_scale, into);
        }
        let [rows, columns] = dims;
        let values = &mut into.values[..rows * columns];
        let quantizer = Nvfp4Rows::new(input_scale)?;
        let value_rows = values.par_chunks_mut(columns).with_min_len(rows_per_task(columns)).enumerate();
        value_rows.try_for_each(|(row, values)| quantizer.quantize_to_values(x(row), values))?;
        Ok(Activations::ScaledBf16 { values: Rows { values: &*values, pitch: columns }, scale: input_scale })
    }
}

impl Fp8Scheme {
    /// Rows that arrived quantised by this scheme: the codes stay where they are. `kept` has room for the scales,
    /// of which the GEMM wants those per row without gaps.
    pub fn arrived<'a>(
        &self,
        codes: Pitched<'a, u8>,
        scales: Pitched<'a, f32>,
        kept: Codes<'a>,
    ) -> Activations<'a> {
        let scale = match self.scaling {
            Scaling::Block => ActivationScale::Group128(scales.for_gemm()),
            // A scale per tensor came once per row, because every source rank has its own.
            Scaling::Token | Scaling::Tensor | Scaling::Static => {
                let kept = &mut kept.scales[..scales.rows];
                for (row, kept) in kept.iter_mut().enumerate() {
                    *kept = scales.row(row)[0];
                }
                ActivationScale::PerToken(kept)
            }
        };
        Activations::Fp8 { codes: codes.for_gemm(), kind: self.kind, scale }
    }

    fn quantize_rows<'a, 'x>(
        &self,
        ([rows, columns], x): ([usize; 2], impl Fn(usize) -> &'x [bf16] + Sync),
        input_scale: f32,
        into: Codes<'a>,
    ) -> Result<Activations<'a>, ExpertsError> {
        let quantizer = RowQuantizer::new(self.format);
        let per_task = rows_per_task(columns);
        let Codes { codes, scales, .. } = into;
        let codes = &mut codes[..rows * columns];
        let code_rows = codes.par_chunks_mut(columns).with_min_len(per_task).enumerate();
        let scale = match self.scaling {
            Scaling::Tensor => {
                let all = (0..rows).into_par_iter().with_min_len(per_task);
                let amax = all.map(|row| quantizer.amax(x(row))).reduce(|| 0.0, f32::max);
                let scale = scale_for_amax(self.format, amax);
                code_rows.try_for_each(|(row, codes)| quantizer.quantize_scaled(x(row), scale, codes))?;
                ActivationScale::PerTensor(scale)
            }
            Scaling::Static => {
                code_rows
                    .try_for_each(|(row, codes)| quantizer.quantize_scaled(x(row), input_scale, codes))?;
                ActivationScale::PerTensor(input_scale)
            }
            Scaling::Token => {
                let scales = &mut scales[..rows];
                let pairs = code_rows.zip(scales.par_iter_mut());
                pairs.try_for_each(|((row, codes), scale)| -> Result<(), QuantError> {
                    *scale = quantizer.quantize_per_token(x(row), codes)?;
                    Ok(())
                })?;
                ActivationScale::PerToken(scales)
            }
            Scaling::Block => {
                let groups = columns.div_ceil(BLOCK);
                let scales = &mut scales[..rows * groups];
                let pairs = code_rows.zip(scales.par_chunks_mut(groups));
                pairs.try_for_each(|((row, codes), scales)| {
                    quantizer.quantize_per_group(x(row), Granularity::PER_1X128, codes, scales)
                })?;
                ActivationScale::Group128(Rows { values: scales, pitch: groups })
            }
        };
        let codes = Rows { values: &*codes, pitch: columns };
        Ok(Activations::Fp8 { codes, kind: self.kind, scale })
    }
}
