//! The provider: what a registry asks.

use fused_moe_core::{
    ExpertMatrices, ExpertWeights, Experts, ExpertsCaps, ExpertsProvider, MoeConfig, Plan, Rank, Result,
    Support, check_expert_count,
};
use grouped_gemm::Executor;
use grouped_gemm::experts::PackedExperts;

use crate::kernel::{AiterKernel, sizes};
use crate::scheme::{caps, resolve, supported};
use crate::{AiterError, NAME, SortPolicy};

/// Makes host experts with AITER's contract, named `aiter`.
///
/// They read the standard format with i32 global ids, and their output is weighted and reduced. Dispatch may
/// bring rows quantised by the scheme (preferred) or in bf16, which the experts then quantise themselves.
#[derive(Clone, Copy, Debug)]
pub struct AiterExperts {
    executor: Executor,
    sort_policy: SortPolicy,
}

impl AiterExperts {
    /// Experts on the fastest instruction set, with the threads of rayon's global pool.
    pub fn new() -> Self {
        Self::with_executor(Executor::detect())
    }

    /// Experts whose GEMMs run on `executor`. The number of threads does not change a bit of the result; the
    /// instruction set may.
    pub fn with_executor(executor: Executor) -> Self {
        Self { executor, sort_policy: SortPolicy::default() }
    }

    /// Experts whose kernels sort under `policy`. Results are the same bits under all of them.
    #[must_use]
    pub fn with_sort_policy(mut self, policy: SortPolicy) -> Self {
        self.sort_policy = policy;
        self
    }

    /// How kernels that are built from now on sort.
    pub fn sort_policy(&self) -> SortPolicy {
        self.sort_policy
    }
}

impl Default for AiterExperts {
    fn default() -> Self {
        Self::new()
    }
}

impl ExpertsProvider for AiterExperts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        match resolve(config) {
            Ok(_) => Support::Supported(caps(config)),
            Err(reasons) => Support::Unsupported(reasons),
        }
    }

    /// As the trait says; 0 for a configuration that is not supported.
    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        sizes(config, plan, &self.executor).map_or(0, |sizes| sizes.bytes())
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        Ok(Experts::Modular(Box::new(AiterKernel::new(
            config,
            plan,
            rank,
            (self.executor, self.sort_policy),
        )?)))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        check_expert_count(NAME, config, rank, experts)?;
        let scheme = supported(config).map_err(AiterError::from)?.scheme;
        let packed = PackedExperts::pack(scheme, config, rank, experts).map_err(AiterError::from)?;
        Ok(packed.into_weights(NAME))
    }
}
