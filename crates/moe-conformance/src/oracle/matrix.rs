//! Weight matrices of any stored form, read row by row in f64.

use fused_moe_core::{BLOCK, DType, Fp8Format, TensorView, ViewError, WeightMatrix, WeightScale};
use half::{bf16, f16};

use super::OracleError;
use super::codec::Codec;

/// A weight matrix `[rows, cols]` whose shape was checked.
pub(super) struct Matrix<'a> {
    values: TensorView<'a>,
    scale: Option<WeightScale<'a>>,
    /// Values of the 256 codes of an FP8 matrix.
    table: Vec<f64>,
}

impl<'a> Matrix<'a> {
    pub(super) fn new(
        name: &'static str,
        matrix: WeightMatrix<'a>,
        dims: [usize; 2],
    ) -> Result<Self, OracleError> {
        let shape = |found: &[usize], wanted: &[usize]| match found == wanted {
            true => Ok(()),
            false => Err(OracleError::Shape { tensor: name, found: found.to_vec(), wanted: wanted.to_vec() }),
        };
        shape(matrix.values.dims(), &dims)?;
        match matrix.scale {
            Some(WeightScale::Channel(scales)) => {
                let count = scales.as_slice::<f32>()?.len();
                shape(&[count], &[dims[0]])?;
            }
            Some(WeightScale::Block128(scales)) => {
                shape(scales.dims(), &[dims[0].div_ceil(BLOCK), dims[1].div_ceil(BLOCK)])?;
                scales.as_slice::<f32>()?;
            }
            _ => {}
        }
        let format = match matrix.values.dtype() {
            DType::Bf16 | DType::F16 | DType::F32 => None,
            DType::Fp8E4M3Fn => Some(Fp8Format::E4M3Fn),
            DType::Fp8E4M3Fnuz => Some(Fp8Format::E4M3Fnuz),
            found => return Err(OracleError::DType { tensor: name, found }),
        };
        let table = format.map_or(Vec::new(), |format| {
            let codec = Codec::new(format);
            (0..=255).map(|code| codec.decode(code)).collect()
        });
        Ok(Self { values: matrix.values, scale: matrix.scale, table })
    }

    /// Writes row `row`, dequantised, to `out`.
    pub(super) fn row(&self, row: usize, out: &mut [f64]) -> Result<(), ViewError> {
        match self.values.dtype() {
            DType::Bf16 => copy(self.values.row::<bf16>(row)?, out, |x| x.to_f64()),
            DType::F16 => copy(self.values.row::<f16>(row)?, out, |x| x.to_f64()),
            DType::F32 => copy(self.values.row::<f32>(row)?, out, f64::from),
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
            // The enum may grow; a scale that is not known makes the answer visibly wrong.
            Some(_) => out.fill(f64::NAN),
        }
        Ok(())
    }
}

fn copy<T: Copy>(from: &[T], to: &mut [f64], widen: impl Fn(T) -> f64) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = widen(from));
}
