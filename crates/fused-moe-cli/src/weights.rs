//! Weights of a checkpoint in the scheme that a run asks for.

use std::borrow::Cow;

use anyhow::{Context, bail};
use fused_moe::quant::fp4::{Fp4Scales, Fp4Weights};
use fused_moe::quant::{QuantizedWeights, WeightQuantizer, WeightScales};
use fused_moe::{
    DType, ExpertMatrices, Fp8Format, QuantScheme, TensorView, ViewError, WeightMatrix, WeightScale,
};
use half::bf16;
use moe_checkpoint::{ExpertTensors, WeightMatrix as StoredMatrix, WeightScale as StoredScale};

/// One matrix, ready to be packed.
#[derive(Debug)]
pub struct LoadedMatrix<'c> {
    rows: usize,
    cols: usize,
    values: Values<'c>,
    bias: Option<&'c [f32]>,
    input_scale: Option<f32>,
}

#[derive(Debug)]
enum Values<'c> {
    Bf16(Cow<'c, [bf16]>),
    Fp8 {
        codes: Cow<'c, [u8]>,
        format: Fp8Format,
        scales: Scales,
    },
    /// As they are in the file.
    Fp4 {
        codes: TensorView<'c>,
        scale: WeightScale<'c>,
    },
}

#[derive(Debug)]
enum Scales {
    Tensor(f32),
    Channel(Vec<f32>),
    Block([usize; 2], Vec<f32>),
}

impl<'c> LoadedMatrix<'c> {
    /// `stored` in `scheme`: as it is, quantised from bf16, or dequantised to bf16.
    pub fn new(stored: &'c StoredMatrix<'_>, scheme: QuantScheme) -> anyhow::Result<Self> {
        let (rows, cols) = (stored.rows(), stored.cols());
        let loaded = match stored.scale() {
            None => {
                let values = stored.values().to_bf16().context("codes without a scale")?;
                Self::from_bf16(values, [rows, cols], scheme).with_context(|| stored.name().to_string())?
            }
            Some(scale) if scheme == QuantScheme::Unquantized => {
                Self::of(dequantised(stored, scale)?, rows, cols)
            }
            Some(scale) if stored.scheme() == scheme => {
                let input_scale = stored.input_scale();
                Self { input_scale, ..Self::of(as_stored(stored, scale)?, rows, cols) }
            }
            Some(_) => {
                bail!("{} is {}, which cannot be turned into {scheme}", stored.name(), stored.scheme())
            }
        };
        Ok(Self { bias: stored.bias(), ..loaded })
    }

    fn of(values: Values<'c>, rows: usize, cols: usize) -> Self {
        Self { rows, cols, values, bias: None, input_scale: None }
    }

    /// bf16 values, `[rows, cols]`, quantised to `scheme`.
    pub fn from_bf16(
        values: Cow<'c, [bf16]>,
        [rows, cols]: [usize; 2],
        scheme: QuantScheme,
    ) -> anyhow::Result<Self> {
        let granularity = match scheme {
            QuantScheme::Unquantized => return Ok(Self::of(Values::Bf16(values), rows, cols)),
            QuantScheme::Fp8Block(_) => WeightScales::Block,
            QuantScheme::Fp8Ptpc(_) => WeightScales::Channel,
            QuantScheme::Fp8PerTensor(_) => WeightScales::Tensor,
            _ => bail!("no way to quantise to {scheme}: it is run as a checkpoint stores it"),
        };
        let format = scheme.fp8().context("an FP8 scheme has a format")?;
        let view = TensorView::from_slice(&values, DType::Bf16, &[rows, cols])?;
        let mut codes = vec![0; rows * cols];
        let mut scales = vec![0.0; granularity.count(rows, cols)];
        WeightQuantizer::new(format, granularity).quantize(view, &mut codes, &mut scales)?;
        let scales = match granularity {
            WeightScales::Tensor => Scales::Tensor(scales[0]),
            WeightScales::Channel => Scales::Channel(scales),
            _ => Scales::Block(granularity.dims(rows, cols), scales),
        };
        Ok(Self::of(Values::Fp8 { codes: codes.into(), format, scales }, rows, cols))
    }

    /// The matrix as the core describes it.
    pub fn view(&self) -> Result<WeightMatrix<'_>, ViewError> {
        let dims = [self.rows, self.cols];
        let bias =
            self.bias.map(|bias| TensorView::from_slice(bias, DType::F32, &[self.rows])).transpose()?;
        let matrix = match &self.values {
            Values::Bf16(values) => {
                WeightMatrix::unquantized(TensorView::from_slice(values, DType::Bf16, &dims)?)
            }
            Values::Fp8 { codes, format, scales } => {
                let scale = match scales {
                    Scales::Tensor(s) => WeightScale::Tensor(*s),
                    Scales::Channel(s) => {
                        WeightScale::Channel(TensorView::from_slice(s, DType::F32, &[self.rows])?)
                    }
                    Scales::Block(dims, s) => {
                        WeightScale::Block128(TensorView::from_slice(s, DType::F32, dims)?)
                    }
                };
                WeightMatrix::quantized(TensorView::from_slice(codes, format.dtype(), &dims)?, scale)
            }
            Values::Fp4 { codes, scale } => WeightMatrix::quantized(*codes, *scale),
        };
        Ok(WeightMatrix { bias, input_scale: self.input_scale, ..matrix })
    }
}

/// The codes and scales of `stored`, which has `scale`.
fn as_stored<'c>(stored: &'c StoredMatrix<'_>, scale: &'c StoredScale<'_>) -> anyhow::Result<Values<'c>> {
    let view = stored.values().view();
    let scales = match scale {
        StoredScale::PerTensor(s) => Scales::Tensor(*s),
        StoredScale::PerChannel(s) => Scales::Channel(s.clone()),
        StoredScale::Block128(s) => {
            Scales::Block(WeightScales::Block.dims(stored.rows(), stored.cols()), s.clone())
        }
        StoredScale::Mx32(codes) => {
            return Ok(Values::Fp4 { codes: view, scale: WeightScale::Mx32(codes.view()) });
        }
        StoredScale::Nv16 { blocks, global } => {
            let scale = WeightScale::Nv16 { blocks: blocks.view(), global: *global };
            return Ok(Values::Fp4 { codes: view, scale });
        }
        other => bail!("{}: scales {other:?} have no place here", stored.name()),
    };
    Ok(Values::Fp8 { codes: Cow::Borrowed(view.as_slice::<u8>()?), format: Fp8Format::E4M3Fn, scales })
}

fn dequantised<'c>(stored: &StoredMatrix<'_>, scale: &StoredScale<'_>) -> anyhow::Result<Values<'c>> {
    let (rows, cols) = (stored.rows(), stored.cols());
    let mut values = vec![bf16::ZERO; rows * cols];
    let fp4 = match scale {
        StoredScale::Mx32(scales) => Some((scales, None)),
        StoredScale::Nv16 { blocks, global } => Some((blocks, Some(*global))),
        _ => None,
    };
    if let Some((scales, global)) = fp4 {
        let (codes, scales) = (dense(stored.values().view())?, dense(scales.view())?);
        let scales = match global {
            None => Fp4Scales::Mx32(&scales),
            Some(global) => Fp4Scales::Nv16 { blocks: &scales, global },
        };
        Fp4Weights { dims: [rows, cols], codes: &codes, scales }.dequantize_bf16(&mut values)?;
        return Ok(Values::Bf16(values.into()));
    }
    let (granularity, scales) = match scale {
        StoredScale::PerTensor(s) => (WeightScales::Tensor, std::slice::from_ref(s)),
        StoredScale::PerChannel(s) => (WeightScales::Channel, s.as_slice()),
        StoredScale::Block128(s) => (WeightScales::Block, s.as_slice()),
        other => bail!("{}: scales {other:?} have no place here", stored.name()),
    };
    let view = stored.values().view();
    let weights = QuantizedWeights {
        format: Fp8Format::E4M3Fn,
        granularity,
        dims: [rows, cols],
        codes: view.as_slice()?,
        scales,
    };
    weights.dequantize_bf16(&mut values)?;
    Ok(Values::Bf16(values.into()))
}

/// The bytes of `view` without the gaps that may lie between its rows.
fn dense(view: TensorView<'_>) -> Result<Cow<'_, [u8]>, ViewError> {
    if view.layout().is_contiguous() {
        return Ok(Cow::Borrowed(view.as_slice()?));
    }
    let rows = (0..view.dims()[0]).map(|row| view.row::<u8>(row));
    Ok(Cow::Owned(rows.collect::<Result<Vec<_>, _>>()?.concat()))
}

/// One expert, ready to be packed.
#[derive(Debug)]
pub struct LoadedExpert<'c> {
    /// `[intermediate, hidden]`.
    pub gate: LoadedMatrix<'c>,
    /// `[intermediate, hidden]`.
    pub up: LoadedMatrix<'c>,
    /// `[hidden, intermediate]`.
    pub down: LoadedMatrix<'c>,
}

impl<'c> LoadedExpert<'c> {
    /// The three matrices in `scheme`.
    pub fn new(stored: &'c ExpertTensors<'_>, scheme: QuantScheme) -> anyhow::Result<Self> {
        Ok(Self {
            gate: LoadedMatrix::new(&stored.gate, scheme)?,
            up: LoadedMatrix::new(&stored.up, scheme)?,
            down: LoadedMatrix::new(&stored.down, scheme)?,
        })
    }

    /// The expert as the core describes it.
    pub fn view(&self) -> Result<ExpertMatrices<'_>, ViewError> {
        Ok(ExpertMatrices { gate: self.gate.view()?, up: self.up.view()?, down: self.down.view()? })
    }
}
