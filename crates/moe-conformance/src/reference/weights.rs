//! Weights as the reference experts keep them: the stored values or codes, decoded row by row when they are used.

use fused_moe_core::{
    BLOCK, DType, Error, ExpertMatrices, ExpertWeights, Fp8Format, MoeConfig, QuantScheme, Rank, Result,
    Stage, WeightMatrix, WeightScale, check_expert_count,
};
use half::bf16;
use quant::decode_table;

/// How the weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// As stored.
    Stored,
    /// FP8 codes turned into bf16 when they are packed. Only a saboteur does this.
    Dequantized,
}

/// The experts of one rank in local order.
pub(crate) struct PackedExperts {
    pub(super) experts: Vec<[Matrix; 3]>,
}

impl PackedExperts {
    /// Packs for `backend`.
    pub(crate) fn pack(
        backend: &'static str,
        config: &MoeConfig,
        rank: Rank,
        experts: &[ExpertMatrices<'_>],
        format: Format,
    ) -> Result<ExpertWeights> {
        check_expert_count(backend, config, rank, experts)?;
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let pack = |expert: &ExpertMatrices<'_>| {
            Ok([
                Matrix::pack(expert.gate, [intermediate, hidden], config.quant, format)?,
                Matrix::pack(expert.up, [intermediate, hidden], config.quant, format)?,
                Matrix::pack(expert.down, [hidden, intermediate], config.quant, format)?,
            ])
        };
        let packed: Result<Vec<_>, String> = experts.iter().map(pack).collect();
        let packed = packed.map_err(|why| Error::contract(Stage::Experts, backend, why))?;
        let bytes = packed.iter().flatten().map(Matrix::bytes).sum();
        Ok(ExpertWeights::new(backend, Self { experts: packed }, bytes))
    }

    /// The experts in `weights`, which must have been packed by `backend`.
    pub(crate) fn of<'a>(weights: &'a ExpertWeights, backend: &'static str) -> Result<&'a Self> {
        let mine = weights.packed::<Self>().filter(|_| weights.backend() == backend);
        let why = || format!("the weights were packed by {}", weights.backend());
        mine.ok_or_else(|| Error::contract(Stage::Experts, backend, why()))
    }
}

/// One matrix.
pub(super) struct Matrix {
    cols: usize,
    values: Values,
    scale: Scale,
}

enum Values {
    Bf16(Vec<bf16>),
    Codes(Vec<u8>, Fp8Format),
}

enum Scale {
    None,
    Tensor(f32),
    Channel(Vec<f32>),
    Block(Vec<f32>),
}

impl Matrix {
    fn pack(
        matrix: WeightMatrix<'_>,
        [rows, cols]: [usize; 2],
        quant: QuantScheme,
        format: Format,
    ) -> Result<Self, String> {
        let (found, dtype) = (matrix.values.dims(), matrix.values.dtype());
        if found != [rows, cols] {
            return Err(format!("matrix is {found:?}, needs {:?}", [rows, cols]));
        }
        let wanted = quant.fp8().map_or(DType::Bf16, Fp8Format::dtype);
        if dtype != wanted {
            return Err(format!("matrix is of {dtype}, needs {wanted}"));
        }
        let values = match quant.fp8() {
            None => Values::Bf16(collect::<bf16>(matrix, rows)?),
            Some(format) => Values::Codes(collect::<u8>(matrix, rows)?, format),
        };
        let floats = |view: fused_moe_core::TensorView<'_>, count: usize| {
            let scales = view.as_slice::<f32>().map_err(|e| e.to_string())?;
            match scales.len() == count {
                true => Ok(scales.to_vec()),
                false => Err(format!("{} scales, needs {count}", scales.len())),
            }
        };
        let scale = match (quant, matrix.scale) {
            (QuantScheme::Unquantized, None) => Scale::None,
            (QuantScheme::Fp8PerTensor(_), Some(WeightScale::Tensor(scale))) => Scale::Tensor(scale),
            (QuantScheme::Fp8Ptpc(_), Some(WeightScale::Channel(view))) => {
                Scale::Channel(floats(view, rows)?)
            }
            (QuantScheme::Fp8Block(_), Some(WeightScale::Block128(view))) => {
                Scale::Block(floats(view, rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK))?)
            }
            (_, found) => return Err(format!("scale {found:?} does not belong to {quant}")),
        };
        let packed = Self { cols, values, scale };
        Ok(match format {
            Format::Stored => packed,
            Format::Dequantized => packed.dequantized(rows),
        })
    }

    fn dequantized(&self, rows: usize) -> Self {
        let mut values = vec![bf16::ZERO; rows * self.cols];
        let mut row_values = vec![0.0; self.cols];
        for (row, values) in values.chunks_exact_mut(self.cols).enumerate() {
            self.row(row, &mut row_values);
            values.iter_mut().zip(&row_values).for_each(|(to, &x)| *to = bf16::from_f32(x));
        }
        Self { cols: self.cols, values: Values::Bf16(values), scale: Scale::None }
    }

    fn bytes(&self) -> usize {
        let values = match &self.values {
            Values::Bf16(values) => size_of_val(values.as_slice()),
            Values::Codes(codes, _) => codes.len(),
        };
        let scales = match &self.scale {
            Scale::None => 0,
            Scale::Tensor(_) => 1,
            Scale::Channel(scales) | Scale::Block(scales) => scales.len(),
        };
        values + scales * size_of::<f32>()
    }

    /// Writes row `row`, dequantised, to `out`.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            Values::Bf16(values) => {
                out.iter_mut().zip(&values[range]).for_each(|(out, x)| *out = x.to_f32());
            }
            Values::Codes(codes, format) => {
                let table = decode_table(*format);
                out.iter_mut().zip(&codes[range]).for_each(|(out, &code)| *out = table[usize::from(code)]);
            }
        }
        match &self.scale {
            Scale::None => {}
            Scale::Tensor(scale) => out.iter_mut().for_each(|x| *x *= scale),
            Scale::Channel(scales) => out.iter_mut().for_each(|x| *x *= scales[row]),
            Scale::Block(scales) => {
                let columns = self.cols.div_ceil(BLOCK);
                let scales = &scales[row / BLOCK * columns..][..columns];
                for (block, scale) in out.chunks_mut(BLOCK).zip(scales) {
                    block.iter_mut().for_each(|x| *x *= scale);
                }
            }
        }
    }
}

fn collect<T: fused_moe_core::Element>(matrix: WeightMatrix<'_>, rows: usize) -> Result<Vec<T>, String> {
    let mut values = Vec::with_capacity(rows * matrix.values.dims()[1]);
    for row in 0..rows {
        values.extend_from_slice(matrix.values.row::<T>(row).map_err(|e| e.to_string())?);
    }
    Ok(values)
}
