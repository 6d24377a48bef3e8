//! Weight matrices of any stored form, read row by row in f64.

use fused_moe_core::{BLOCK, DType, Fp8Format, TensorView, ViewError, WeightMatrix, WeightScale};
use half::{bf16, f16};

use super::codec::Codec;
use super::{OracleError, fp4};

/// A weight matrix `[rows, cols]` whose shape was checked.
pub(super) struct Matrix<'a> {
    values: TensorView<'a>,
    scale: Option<WeightScale<'a>>,
    /// Values of the 256 codes of an FP8 matrix, or of the block scales of an NVFP4 one.
    table: Vec<f64>,
    /// Columns that are not padding.
    used: usize,
}

impl<'a> Matrix<'a> {
    pub(super) fn new(
        name: &'static str,
        matrix: WeightMatrix<'a>,
        dims: [usize; 2],
        padding: usize,
    ) -> Result<Self, OracleError> {
        let shape = |found: &[usize], wanted: &[usize]| match found == wanted {
            true => Ok(()),
            false => Err(OracleError::Shape { tensor: name, found: found.to_vec(), wanted: wanted.to_vec() }),
        };
        let is_fp4 = matrix.values.dtype() == DType::Fp4E2M1x2;
        shape(matrix.values.dims(), &[dims[0], if is_fp4 { dims[1] / 2 } else { dims[1] }])?;
        match matrix.scale {
            Some(WeightScale::Channel(scales)) => {
                let count = scales.as_slice::<f32>()?.len();
                shape(&[count], &[dims[0]])?;
            }
            Some(WeightScale::Block128(scales)) => {
                shape(scales.dims(), &[dims[0].div_ceil(BLOCK), dims[1].div_ceil(BLOCK)])?;
                scales.as_slice::<f32>()?;
            }
            Some(WeightScale::Mx32(scales)) => shape(scales.dims(), &[dims[0], dims[1] / fp4::MX_GROUP])?,
            Some(WeightScale::Nv16 { blocks, .. }) => {
                shape(blocks.dims(), &[dims[0], dims[1] / fp4::NV_GROUP])?;
            }
            _ => {}
        }
        let format = match matrix.values.dtype() {
            DType::Bf16 | DType::F16 | DType::F32 => None,
            // Its block scales, if it has any, are of this format.
            DType::Fp8E4M3Fn | DType::Fp4E2M1x2 => Some(Fp8Format::E4M3Fn),
            DType::Fp8E4M3Fnuz => Some(Fp8Format::E4M3Fnuz),
            found => return Err(OracleError::DType { tensor: name, found }),
        };
        let table = format.map_or(Vec::new(), |format| {
            let codec = Codec::new(format);
            (0..=255).map(|code| codec.decode(code)).collect()
        });
        Ok(Self { values: matrix.values, scale: matrix.scale, table, used: dims[1] - padding })
    }

    /// Writes row `row`, dequantised, to `out`; 0 where it is padding.
    pub(super) fn row(&self, row: usize, out: &mut [f64]) -> Result<(), ViewError> {
        match self.values.dtype() {
            DType::Bf16 => copy(self.values.row::<bf16>(row)?, out, |x| x.to_f64()),
            DType::F16 => copy(self.values.row::<f16>(row)?, out, |x| x.to_f64()),
            DType::F32 => copy(self.values.row::<f32>(row)?, out, f64::from),
            DType::Fp4E2M1x2 => {
                let codes = self.values.row::<u8>(row)?;
                for (column, out) in out.iter_mut().enumerate() {
                    *out = fp4::decode(fp4::unpack(codes, column));
                }
            }
            _ => copy(self.values.row::<u8>(row)?, out, |code| self.table[usize::from(code)]),
        }
        match self.scale {
            None => {}
            Some(WeightScale::Tensor(scale)) => out.iter_mut().for_each(|x| *x *= f64::from(scale)),
            Some(WeightScale::Channel(scales)) => {
                let scale = f64::from(scales.as_slice::<f32>()?[row]);
                out.iter_mut().for_each(|x| *x *= scale);
            }
            Some(WeightScale::Block128(scales)) => {
                let columns = out.len().div_ceil(BLOCK);
                let scales = &scales.as_slice::<f32>()?[row / BLOCK * columns..][..columns];
                for (block, &scale) in out.chunks_mut(BLOCK).zip(scales) {
                    block.iter_mut().for_each(|x| *x *= f64::from(scale));
                }
            }
            Some(WeightScale::Mx32(scales)) => {
                for (group, &scale) in out.chunks_mut(fp4::MX_GROUP).zip(scales.row::<u8>(row)?) {
                    group.iter_mut().for_each(|x| *x *= fp4::decode_e8m0(scale));
                }
            }
            Some(WeightScale::Nv16 { blocks, global }) => {
                for (group, &block) in out.chunks_mut(fp4::NV_GROUP).zip(blocks.row::<u8>(row)?) {
                    let scale = self.table[usize::from(block)] * f64::from(global);
                    group.iter_mut().for_each(|x| *x *= scale);
                }
            }
            // The enum may grow; a scale that is not known makes the answer visibly wrong.
            Some(_) => out.fill(f64::NAN),
        }
        out[self.used..].fill(0.0);
        Ok(())
    }
}

fn copy<T: Copy>(from: &[T], to: &mut [f64], widen: impl Fn(T) -> f64) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = widen(from));
}

/// A bias `[rows]` in f64; zeros where there is none.
pub(super) fn bias(
    name: &'static str,
    matrix: WeightMatrix<'_>,
    rows: usize,
) -> Result<Vec<f64>, OracleError> {
    let Some(bias) = matrix.bias else { return Ok(vec![0.0; rows]) };
    if bias.dims() != [rows] {
        let (found, wanted) = (bias.dims().to_vec(), vec![rows]);
        return Err(OracleError::Shape { tensor: name, found, wanted });
    }
    match bias.dtype() {
        DType::Bf16 => Ok(bias.as_slice::<bf16>()?.iter().map(|x| x.to_f64()).collect()),
        DType::F32 => Ok(bias.as_slice::<f32>()?.iter().map(|&x| f64::from(x)).collect()),
        found => Err(OracleError::DType { tensor: name, found }),
    }
}
