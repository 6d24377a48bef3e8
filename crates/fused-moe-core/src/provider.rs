//! How backends are found without being named: providers, open to any crate.

use crate::config::MoeConfig;
use crate::error::{Error, Result, Stage};
use crate::experts::{ExpertMatrices, ExpertWeights, ExpertsModular, ExpertsMonolithic};
use crate::group::ProcessGroup;
use crate::negotiate::{ExpertsCaps, KernelKind, Plan, PrepareCaps, Support};
use crate::placement::Rank;
use crate::prepare_finalize::{PrepareAndFinalizeModular, PrepareAndFinalizeMonolithic};
use crate::quantization::WireFormat;
use crate::traffic::CommTraffic;

/// A built prepare/finalize backend of either kind.
pub enum PrepareFinalize {
    /// For modular experts.
    Modular(Box<dyn PrepareAndFinalizeModular>),
    /// For monolithic experts.
    Monolithic(Box<dyn PrepareAndFinalizeMonolithic>),
}

impl std::fmt::Debug for PrepareFinalize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PrepareFinalize").field(&self.caps().name).finish()
    }
}

impl PrepareFinalize {
    /// What it was built to do.
    pub fn caps(&self) -> &PrepareCaps {
        match self {
            PrepareFinalize::Modular(p) => p.caps(),
            PrepareFinalize::Monolithic(p) => p.caps(),
        }
    }

    /// Bytes that its buffers occupy.
    pub fn allocated_bytes(&self) -> usize {
        match self {
            PrepareFinalize::Modular(p) => p.allocated_bytes(),
            PrepareFinalize::Monolithic(p) => p.allocated_bytes(),
        }
    }
}

/// A built experts backend of either kind.
pub enum Experts {
    /// Takes top-k.
    Modular(Box<dyn ExpertsModular>),
    /// Takes logits.
    Monolithic(Box<dyn ExpertsMonolithic>),
}

impl std::fmt::Debug for Experts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Experts").field(&self.caps().name).finish()
    }
}

impl Experts {
    /// What it was built to do.
    pub fn caps(&self) -> &ExpertsCaps {
        match self {
            Experts::Modular(e) => e.caps(),
            Experts::Monolithic(e) => e.caps(),
        }
    }

    /// Bytes of workspace that it needs.
    pub fn workspace_bytes(&self) -> usize {
        match self {
            Experts::Modular(e) => e.workspace_bytes(),
            Experts::Monolithic(e) => e.workspace_bytes(),
        }
    }
}

/// Makes one kind of prepare/finalize backend.
pub trait PrepareFinalizeProvider: Send + Sync {
    /// Name by which it is chosen: lower case, underscores.
    fn name(&self) -> &'static str;

    /// What it can do under `config` for experts of `kind`. Pure: touches no device and allocates no buffer.
    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps>;

    /// Bytes of buffers on each rank for a plan; exactly what [`PrepareFinalizeProvider::build`] allocates.
    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize;

    /// Bytes that one token is expected to move between ranks, as [`crate::ExpectedSpread`] draws its experts.
    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes;

    /// What a token is expected to move over which links when it travels as `wire`, for a cost model. Asked for machines
    /// that this build does not run on, so it holds whether `config` is supported or not. `None` if nothing is known.
    fn traffic(&self, config: &MoeConfig, wire: &WireFormat) -> Option<CommTraffic> {
        let _ = (config, wire);
        None
    }

    /// Builds this rank's end. Collective.
    ///
    /// # Errors
    /// `Contract` for a group that it cannot use, `OutOfMemory`, `PeerLost`.
    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize>;
}

/// Expected bytes per token between ranks; what stays on the token's own rank does not count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WireBytes {
    /// From the token's rank: payload, scales, and everything that travels with them.
    pub dispatch: f64,
    /// Until its output is back.
    pub combine: f64,
}

/// Makes one kind of experts backend, and packs weights for it.
pub trait ExpertsProvider: Send + Sync {
    /// Name by which it is chosen: lower case, underscores.
    fn name(&self) -> &'static str;

    /// What it can do under `config`. Pure: touches no device and allocates no buffer.
    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps>;

    /// Bytes of workspace for a plan; exactly what the built kernel asks for.
    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize;

    /// Builds the kernel of `rank`.
    ///
    /// # Errors
    /// `Contract` for a plan that is not one of this backend.
    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts>;

    /// Packs the experts that `rank` holds, in local order, for the built kernel.
    ///
    /// # Errors
    /// `Contract` with the tensor, what was wanted and what was found.
    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights>;
}

/// Checks that as many experts are packed as `rank` holds.
///
/// # Errors
/// `Contract` with both numbers.
pub fn check_expert_count(
    backend: &'static str,
    config: &MoeConfig,
    rank: Rank,
    experts: &[ExpertMatrices<'_>],
) -> Result<()> {
    let wanted = config.placement.num_local_experts(rank);
    if experts.len() == wanted {
        return Ok(());
    }
    let why = format!("{rank} holds {wanted} experts, {} were given", experts.len());
    Err(Error::contract(Stage::Experts, backend, why))
}
