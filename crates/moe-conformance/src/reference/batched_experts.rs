//! Modular experts on the batched format.

use fused_moe_core::{
    ActivationFormat, Arrived, DType, Dispatched, Error, ExecCx, ExpertMatrices, ExpertWeights, Experts,
    ExpertsCaps, ExpertsModular, ExpertsProvider, MoeConfig, Plan, Rank, Result, Source, Stage, Support,
    TensorViewMut, TopKWeightAndReduce,
};
use half::bf16;

use super::compute::{Compute, Pair};
use super::experts::{refusals, wires};
use super::weights::{Format, PackedExperts};

const NAME: &str = "reference_batched_experts";

/// Makes modular host experts, named `reference_batched_experts`: `[local_experts, max_tokens, hidden]` in and
/// out, unweighted; the combine weights and reduces.
#[derive(Clone, Copy, Debug, Default)]
pub struct BatchedExperts;

fn caps(config: &MoeConfig) -> ExpertsCaps {
    let mut caps = ExpertsCaps::host(NAME, wires(config));
    caps.format = ActivationFormat::BatchedExperts;
    caps.weight_and_reduce = TopKWeightAndReduce::delegate();
    caps
}

fn compute(config: &MoeConfig, plan: &Plan, local: usize) -> Compute {
    Compute::new(config, local * plan.max_rows(), local * plan.max_rows())
}

impl ExpertsProvider for BatchedExperts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        Support::unless(refusals(config), caps(config))
    }

    /// As the trait says; the same on all ranks, so for the rank that holds most experts.
    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        compute(config, plan, most_local(config)).workspace_bytes()
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, _rank: Rank) -> Result<Experts> {
        let compute = compute(config, plan, most_local(config));
        let kernel = BatchedKernel { caps: caps(config), compute, max_rows: plan.max_rows() };
        Ok(Experts::Modular(Box::new(kernel)))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        PackedExperts::pack(NAME, config, rank, experts, Format::Stored)
    }
}

fn most_local(config: &MoeConfig) -> usize {
    let ranks = (0..config.ep_size() as u32).map(Rank);
    ranks.map(|rank| config.placement.num_local_experts(rank)).max().unwrap_or(0)
}

struct BatchedKernel {
    caps: ExpertsCaps,
    compute: Compute,
    max_rows: usize,
}

impl BatchedKernel {
    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        packed: &PackedExperts,
        input: &Dispatched<'_>,
        out: &mut TensorViewMut<'_>,
    ) -> Result<(), Source> {
        let Arrived::Batched { tokens } = input.arrived else {
            return Err("the batch is not in the batched format".into());
        };
        let counts = tokens.0.as_slice::<i32>()?;
        let valid: Vec<usize> = counts
            .iter()
            .enumerate()
            .flat_map(|(expert, &count)| (0..count.max(0) as usize).map(move |i| expert * self.max_rows + i))
            .collect();
        let mut arena = cx.workspace.reborrow();
        let x = self.compute.arrived((input, packed.input_scales[0]), &valid, &mut arena)?;
        let pairs: Vec<Pair> = valid
            .iter()
            .enumerate()
            .map(|(row, at)| Pair { row, expert: at / self.max_rows, early: 1.0 })
            .collect();
        let outputs = self.compute.run(packed, x, &pairs, &mut arena)?;
        let hidden = self.compute.hidden;
        let is_f32 = out.dtype() == DType::F32;
        for (&at, output) in valid.iter().zip(outputs.chunks_exact(hidden)) {
            let range = at * hidden..(at + 1) * hidden;
            if is_f32 {
                out.as_mut_slice::<f32>()?[range].copy_from_slice(output);
            } else {
                let row = &mut out.as_mut_slice::<bf16>()?[range];
                row.iter_mut().zip(output).for_each(|(out, &y)| *out = bf16::from_f32(y));
            }
        }
        Ok(())
    }
}

impl ExpertsModular for BatchedKernel {
    fn caps(&self) -> &ExpertsCaps {
        &self.caps
    }

    fn workspace_bytes(&self) -> usize {
        self.compute.workspace_bytes()
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let packed = PackedExperts::of(weights, NAME)?;
        self.run(cx, packed, input, &mut out).map_err(|why| Error::contract(Stage::Experts, NAME, why))
    }
}
