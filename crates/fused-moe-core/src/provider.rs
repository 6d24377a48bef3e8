//! How backends are found without being named: providers, open to any crate.

use crate::config::MoeConfig;
use crate::error::{Error, Result, Stage};
use crate::experts::{ExpertMatrices, ExpertWeights, ExpertsModular, ExpertsMonolithic};
use crate::group::ProcessGroup;
use crate::negotiate::{ExpertsCaps, KernelKind, Plan, PrepareCaps, Support};
use crate::placement::Rank;
use crate::prepare_finalize::{PrepareAndFinalizeModular, PrepareAndFinalizeMonolithic};

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

    /// Bytes that one token is expected to move between ranks when routing is uniform.
    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes;

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

/// Ranks other than its own that a token is expected to go to when its `top_k` experts are drawn uniformly without
/// replacement: the sum over ranks `r` of `(1 − C(E − eᵣ, k) / C(E, k))`, times `(N − 1) / N` since its own rank is
/// any of the N alike.
pub fn expected_remote_ranks(config: &MoeConfig) -> f64 {
    let (experts, ranks) = (config.num_experts(), config.ep_size());
    let hit = |rank| {
        let held = config.placement.num_local_experts(Rank(rank as u32));
        // C(E − e, k) / C(E, k) as a product, which neither overflows nor cancels.
        let missed =
            (0..config.top_k).map(|i| (experts - held).saturating_sub(i) as f64 / (experts - i) as f64);
        1.0 - missed.product::<f64>()
    };
    (0..ranks).map(hit).sum::<f64>() * (ranks - 1) as f64 / ranks as f64
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
