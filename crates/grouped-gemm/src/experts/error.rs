//! What can be wrong with the weights or the tensors of a call.

use fused_moe_core::{DType, GlobalExpertId, TensorView, ViewError};
use quant::QuantError;

use crate::GemmError;

/// Why weights are not packed or a lent tensor cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExpertsError {
    /// A plan that this backend did not negotiate.
    #[error("the plan {what} {found}, needs {wanted}")]
    Plan {
        /// The part of the plan.
        what: &'static str,
        /// What this backend runs.
        wanted: String,
        /// What the plan says.
        found: String,
    },
    /// A configuration that the backend refuses.
    #[error("the configuration is not supported: {0}")]
    Refused(String),
    /// A weight tensor, or its scale, that is not what the configuration asks for.
    #[error("{tensor} of expert {} needs {wanted}, found {found}", expert.0)]
    Weight {
        /// The expert.
        expert: GlobalExpertId,
        /// `gate`, `up` or `down`, or one of these and `scale`.
        tensor: &'static str,
        /// What the configuration asks for.
        wanted: String,
        /// What was given.
        found: String,
    },
    /// Packed weights that were made for another configuration or backend.
    #[error("the weights were packed for {found}, this kernel runs {wanted}")]
    WeightsOf {
        /// What the kernel was built for.
        wanted: String,
        /// What the weights were packed for.
        found: String,
    },
    /// A tensor of a call that does not fit.
    #[error("{tensor} is {found}, needs {wanted}")]
    Tensor {
        /// Which tensor.
        tensor: &'static str,
        /// What the kernel reads or writes.
        wanted: String,
        /// What was lent.
        found: String,
    },
    /// More rows than the kernel was built for, or than its indices can number.
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
    /// A lent tensor cannot be read or written, or the workspace is too small.
    #[error(transparent)]
    View(#[from] ViewError),
    /// Activations cannot be quantised.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// Weights cannot be packed or multiplied.
    #[error(transparent)]
    Gemm(#[from] GemmError),
}

impl ExpertsError {
    /// A tensor of a call that is not what was `wanted`.
    pub fn tensor(tensor: &'static str, view: &TensorView<'_>, wanted: String) -> Self {
        ExpertsError::Tensor { tensor, wanted, found: shape(view.dims(), view.dtype()) }
    }
}

/// Dimensions and element type as they are printed.
pub(crate) fn shape(dims: &[usize], dtype: DType) -> String {
    format!("{dims:?} of {dtype}")
}
