//! What can be wrong with a call or with the weights: the source of every error of these backends.

use fused_moe_core::ViewError;
use grouped_gemm::experts::ExpertsError;
use router::RoutingError;

/// Why weights are not packed or a call is not run.
///
/// Callers get it as the source of an [`Error`](fused_moe_core::Error) of kind `Contract`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrtllmError {
    /// Local experts that are no range of all experts.
    #[error("local experts {first}..{end} are not among {num_experts}")]
    LocalExperts {
        /// The first local expert.
        first: usize,
        /// One past the last.
        end: usize,
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// A buffer of the permutation that is too short.
    #[error("the {buffer} of the permutation need room for {wanted} entries, found {found}")]
    Buffer {
        /// Which buffer.
        buffer: &'static str,
        /// Entries that are needed.
        wanted: usize,
        /// Entries that there are.
        found: usize,
    },
    /// No routing method to be built into the kernel, or one that makes no sense.
    #[error("the kernel routes by itself and has got no routing method")]
    NoRouting,
    /// A routing method that makes no sense.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// Weights or a lent tensor that do not fit.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
    /// A lent tensor cannot be read or written, or the workspace is too small.
    #[error(transparent)]
    View(#[from] ViewError),
}
