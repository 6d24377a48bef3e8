//! What the packed weights of two kernels of a backend can differ in.

use fused_moe_core::{MoeConfig, Padding, Rank};

use super::scheme::Scheme;

/// Everything in which the weights of two kernels of a backend can differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightLayout {
    /// What the GEMMs multiply.
    pub scheme: Scheme,
    /// Experts on the rank.
    pub experts: usize,
    /// Columns of gate and up, rows of down.
    pub hidden: usize,
    /// Rows of gate and up, columns of down.
    pub intermediate: usize,
    /// Whether every matrix has a bias.
    pub biases: bool,
    /// Of hidden and intermediate, what is packed as zeros.
    pub padding: Padding,
}

impl WeightLayout {
    /// The layout on `rank` under a configuration of `scheme`.
    pub fn new(scheme: Scheme, config: &MoeConfig, rank: Rank) -> Self {
        Self {
            scheme,
            experts: config.placement.num_local_experts(rank),
            hidden: config.hidden,
            intermediate: config.intermediate,
            biases: config.expert_bias,
            padding: config.padding,
        }
    }

    /// Rows and columns of gate and up, and of them those that are not padding.
    pub(super) fn gate_up_dims(&self) -> [[usize; 2]; 2] {
        let Self { hidden, intermediate, padding, .. } = *self;
        [[intermediate, hidden], [intermediate - padding.intermediate, hidden - padding.hidden]]
    }
}

impl std::fmt::Display for WeightLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { scheme, experts, hidden, intermediate, biases, padding } = self;
        write!(f, "{scheme} of {experts} experts, hidden {hidden}, intermediate {intermediate}")?;
        if *biases {
            f.write_str(", with biases")?;
        }
        match padding {
            Padding { hidden: 0, intermediate: 0 } => Ok(()),
            Padding { hidden, intermediate } => write!(f, ", {hidden} and {intermediate} of them padding"),
        }
    }
}
