//! Random expert weights of a layer, quantised by the oracle's own codec.

use fused_moe_core::{
    BLOCK, DType, ExpertMatrices, Fp8Format, QuantScheme, TensorView, WeightMatrix, WeightScale,
};
use half::bf16;

use crate::oracle::Codec;
use crate::seed::{Seed, normal};

/// All experts of a layer, by global id.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    experts: Vec<[StoredMatrix; 3]>,
}

impl LayerWeights {
    /// Random weights, N(0, 1/√K) for a matrix of K columns, in the form that `quant` stores.
    pub(crate) fn random(
        num_experts: usize,
        [intermediate, hidden]: [usize; 2],
        quant: QuantScheme,
        seed: Seed,
    ) -> Self {
        let expert = |id: usize| {
            let part = |part: u64| seed.derive(id as u64 * 3 + part);
            [
                StoredMatrix::random([intermediate, hidden], quant, part(0)),
                StoredMatrix::random([intermediate, hidden], quant, part(1)),
                StoredMatrix::random([hidden, intermediate], quant, part(2)),
            ]
        };
        Self { experts: (0..num_experts).map(expert).collect() }
    }

    /// Views of all experts in order of their global ids.
    pub fn matrices(&self) -> Vec<ExpertMatrices<'_>> {
        let views = self.experts.iter().map(|[gate, up, down]| ExpertMatrices {
            gate: gate.view(),
            up: up.view(),
            down: down.view(),
        });
        views.collect()
    }

    /// The weights of another layer, cheaply: every expert has those of its successor.
    #[must_use]
    pub fn rotated(mut self) -> Self {
        self.experts.rotate_left(1);
        self
    }

    /// Bytes of values or codes, and of scales, of one expert as stored.
    pub(crate) fn bytes_per_expert(&self) -> usize {
        self.experts.first().map_or(0, |matrices| matrices.iter().map(StoredMatrix::bytes).sum())
    }
}

/// One matrix in the form of a checkpoint.
#[derive(Clone, Debug)]
struct StoredMatrix {
    dims: [usize; 2],
    values: Values,
    scales: Vec<f32>,
    quant: QuantScheme,
}

#[derive(Clone, Debug)]
enum Values {
    Bf16(Vec<bf16>),
    Codes(Vec<u8>, Fp8Format),
}

impl StoredMatrix {
    fn random(dims @ [rows, cols]: [usize; 2], quant: QuantScheme, seed: Seed) -> Self {
        let mut rng = seed.rng();
        let deviation = 1.0 / (cols as f32).sqrt();
        let values: Vec<bf16> =
            (0..rows * cols).map(|_| bf16::from_f32(deviation * normal(&mut rng))).collect();
        let Some(format) = quant.fp8() else {
            return Self { dims, values: Values::Bf16(values), scales: Vec::new(), quant };
        };
        let (tile_rows, tile_cols) = match quant {
            QuantScheme::Fp8Block(_) => (BLOCK, BLOCK),
            QuantScheme::Fp8Ptpc(_) => (1, cols),
            _ => (rows, cols),
        };
        let scale_cols = cols.div_ceil(tile_cols);
        let scale_at = |i: usize| i / cols / tile_rows * scale_cols + i % cols / tile_cols;
        let mut amax = vec![0f32; rows.div_ceil(tile_rows) * scale_cols];
        for (i, x) in values.iter().enumerate() {
            let amax = &mut amax[scale_at(i)];
            *amax = amax.max(x.to_f32().abs());
        }
        let codec = Codec::new(format);
        let scales: Vec<f32> = amax.into_iter().map(|amax| codec.scale(amax)).collect();
        let codes =
            values.iter().enumerate().map(|(i, x)| codec.quantize(x.to_f32(), scales[scale_at(i)])).collect();
        Self { dims, values: Values::Codes(codes, format), scales, quant }
    }

    fn view(&self) -> WeightMatrix<'_> {
        const FITS: &str = "the vector was made for these dimensions";
        let [rows, cols] = self.dims;
        let values = match &self.values {
            Values::Bf16(values) => TensorView::from_slice(values, DType::Bf16, &self.dims),
            Values::Codes(codes, format) => TensorView::from_slice(codes, format.dtype(), &self.dims),
        };
        let scales = |dims: &[usize]| TensorView::from_slice(&self.scales, DType::F32, dims).expect(FITS);
        let scale = match self.quant {
            QuantScheme::Fp8Block(_) => {
                Some(WeightScale::Block128(scales(&[rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)])))
            }
            QuantScheme::Fp8Ptpc(_) => Some(WeightScale::Channel(scales(&[rows]))),
            _ => self.scales.first().copied().map(WeightScale::Tensor),
        };
        WeightMatrix { scale, ..WeightMatrix::unquantized(values.expect(FITS)) }
    }

    fn bytes(&self) -> usize {
        let values = match &self.values {
            Values::Bf16(values) => size_of_val(values.as_slice()),
            Values::Codes(codes, _) => codes.len(),
        };
        values + size_of_val(self.scales.as_slice())
    }
}
