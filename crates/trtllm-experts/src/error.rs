//! What can be wrong with a call or with the weights: the source of every error of these backends.

use fused_moe_core::ViewError;
use grouped_gemm::GemmError;
use grouped_gemm::experts::ExpertsError;
use router::RoutingError;

/// Why weights are not packed or a call is not run.
///
/// Callers get it as the source of an [`Error`](fused_moe_core::Error) of kind `Contract`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrtllmError {
    /// More rows than the kernel was built for.
    #[error("{rows} rows were received, at most {max} are possible")]
    TooManyRows {
        /// Rows received.
        rows: usize,
        /// The most there can be.
        max: usize,
    },
    /// An id that names no expert and is not the padding id -1.
    #[error("expert id {id} of row {row} slot {slot} is neither -1 nor below {num_experts}")]
    ExpertId {
        /// The row.
        row: usize,
        /// The slot in the row.
        slot: usize,
        /// The id.
        id: i32,
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// One expert twice in one row.
    #[error("row {row} names expert {id} twice")]
    DuplicateExpertId {
        /// The row.
        row: usize,
        /// The id.
        id: i32,
    },
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
    /// Rows cannot be multiplied.
    #[error(transparent)]
    Gemm(#[from] GemmError),
}
