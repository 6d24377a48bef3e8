//! Weights as the reference experts keep them: the stored values or codes, decoded row by row when they are used.

use fused_moe_core::{
    BLOCK, DType, Error, ExpertMatrices, ExpertWeights, Fp8Format, MoeConfig, QuantScheme, Rank, Result,
    Stage, TensorView, WeightMatrix, WeightScale, check_expert_count,
};
use half::bf16;
use quant::decode_table;

use crate::oracle::fp4;
use crate::stored::{Scale, Values};

/// How the weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// As stored.
    Stored,
    /// FP8 codes turned into bf16 when they are packed. Only a saboteur does this.
    Dequantized,
    /// As stored, but for f32 scales rounded to bf16. Only a saboteur does this.
    NarrowScales,
}

/// The experts of one rank in local order.
pub(crate) struct PackedExperts {
    pub(super) experts: Vec<[Matrix; 3]>,
    /// Largest input scale of gates and ups, and of downs.
    pub(super) input_scales: [Option<f32>; 2],
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
        let used = [intermediate - config.padding.intermediate, hidden - config.padding.hidden];
        let into =
            Wanted { dims: [intermediate, hidden], used, quant: config.quant, bias: config.expert_bias };
        let down = Wanted { dims: [hidden, intermediate], used: [used[1], used[0]], ..into };
        let pack = |expert: &ExpertMatrices<'_>| {
            Ok([
                Matrix::pack(expert.gate, into, format)?,
                Matrix::pack(expert.up, into, format)?,
                Matrix::pack(expert.down, down, format)?,
            ])
        };
        let packed: Result<Vec<_>, String> = experts.iter().map(pack).collect();
        let packed = packed.map_err(|why| Error::contract(Stage::Experts, backend, why))?;
        let bytes = packed.iter().flatten().map(Matrix::bytes).sum();
        let gemm1 = experts.iter().flat_map(|e| [e.gate.input_scale, e.up.input_scale]).flatten();
        let gemm2 = experts.iter().filter_map(|e| e.down.input_scale);
        let input_scales = [gemm1.reduce(f32::max), gemm2.reduce(f32::max)];
        let needs_scales = matches!(config.quant, QuantScheme::Nvfp4 | QuantScheme::Fp8PerTensorStatic(_))
            && !experts.is_empty();
        let usable = |scale: &Option<f32>| scale.is_some_and(|s| s > 0.0 && s.is_finite());
        if needs_scales && !input_scales.iter().all(usable) {
            let why = format!("input scales {input_scales:?} are not usable");
            return Err(Error::contract(Stage::Experts, backend, why));
        }
        // Without experts nothing is computed, whatever rows arrive.
        let kept = if experts.is_empty() { [Some(1.0); 2] } else { input_scales };
        let weights = ExpertWeights::new(backend, Self { experts: packed, input_scales: kept }, bytes);
        Ok(weights.with_input_scale(input_scales[0]))
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
    /// Rows and columns that are not padding.
    used_rows: usize,
    used: usize,
    /// Zero where there is none, and in padding.
    bias: Vec<f32>,
    values: Values,
    scale: Scale,
}

/// What a matrix must be.
#[derive(Clone, Copy)]
struct Wanted {
    dims: [usize; 2],
    /// Rows and columns that are not padding.
    used: [usize; 2],
    quant: QuantScheme,
    bias: bool,
}

impl Matrix {
    fn pack(matrix: WeightMatrix<'_>, wanted: Wanted, format: Format) -> Result<Self, String> {
        let Wanted { dims: [rows, cols], used, quant, .. } = wanted;
        let (found, dtype) = (matrix.values.dims(), matrix.values.dtype());
        let is_fp4 = matches!(quant, QuantScheme::Mxfp4 | QuantScheme::Nvfp4);
        let stored = [rows, if is_fp4 { cols / 2 } else { cols }];
        if found != stored {
            return Err(format!("matrix is {found:?}, needs {stored:?}"));
        }
        let element =
            if is_fp4 { DType::Fp4E2M1x2 } else { quant.fp8().map_or(DType::Bf16, Fp8Format::dtype) };
        if dtype != element {
            return Err(format!("matrix is of {dtype}, needs {element}"));
        }
        let values = match quant.fp8() {
            None if is_fp4 => Values::Fp4(collect::<u8>(matrix.values, rows)?),
            None => Values::Bf16(collect::<bf16>(matrix.values, rows)?),
            Some(format) => Values::Fp8(collect::<u8>(matrix.values, rows)?, format),
        };
        let floats = |view: TensorView<'_>, count: usize| {
            let scales = view.as_slice::<f32>().map_err(|e| e.to_string())?;
            match scales.len() == count {
                true => Ok(scales.to_vec()),
                false => Err(format!("{} scales, needs {count}", scales.len())),
            }
        };
        let scale = match (quant, matrix.scale) {
            (QuantScheme::Unquantized, None) => Scale::None,
            (
                QuantScheme::Fp8PerTensor(_) | QuantScheme::Fp8PerTensorStatic(_),
                Some(WeightScale::Tensor(scale)),
            ) => Scale::Tensor(scale),
            (QuantScheme::Fp8Ptpc(_), Some(WeightScale::Channel(view))) => {
                Scale::Channel(floats(view, rows)?)
            }
            (QuantScheme::Fp8Block(_), Some(WeightScale::Block128(view))) => {
                Scale::Block(floats(view, rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK))?)
            }
            (QuantScheme::Mxfp4, Some(WeightScale::Mx32(view))) => Scale::Mx(collect::<u8>(view, rows)?),
            (QuantScheme::Nvfp4, Some(WeightScale::Nv16 { blocks, global })) => {
                Scale::Nv(collect::<u8>(blocks, rows)?, global)
            }
            (_, found) => return Err(format!("scale {found:?} does not belong to {quant}")),
        };
        if matrix.bias.is_some() != wanted.bias {
            return Err(format!("bias {:?} where there should be {}", matrix.bias, wanted.bias));
        }
        let mut bias = match matrix.bias {
            Some(view) if view.dims() != [rows] => {
                return Err(format!("bias is {:?}, needs [{rows}]", view.dims()));
            }
            Some(view) => {
                view.as_slice::<bf16>().map_err(|e| e.to_string())?.iter().map(|x| x.to_f32()).collect()
            }
            None => vec![0.0; rows],
        };
        bias[used[0]..].fill(0.0);
        let packed = Self { cols, used_rows: used[0], used: used[1], bias, values, scale };
        Ok(match format {
            Format::Stored => packed,
            Format::Dequantized => packed.dequantized(rows),
            Format::NarrowScales => Self { scale: packed.scale.narrow(), ..packed },
        })
    }

    fn dequantized(&self, rows: usize) -> Self {
        let mut values = vec![bf16::ZERO; rows * self.cols];
        let mut row_values = vec![0.0; self.cols];
        for (row, values) in values.chunks_exact_mut(self.cols).enumerate() {
            self.row(row, &mut row_values);
            values.iter_mut().zip(&row_values).for_each(|(to, &x)| *to = bf16::from_f32(x));
        }
        let (cols, used, bias) = (self.cols, self.used, self.bias.clone());
        Self { cols, used_rows: self.used_rows, used, bias, values: Values::Bf16(values), scale: Scale::None }
    }

    fn bytes(&self) -> usize {
        self.values.bytes() + self.scale.bytes()
    }

    /// The bias of row `row`.
    pub(super) fn bias(&self, row: usize) -> f32 {
        self.bias[row]
    }

    /// Writes row `row`, dequantised, to `out`; 0 in padding.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let cols = self.cols;
        let range = row * cols..(row + 1) * cols;
        match &self.values {
            Values::Bf16(values) => {
                out.iter_mut().zip(&values[range]).for_each(|(out, x)| *out = x.to_f32());
            }
            Values::Fp8(codes, format) => {
                let table = decode_table(*format);
                out.iter_mut().zip(&codes[range]).for_each(|(out, &code)| *out = table[usize::from(code)]);
            }
            Values::Fp4(codes) => {
                let codes = &codes[row * (cols / 2)..][..cols / 2];
                for (column, out) in out.iter_mut().enumerate() {
                    *out = fp4::decode(fp4::unpack(codes, column)) as f32;
                }
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
            Scale::Mx(scales) => {
                let scales = scales[row * (cols / fp4::MX_GROUP)..].iter();
                for (group, &scale) in out.chunks_mut(fp4::MX_GROUP).zip(scales) {
                    group.iter_mut().for_each(|x| *x *= fp4::decode_e8m0(scale) as f32);
                }
            }
            Scale::Nv(blocks, global) => {
                let table = decode_table(Fp8Format::E4M3Fn);
                let blocks = blocks[row * (cols / fp4::NV_GROUP)..].iter();
                for (group, &block) in out.chunks_mut(fp4::NV_GROUP).zip(blocks) {
                    group.iter_mut().for_each(|x| *x *= table[usize::from(block)] * global);
                }
            }
        }
        out[self.used..].fill(0.0);
        if row >= self.used_rows {
            out.fill(0.0);
        }
    }
}

fn collect<T: fused_moe_core::Element>(view: TensorView<'_>, rows: usize) -> Result<Vec<T>, String> {
    let mut values = Vec::with_capacity(rows * view.dims()[1]);
    for row in 0..rows {
        values.extend_from_slice(view.row::<T>(row).map_err(|e| e.to_string())?);
    }
    Ok(values)
}
