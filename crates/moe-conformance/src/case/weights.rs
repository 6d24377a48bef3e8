//! Random expert weights of a layer, quantised by the oracle's own codecs.

mod stored;

use fused_moe_core::{ExpertMatrices, QuantScheme};

use super::Case;
use stored::{Drawn, StoredMatrix};

/// All experts of a layer, by global id.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    experts: Vec<[StoredMatrix; 3]>,
}

/// Standard deviation of the biases of gate and up, and of down: large enough that a missing one shows.
const BIAS: [f32; 2] = [3.0, 40.0];

/// The scale that activations are divided by before the two GEMMs, where the scheme takes it from the weights.
pub(super) fn input_scales(quant: QuantScheme) -> [Option<f32>; 2] {
    match quant {
        QuantScheme::Fp8PerTensorStatic(_) => [Some(0.5), Some(4.0)],
        QuantScheme::Nvfp4 => [Some(0.2), Some(1.0)],
        _ => [None, None],
    }
}

impl LayerWeights {
    /// Random weights, N(0, 1/√K) for a matrix of K columns, in the form that the scheme stores, with garbage where
    /// the case says that there is padding.
    pub(crate) fn random(case: &Case) -> Self {
        let seed = case.seed.derive(1_000_000);
        let (hidden, intermediate) = (case.hidden, case.intermediate);
        let used = [hidden - case.padding.hidden, intermediate - case.padding.intermediate];
        let [gemm1, gemm2] = input_scales(case.quant);
        let bias = BIAS.map(|deviation| case.expert_bias.then_some(deviation));
        let expert = |id: usize| {
            let part = |part: u64| seed.derive(id as u64 * 3 + part);
            let into = Drawn {
                dims: [intermediate, hidden],
                used: [used[1], used[0]],
                quant: case.quant,
                bias: bias[0],
                input_scale: gemm1,
            };
            let down = Drawn {
                dims: [hidden, intermediate],
                used,
                bias: bias[1],
                input_scale: gemm2,
                quant: case.quant,
            };
            [
                StoredMatrix::random(into, part(0)),
                StoredMatrix::random(into, part(1)),
                StoredMatrix::random(down, part(2)),
            ]
        };
        Self { experts: (0..case.num_experts).map(expert).collect() }
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

    /// The weights of another layer, cheaply: every expert has those of its successor, and input scales are others.
    #[must_use]
    pub fn rotated(mut self) -> Self {
        self.experts.rotate_left(1);
        self.experts.iter_mut().flatten().for_each(StoredMatrix::rescale_input);
        self
    }

    /// Bytes of values or codes, and of scales, of one expert as stored.
    pub(crate) fn bytes_per_expert(&self) -> usize {
        self.experts.first().map_or(0, |matrices| matrices.iter().map(StoredMatrix::bytes).sum())
    }
}
