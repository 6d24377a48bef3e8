//! Weights of a checkpoint in the scheme that a run asks for.

use std::borrow::Cow;

use anyhow::{Context, bail};
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
}

#[derive(Debug)]
enum Values<'c> {
    Bf16(Cow<'c, [bf16]>),
    Fp8 { codes: Cow<'c, [u8]>, format: Fp8Format, scales: Scales },
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
        let values = match (stored.scale(), scheme) {
            (None, _) => {
                let values = stored.values().to_bf16().context("FP8 codes without a scale")?;
                return Self::from_bf16(values, [rows, cols], scheme)
                    .with_context(|| stored.name().to_string());
            }
            (Some(scale), QuantScheme::Unquantized) => dequantised(stored, scale)?,
            (Some(scale), _) if scale.scheme() == scheme => Values::Fp8 {
                codes: Cow::Borrowed(stored.values().view().as_slice::<u8>()?),
                format: Fp8Format::E4M3Fn,
                scales: match scale {
                    StoredScale::PerTensor(s) => Scales::Tensor(*s),
                    StoredScale::PerChannel(s) => Scales::Channel(s.clone()),
                    StoredScale::Block128(s) => {
                        Scales::Block(WeightScales::Block.dims(rows, cols), s.clone())
                    }
                    other => bail!("{}: scales {other:?} have no place here", stored.name()),
                },
            },
            (Some(scale), _) => {
                bail!("{} is {}, which cannot be turned into {scheme}", stored.name(), scale.scheme())
            }
        };
        Ok(Self { rows, cols, values })
    }

    /// bf16 values, `[rows, cols]`, quantised to `scheme`.
    pub fn from_bf16(
        values: Cow<'c, [bf16]>,
        [rows, cols]: [usize; 2],
        scheme: QuantScheme,
    ) -> anyhow::Result<Self> {
        let granularity = match scheme {
            QuantScheme::Unquantized => return Ok(Self { rows, cols, values: Values::Bf16(values) }),
            QuantScheme::Fp8Block(_) => WeightScales::Block,
            QuantScheme::Fp8Ptpc(_) => WeightScales::Channel,
            QuantScheme::Fp8PerTensor(_) => WeightScales::Tensor,
            _ => bail!("no way to quantise to {scheme}"),
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
        Ok(Self { rows, cols, values: Values::Fp8 { codes: codes.into(), format, scales } })
    }

    /// The matrix as the core describes it.
    pub fn view(&self) -> Result<WeightMatrix<'_>, ViewError> {
        let dims = [self.rows, self.cols];
        match &self.values {
            Values::Bf16(values) => {
                Ok(WeightMatrix::unquantized(TensorView::from_slice(values, DType::Bf16, &dims)?))
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
                let values = TensorView::from_slice(codes, format.dtype(), &dims)?;
                Ok(WeightMatrix { values, scale: Some(scale), bias: None, input_scale: None })
            }
        }
    }
}

fn dequantised<'c>(stored: &StoredMatrix<'_>, scale: &StoredScale) -> anyhow::Result<Values<'c>> {
    let (rows, cols) = (stored.rows(), stored.cols());
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
    let mut values = vec![bf16::ZERO; rows * cols];
    weights.dequantize_bf16(&mut values)?;
    Ok(Values::Bf16(values.into()))
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
