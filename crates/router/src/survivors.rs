//! After a rank is lost: where the experts of the smaller group are, and what becomes of tokens whose expert nobody
//! holds any more.
//!
//! The ranks that are left keep the weights that they hold; ranks and slots are numbered anew, in the old order. An
//! expert with a replica on one of them is not lost. For the others the caller names a [`LostExpertPolicy`] in every
//! call, there is no default:
//!
//! ```
//! use fused_moe_core::{ExpertPlacement, MoeConfig, Rank};
//! use router::eplb::ReplicaTable;
//! use router::survivors::{LostExpert, LostExpertPolicy, SurvivingExperts, Survivors};
//!
//! // Five experts in six slots on three ranks; expert 1 has a replica on rank 2. Rank 0 dies.
//! let config = MoeConfig {
//!     hidden: 64,
//!     intermediate: 32,
//!     top_k: 2,
//!     max_tokens_per_rank: 8,
//!     redundant_experts: 1,
//!     ..MoeConfig::new(ExpertPlacement::linear(6, 3)?)
//! };
//! let table = ReplicaTable::new(5, vec![0, 1, 2, 3, 4, 1])?;
//! let left = Survivors { ranks: &[Rank(1), Rank(2)], ranks_per_node: 2 };
//! let after = SurvivingExperts::new(&config, &table, left)?;
//! assert_eq!(after.lost(), [LostExpert { expert: 0, rank: Rank(0) }]);
//! // Old slots 2, 3, 4 and 5 are now slots 0, 1, 2 and 3 of two ranks.
//! assert_eq!((after.old_slots(), after.config().ep_size()), (&[2, 3, 4, 5][..], 2));
//!
//! let (mut ids, mut weights) = ([0, 2, 1, 4], [0.75, 0.25, 0.5, 0.5]);
//! assert!(after.map(LostExpertPolicy::Fail, 2, &mut ids, &mut weights).is_err());
//! let dropped = after.map(LostExpertPolicy::DropAndRenormalise, 2, &mut ids, &mut weights)?;
//! assert_eq!((ids, weights), ([-1, 0, 3, 2], [0.0, 1.0, 0.5, 0.5]));
//! assert_eq!((dropped.slots, dropped.tokens, dropped.empty_tokens), (1, 1, 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A kernel for [`SurvivingExperts::config`] over the group of the survivors takes the mapped ids and the weights that
//! each rank has had packed all along. Under [`LostExpertPolicy::Fail`] the rank with such a token reports
//! [`ExpertsLost::fault`] with [`ModularKernel::abstain`](fused_moe_core::ModularKernel::abstain), so that its peers do
//! not wait for it.
//!
//! What it does not do: it loads no expert again. An engine that does makes a [`ReplicaTable`] of the slots that are
//! left and rebalances.

mod drop;

use fused_moe_core::{ExpertPlacement, GlobalExpertId, MoeConfig, PlacementError, Rank, Unsupported};

use crate::eplb::{ReplicaTable, TableError};

pub use drop::{Dropped, ExpertsLost, LostExpertPolicy, SurvivorMapError};

/// The ranks that go on.
#[derive(Clone, Copy, Debug)]
pub struct Survivors<'a> {
    /// Ranks of the old group, each once; their positions are their ranks in the new one.
    pub ranks: &'a [Rank],
    /// [`MoeConfig::ranks_per_node`] of the new group.
    pub ranks_per_node: usize,
}

/// An expert that no rank of a group holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LostExpert {
    /// The logical expert.
    pub expert: u32,
    /// The rank that held it, the last if several did, as it was numbered in the group that lost it.
    pub rank: Rank,
}

/// Survivors that make no layer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SurvivorsError {
    /// A rank that the old group does not have.
    #[error("{rank} survives, the group had {ep_size} ranks")]
    NoSuchRank {
        /// The rank.
        rank: Rank,
        /// Ranks of the old group.
        ep_size: usize,
    },
    /// A rank at two positions.
    #[error("{rank} survives twice")]
    RankTwice {
        /// The rank.
        rank: Rank,
    },
    /// A table of another layer.
    #[error("the table has {table} slots, the configuration {config}")]
    Slots {
        /// Slots of the table.
        table: usize,
        /// Experts of the configuration's placement.
        config: usize,
    },
    /// What is left cannot be a layer, for example fewer experts than a token is routed to.
    #[error("what {} ranks hold is no layer: {}", .ranks, .reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoLayer {
        /// Ranks of the new group.
        ranks: usize,
        /// Everything that is wrong with its configuration.
        reasons: Vec<Unsupported>,
    },
    /// No ranks are left.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// No expert is left.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// One layer over the ranks that are left.
#[derive(Clone, Debug, PartialEq)]
pub struct SurvivingExperts {
    config: MoeConfig,
    /// Without a slot for lost experts.
    table: ReplicaTable,
    /// Ascending by expert.
    lost: Vec<LostExpert>,
    old_slots: Vec<u32>,
    old_ranks: Vec<Rank>,
}

impl SurvivingExperts {
    /// The layer of `config` and `table` once only `survivors` are left.
    ///
    /// # Errors
    /// [`SurvivorsError`].
    pub fn new(
        config: &MoeConfig,
        table: &ReplicaTable,
        survivors: Survivors<'_>,
    ) -> Result<Self, SurvivorsError> {
        Self::of(config, table, &[], survivors)
    }

    /// The layer after another loss. `survivors` are ranks of this group, as are [`Self::old_slots`] and
    /// [`Self::old_ranks`] of the result.
    ///
    /// # Errors
    /// [`SurvivorsError`].
    pub fn shrink(&self, survivors: Survivors<'_>) -> Result<Self, SurvivorsError> {
        Self::of(&self.config, &self.table, &self.lost, survivors)
    }

    fn of(
        config: &MoeConfig,
        table: &ReplicaTable,
        lost_before: &[LostExpert],
        survivors: Survivors<'_>,
    ) -> Result<Self, SurvivorsError> {
        let (old, slots) = (&config.placement, table.physical_to_logical());
        if slots.len() != old.num_experts() {
            return Err(SurvivorsError::Slots { table: slots.len(), config: old.num_experts() });
        }
        let mut new_rank = vec![None; old.ep_size()];
        for (new, &rank) in survivors.ranks.iter().enumerate() {
            match new_rank.get_mut(rank.index()) {
                None => return Err(SurvivorsError::NoSuchRank { rank, ep_size: old.ep_size() }),
                Some(Some(_)) => return Err(SurvivorsError::RankTwice { rank }),
                Some(free) => *free = Some(new),
            }
        }
        // In the old order, so that every rank has its experts in the local order in which they are packed.
        let (mut old_slots, mut owners, mut held) = (Vec::new(), Vec::new(), Vec::new());
        for (slot, (owner, &expert)) in old.owners().iter().zip(slots).enumerate() {
            if let Some(new) = new_rank[owner.index()] {
                old_slots.push(slot as u32);
                owners.push(new);
                held.push(expert);
            }
        }
        let placement = ExpertPlacement::from_owners(&owners, survivors.ranks.len())?;
        let remaining = ReplicaTable::with_lost(table.num_logical(), held)?;
        let mut lost = lost_before.to_vec();
        for expert in 0..table.num_logical() {
            if let Some(&slot) = table.replicas_of(expert).last()
                && remaining.replicas_of(expert).is_empty()
                && let Some(rank) = old.rank_of(GlobalExpertId(slot as u32))
            {
                lost.push(LostExpert { expert: expert as u32, rank });
            }
        }
        lost.sort_unstable_by_key(|lost| lost.expert);
        let num_held = table.num_logical() - lost.len();
        let config = MoeConfig {
            redundant_experts: remaining.num_physical().saturating_sub(num_held),
            // A kernel that routes by itself would route to experts that are gone.
            routing: if lost.is_empty() { config.routing.clone() } else { None },
            placement,
            ranks_per_node: survivors.ranks_per_node,
            ..config.clone()
        };
        let reasons = config.contradictions();
        if !reasons.is_empty() {
            return Err(SurvivorsError::NoLayer { ranks: survivors.ranks.len(), reasons });
        }
        let old_ranks = survivors.ranks.to_vec();
        Ok(Self { config, table: remaining, lost, old_slots, old_ranks })
    }

    /// The configuration of the new group, for new kernels. Where experts are lost it has no routing method: the engine
    /// routes over all logical experts and maps.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The logical experts that nobody holds, ascending.
    pub fn lost(&self) -> &[LostExpert] {
        &self.lost
    }

    /// `[physical]`: the slot of the old group that each slot was.
    pub fn old_slots(&self) -> &[u32] {
        &self.old_slots
    }

    /// `[ranks]`: the rank of the old group that each rank was.
    pub fn old_ranks(&self) -> &[Rank] {
        &self.old_ranks
    }

    /// The rank of the new group that `old` is; `None` if it is lost.
    pub fn new_rank(&self, old: Rank) -> Option<Rank> {
        let position = self.old_ranks.iter().position(|&rank| rank == old)?;
        Some(Rank(position as u32))
    }

    /// `[physical]`: the logical expert in every slot.
    pub fn physical_to_logical(&self) -> &[u32] {
        self.table.physical_to_logical()
    }

    /// The replicas, if no expert is lost: the layer can then go on as a
    /// [`BalancedLayer`](crate::eplb::BalancedLayer) or by [`ReplicaTable::map`].
    pub fn whole_table(&self) -> Option<&ReplicaTable> {
        self.lost.is_empty().then_some(&self.table)
    }
}
