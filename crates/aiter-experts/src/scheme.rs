//! Which configurations this backend runs, and how it runs their quantisation scheme.

use fused_moe_core::{Axis, ExpertsCaps, MoeConfig, Unsupported};
use grouped_gemm::experts::{ExpertsError, Supported, accepted_wires};

use crate::NAME;
use crate::moe_sorting::{MAX_TOKENS, MAX_TOP_K};

/// Resolves `config`, or says everything that is against it.
pub(crate) fn resolve(config: &MoeConfig) -> Result<Supported, Vec<Unsupported>> {
    Supported::resolve(config, own_limits(config))
}

/// The same, with one error that lists all reasons.
pub(crate) fn supported(config: &MoeConfig) -> Result<Supported, ExpertsError> {
    Supported::of(config, own_limits(config))
}

/// What the sorted token ids cannot number.
fn own_limits(config: &MoeConfig) -> Vec<Unsupported> {
    let mut why = Vec::new();
    if config.top_k > MAX_TOP_K {
        let wanted = format!("top_k of at most {MAX_TOP_K}");
        why.push(Unsupported::new(Axis::Shape, wanted, config.top_k.to_string()));
    }
    let rows = config.max_tokens_per_rank.saturating_mul(config.ep_size());
    if rows >= MAX_TOKENS {
        let wanted = format!("fewer than {MAX_TOKENS} tokens over all ranks");
        why.push(Unsupported::new(Axis::Shape, wanted, rows.to_string()));
    }
    why
}

/// The capabilities under a configuration that is supported.
pub(crate) fn caps(config: &MoeConfig) -> ExpertsCaps {
    let mut caps = ExpertsCaps::host(NAME, accepted_wires(config));
    caps.weight_on_input = true;
    caps
}
