//! Which configurations this backend runs.

use fused_moe_core::{
    ActivationFormat, Axis, ExpertsCaps, MoeConfig, Rank, TopKWeightAndReduce, Unsupported,
};
use grouped_gemm::experts::{ExpertsError, Supported, accepted_wires};

use crate::NAME;

/// Rows of all batches of a rank must be fewer than this: they are numbered by `u32`.
pub(crate) const MAX_ROWS: usize = u32::MAX as usize;

/// Resolves `config`, or says everything that is against it.
pub(crate) fn resolve(config: &MoeConfig) -> Result<Supported, Vec<Unsupported>> {
    Supported::resolve(config, own_limits(config))
}

/// The same, with one error that lists all reasons.
pub(crate) fn supported(config: &MoeConfig) -> Result<Supported, ExpertsError> {
    Supported::of(config, own_limits(config))
}

/// More rows than can be numbered.
fn own_limits(config: &MoeConfig) -> Vec<Unsupported> {
    let rows = config.max_tokens_per_rank.saturating_mul(config.ep_size());
    let rows = rows.saturating_mul(most_local_experts(config));
    if rows < MAX_ROWS {
        return Vec::new();
    }
    let wanted = format!("fewer than {MAX_ROWS} rows on a rank");
    vec![Unsupported::new(Axis::Shape, wanted, rows.to_string())]
}

/// The capabilities under a configuration that is supported.
pub(crate) fn caps(config: &MoeConfig) -> ExpertsCaps {
    let mut caps = ExpertsCaps::host(NAME, accepted_wires(config));
    caps.format = ActivationFormat::BatchedExperts;
    caps.weight_and_reduce = TopKWeightAndReduce::delegate();
    caps
}

/// Experts of the rank that holds most.
pub(crate) fn most_local_experts(config: &MoeConfig) -> usize {
    let ranks = (0..config.ep_size() as u32).map(Rank);
    ranks.map(|rank| config.placement.num_local_experts(rank)).max().unwrap_or(0)
}
