//! What can be wrong with a call or with the weights: the source of every error of this backend.

use fused_moe_core::{Error, Stage, ViewError};
use grouped_gemm::experts::ExpertsError;

use crate::NAME;

/// Why weights are not packed or a call is not run.
///
/// Callers get it as the source of an [`Error`] of kind `Contract`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchedError {
    /// An expert with a negative number of rows or more than its batch has room for.
    #[error("local expert {expert} has {count} rows, its batch has room for {max}")]
    RowsOfExpert {
        /// Index on this rank.
        expert: usize,
        /// What the counts say.
        count: i32,
        /// Rows of a batch.
        max: usize,
    },
    /// Weights or a lent tensor that do not fit.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
    /// A lent tensor cannot be read or written, or the workspace is too small.
    #[error(transparent)]
    View(#[from] ViewError),
}

impl From<BatchedError> for Error {
    fn from(error: BatchedError) -> Self {
        Error::contract(Stage::Experts, NAME, error)
    }
}
