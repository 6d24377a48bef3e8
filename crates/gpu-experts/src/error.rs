//! What can be wrong with a call or with the weights: the source of every error of this backend.

use device_runtime::DeviceError;
use fused_moe_core::{Error, Stage, Unsupported, ViewError};
use moe_kernels::{BadLaunch, LentError};

use crate::NAME;

/// Why weights are not packed or a call is not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuExpertsError {
    /// A configuration that is refused.
    #[error("the configuration is not supported: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Refused(Vec<Unsupported>),
    /// A plan that was made for other experts, or for another configuration.
    #[error("the plan says {what} {found}, needs {wanted}")]
    Plan {
        /// Which part of it.
        what: &'static str,
        /// What it says.
        found: String,
        /// What these experts do.
        wanted: String,
    },
    /// A weight matrix or its scale is not what the scheme has.
    #[error("{tensor} of local expert {expert}: {found}, needs {wanted}")]
    Weight {
        /// Local expert.
        expert: usize,
        /// Which tensor.
        tensor: &'static str,
        /// What there is.
        found: String,
        /// What there has to be.
        wanted: String,
    },
    /// Weights that were packed by another backend or for another layer.
    #[error("the weights are {found}, need {wanted}")]
    Foreign {
        /// What they are.
        found: String,
        /// What the kernel takes.
        wanted: String,
    },
    /// Rows in another format, or more of them than the plan allows.
    #[error("received {found}, needs {wanted}")]
    Received {
        /// What has arrived.
        found: String,
        /// What the kernel takes.
        wanted: String,
    },
    /// A stream or tensor that the kernels cannot take.
    #[error(transparent)]
    Lent(#[from] LentError),
    /// A lent tensor cannot be read, or the workspace is too small.
    #[error(transparent)]
    View(#[from] ViewError),
    /// Sizes that a kernel cannot do.
    #[error(transparent)]
    Launch(#[from] BadLaunch),
    /// The driver fails.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<GpuExpertsError> for Error {
    fn from(error: GpuExpertsError) -> Self {
        match error {
            GpuExpertsError::Device(_) => Error::other(Stage::Experts, NAME, error),
            _ => Error::contract(Stage::Experts, NAME, error),
        }
    }
}
