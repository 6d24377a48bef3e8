//! What can be wrong with a call or with the weights: the source of every error of this backend.

use fused_moe_core::{Error, Stage, ViewError};
use grouped_gemm::experts::ExpertsError;

use crate::NAME;

/// Why weights are not packed or a call is not run.
///
/// Callers get it as the source of an [`Error`] of kind `Contract`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AiterError {
    /// More experts per token than a sorted token id can number.
    #[error("top-k {top_k} does not fit the 8 bits of a slot (at most {})", crate::MAX_TOP_K)]
    TopK {
        /// Experts per token.
        top_k: usize,
    },
    /// Blocks of more entries than a sort pads to.
    #[error("blocks of {block_m} entries are too large to sort into (at most {})", crate::MAX_BLOCK_M)]
    BlockSize {
        /// Entries of a block.
        block_m: usize,
    },
    /// A sorting buffer that is too short.
    #[error("the {buffer} of the sort need room for {wanted} entries, found {found}")]
    SortBuffer {
        /// Which buffer.
        buffer: &'static str,
        /// Entries that are needed.
        wanted: usize,
        /// Entries that there are.
        found: usize,
    },
    /// Weights or a lent tensor that do not fit.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
    /// A lent tensor cannot be read or written, or the workspace is too small.
    #[error(transparent)]
    View(#[from] ViewError),
}

impl From<AiterError> for Error {
    fn from(error: AiterError) -> Self {
        Error::contract(Stage::Experts, NAME, error)
    }
}
