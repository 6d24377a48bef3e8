//! Which rank holds which expert, and the two encodings of it that kernels ask for.

/// Expert id of a router or checkpoint: `0..num_experts` over all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GlobalExpertId(pub u32);

/// Index of an expert among those that one rank holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocalExpertId(pub u32);

/// Position of a process (or thread) in the expert-parallel group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rank(pub u32);

impl Rank {
    /// The rank as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl std::fmt::Display for Rank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {}", self.0)
    }
}

/// The id that stands for "no expert" in a padded top-k row.
pub const NO_EXPERT: i32 = -1;

/// A placement that does not describe a group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// An expert is given to a rank outside the group.
    #[error("expert {expert} is placed on rank {rank}, the group has {ep_size} ranks")]
    NoSuchRank {
        /// The expert.
        expert: usize,
        /// The rank it was given to.
        rank: usize,
        /// Ranks in the group.
        ep_size: usize,
    },
    /// A group of no ranks.
    #[error("the expert-parallel group has no ranks")]
    EmptyGroup,
}

/// The placement table: the owner of every expert. A rank's local order is ascending global id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExpertPlacement {
    owners: Vec<Rank>,
    local: Vec<LocalExpertId>,
    counts: Vec<usize>,
}

impl ExpertPlacement {
    /// Contiguous blocks in rank order; the first `num_experts % ep_size` ranks hold one expert more.
    ///
    /// # Errors
    /// [`PlacementError::EmptyGroup`].
    pub fn linear(num_experts: usize, ep_size: usize) -> Result<Self, PlacementError> {
        if ep_size == 0 {
            return Err(PlacementError::EmptyGroup);
        }
        let (base, extra) = (num_experts / ep_size, num_experts % ep_size);
        let owners =
            (0..ep_size).flat_map(|rank| std::iter::repeat_n(rank, base + usize::from(rank < extra)));
        Self::from_owners(&owners.collect::<Vec<_>>(), ep_size)
    }

    /// The table given as the owning rank of each expert.
    ///
    /// # Errors
    /// [`PlacementError`].
    pub fn from_owners(owners: &[usize], ep_size: usize) -> Result<Self, PlacementError> {
        if ep_size == 0 {
            return Err(PlacementError::EmptyGroup);
        }
        let mut counts = vec![0; ep_size];
        let mut local = Vec::with_capacity(owners.len());
        for (expert, &rank) in owners.iter().enumerate() {
            let Some(count) = counts.get_mut(rank) else {
                return Err(PlacementError::NoSuchRank { expert, rank, ep_size });
            };
            local.push(LocalExpertId(*count as u32));
            *count += 1;
        }
        Ok(Self { owners: owners.iter().map(|&r| Rank(r as u32)).collect(), local, counts })
    }

    /// Experts over all ranks.
    pub fn num_experts(&self) -> usize {
        self.owners.len()
    }

    /// Ranks in the group.
    pub fn ep_size(&self) -> usize {
        self.counts.len()
    }

    /// The rank that holds `id`; `None` if there is no such expert.
    pub fn rank_of(&self, id: GlobalExpertId) -> Option<Rank> {
        self.owners.get(id.0 as usize).copied()
    }

    /// The rank that holds the expert of a top-k slot; `None` for [`NO_EXPERT`] and for ids outside the table.
    pub fn rank_of_slot(&self, id: i32) -> Option<Rank> {
        // The sign is tested before anything is divided or indexed: -1 must never become expert 0.
        u32::try_from(id).ok().and_then(|id| self.rank_of(GlobalExpertId(id)))
    }

    /// Index of `id` on its owner; `None` if there is no such expert.
    pub fn local_id(&self, id: GlobalExpertId) -> Option<LocalExpertId> {
        self.local.get(id.0 as usize).copied()
    }

    /// Number of experts that `rank` holds; 0 for a rank outside the group.
    pub fn num_local_experts(&self, rank: Rank) -> usize {
        self.counts.get(rank.index()).copied().unwrap_or(0)
    }

    /// The experts of `rank` in local order.
    pub fn experts_of(&self, rank: Rank) -> impl Iterator<Item = GlobalExpertId> + '_ {
        let owned = self.owners.iter().enumerate().filter(move |&(_, &owner)| owner == rank);
        owned.map(|(id, _)| GlobalExpertId(id as u32))
    }

    /// The owners as a list, one rank per expert.
    pub fn owners(&self) -> &[Rank] {
        &self.owners
    }
}

/// Global id to local id, `-1` where the expert is elsewhere: vLLM's `expert_map`.
///
/// A distinct type from [`ExpertMask`]: a kernel that reads one as the other computes garbage without an error
/// (vLLM #49758).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMap(Vec<i32>);

impl ExpertMap {
    /// The map of `rank`.
    pub fn new(placement: &ExpertPlacement, rank: Rank) -> Self {
        let entry = |(&owner, &local): (&Rank, &LocalExpertId)| {
            if owner == rank { local.0 as i32 } else { NO_EXPERT }
        };
        Self(placement.owners.iter().zip(&placement.local).map(entry).collect())
    }

    /// The local expert of a top-k slot; `None` for padding, foreign and unknown ids.
    pub fn local(&self, slot_id: i32) -> Option<LocalExpertId> {
        let entry = *self.0.get(usize::try_from(slot_id).ok()?)?;
        u32::try_from(entry).ok().map(LocalExpertId)
    }

    /// `[num_experts]` local ids or -1.
    pub fn as_slice(&self) -> &[i32] {
        &self.0
    }
}

/// 1 where the expert is local, 0 elsewhere, and a trailing 0 sentinel: AITER's `expert_mask`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMask(Vec<i32>);

impl ExpertMask {
    /// The mask of `rank`.
    pub fn new(placement: &ExpertPlacement, rank: Rank) -> Self {
        let entries = placement.owners.iter().map(|&owner| i32::from(owner == rank));
        Self(entries.chain(std::iter::once(0)).collect())
    }

    /// The map that says the same: the local id is the number of local experts before it.
    pub fn to_map(&self) -> ExpertMap {
        let mut next = 0;
        let entries = self.0[..self.0.len() - 1].iter().map(|&held| {
            if held == 0 {
                return NO_EXPERT;
            }
            next += 1;
            next - 1
        });
        ExpertMap(entries.collect())
    }

    /// `[num_experts + 1]` zeros and ones.
    pub fn as_slice(&self) -> &[i32] {
        &self.0
    }
}
