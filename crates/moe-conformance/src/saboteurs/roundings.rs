//! Reference experts with one wrong rounding.

use fused_moe_core::{
    Error, ExpertMatrices, ExpertWeights, Experts, ExpertsCaps, ExpertsProvider, MoeConfig, Plan, Rank,
    Result, Stage, Support,
};

use crate::reference::{Format, PackedExperts, ReferenceExperts, ReferenceKernel, Slip, local_table};

const NAME: &str = "slightly_broken_experts";

/// A backend of modular experts that is off by a rounding: so little that only a bound of each element tells it from
/// a right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlightlyBrokenExperts(pub Slip);

impl ExpertsProvider for SlightlyBrokenExperts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        match ReferenceExperts.supports(config) {
            Support::Supported(mut caps) => {
                caps.name = NAME;
                Support::Supported(caps)
            }
            refused => refused,
        }
    }

    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        ReferenceExperts.workspace_bytes(config, plan)
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        if plan.experts() != NAME {
            let why = format!("the plan is for {}", plan.experts());
            return Err(Error::contract(Stage::Experts, NAME, why));
        }
        let kernel = ReferenceKernel::new(config, plan, local_table(config, rank)).slipping(self.0);
        Ok(Experts::Modular(Box::new(kernel)))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        let format = match self.0 {
            Slip::NarrowWeightScales => Format::NarrowScales,
            _ => Format::Stored,
        };
        PackedExperts::pack(NAME, config, rank, experts, format)
    }
}
