//! Reference experts that were broken on purpose.

use fused_moe_core::{
    DType, Dispatched, Error, ExecCx, ExpertMask, ExpertMatrices, ExpertWeights, Experts, ExpertsCaps,
    ExpertsModular, ExpertsProvider, MoeConfig, Plan, QuantScheme, Rank, Result, Stage, Support, TensorView,
    TensorViewMut, WireFormat,
};

use crate::reference::{Format, PackedExperts, ReferenceExperts, ReferenceKernel, local_table};

const NAME: &str = "broken_experts";

/// A backend of modular experts with one bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokenExperts {
    /// `silu(x · up) · (x · gate)`.
    SwappedGateUp,
    /// The 0/1 mask is read as the map to local ids: whatever is remote goes to the first local expert, whatever is
    /// local to the second (vLLM #49758).
    MaskAsMap,
    /// FP8 weights become bf16 when they are packed, and activations are not quantised.
    DequantizedAtLoad,
    /// Per-tensor experts that take rows with a scale per token and use the first one for all.
    TokenScalesAsTensor,
}

impl ExpertsProvider for BrokenExperts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        let mut caps = match ReferenceExperts.supports(config) {
            Support::Supported(caps) => caps,
            refused => return refused,
        };
        caps.name = NAME;
        match (self, config.quant) {
            (BrokenExperts::DequantizedAtLoad, _) => {
                caps.accepts = vec![WireFormat::unquantized(config.in_dtype)];
            }
            (BrokenExperts::TokenScalesAsTensor, QuantScheme::Fp8PerTensor(format)) => {
                caps.accepts = vec![QuantScheme::Fp8Ptpc(format).quantized_wire(config.in_dtype)];
            }
            _ => {}
        }
        Support::Supported(caps)
    }

    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        ReferenceExperts.workspace_bytes(config, plan)
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        let table = match self {
            BrokenExperts::MaskAsMap => {
                let local = config.placement.num_local_experts(rank);
                let mask = ExpertMask::new(&config.placement, rank);
                let entries = mask.as_slice()[..config.num_experts()].iter();
                entries.map(|&entry| Some(entry as usize).filter(|&id| id < local)).collect()
            }
            _ => local_table(config, rank),
        };
        let mut config = config.clone();
        if *self == BrokenExperts::DequantizedAtLoad {
            config.quant = QuantScheme::Unquantized;
        }
        let inner = ReferenceKernel::new(&config, plan, table);
        Ok(Experts::Modular(Box::new(BrokenKernel { inner, bug: *self })))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        let experts: Vec<_> = match self {
            BrokenExperts::SwappedGateUp => experts.iter().map(swapped).collect(),
            _ => experts.to_vec(),
        };
        let format = match self {
            BrokenExperts::DequantizedAtLoad => Format::Dequantized,
            _ => Format::Stored,
        };
        PackedExperts::pack(NAME, config, rank, &experts, format)
    }
}

fn swapped<'a>(expert: &ExpertMatrices<'a>) -> ExpertMatrices<'a> {
    ExpertMatrices { gate: expert.up, up: expert.gate, ..*expert }
}

struct BrokenKernel {
    inner: ReferenceKernel,
    bug: BrokenExperts,
}

impl ExpertsModular for BrokenKernel {
    fn caps(&self) -> &ExpertsCaps {
        self.inner.caps()
    }

    fn workspace_bytes(&self) -> usize {
        self.inner.workspace_bytes()
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        let (Some(scale), BrokenExperts::TokenScalesAsTensor) = (input.scale, self.bug) else {
            return self.inner.apply(cx, weights, input, out);
        };
        let misread = |error| Error::contract(Stage::Experts, NAME, error);
        let scales = scale.as_slice::<f32>().map_err(misread)?;
        let first = vec![scales.first().copied().unwrap_or(1.0); scales.len()];
        let scale = Some(TensorView::from_slice(&first, DType::F32, scale.dims()).map_err(misread)?);
        let input = Dispatched { hidden: input.hidden, scale, arrived: input.arrived, output: None };
        self.inner.apply(cx, weights, &input, out)
    }
}
