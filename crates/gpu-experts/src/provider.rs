//! The provider: what a registry asks.

use fused_moe_core::{
    ExpertMatrices, ExpertWeights, Experts, ExpertsCaps, ExpertsProvider, MoeConfig, Plan, Rank, Result,
    Support, Unsupported, check_expert_count,
};
use moe_kernels::grouped_gemm::TokenTile;
use moe_kernels::{Arch, Gpu, Target};

use crate::error::GpuExpertsError;
use crate::kernel::GpuKernel;
use crate::weights::PackedExperts;
use crate::{NAME, limits};

/// Devices that the grouped GEMMs are written for.
const ARCHES: [Arch; 1] = [Arch::Sm90a];

/// Makes experts on one device, named `aiter`.
///
/// They read the standard format with i32 global ids, rows quantised by the scheme, and their output is weighted and
/// reduced.
#[derive(Clone, Debug)]
pub struct GpuExperts {
    target: Target,
    tile: Option<TokenTile>,
}

impl GpuExperts {
    /// Experts on `target`. If that is not open, they refuse every configuration with the reason.
    pub fn new(target: impl Into<Target>) -> Self {
        Self { target: target.into(), tile: None }
    }

    /// Experts whose GEMMs take `tile` tokens at a time in every call, instead of what its rows make likely to be fast. Results are
    /// the same bits.
    #[must_use]
    pub fn with_tile(mut self, tile: TokenTile) -> Self {
        self.tile = Some(tile);
        self
    }

    fn reasons(&self, config: &MoeConfig) -> Vec<Unsupported> {
        let mut reasons = limits::reasons(config);
        reasons.extend(self.target.refusal(&ARCHES));
        reasons
    }

    fn gpu(&self, config: &MoeConfig) -> Result<&Gpu, GpuExpertsError> {
        let reasons = self.reasons(config);
        match self.target.gpu() {
            Ok(gpu) if reasons.is_empty() => Ok(gpu),
            _ => Err(GpuExpertsError::Refused(reasons)),
        }
    }
}

impl ExpertsProvider for GpuExperts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        Support::unless(self.reasons(config), limits::caps(config))
    }

    /// As the trait says; 0 for a scheme that is not supported.
    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        limits::workspace_bytes(config, plan.max_rows())
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        let kernel = GpuKernel::new((self.gpu(config)?, self.tile), config, plan, rank)?;
        Ok(Experts::Modular(Box::new(kernel)))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        check_expert_count(NAME, config, rank, experts)?;
        let packed = PackedExperts::pack(self.gpu(config)?, (config, rank), experts)?;
        Ok(packed.into_weights())
    }
}
