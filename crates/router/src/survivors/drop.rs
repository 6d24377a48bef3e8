//! What becomes of the slots of a token that name a lost expert.

use std::ops::AddAssign;

use fused_moe_core::{Fault, NO_EXPERT};

use super::{LostExpert, SurvivingExperts};
use crate::eplb::MapError;

/// What happens to a token that is routed to an expert that nobody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LostExpertPolicy {
    /// The call is refused before anything is dispatched.
    Fail,
    /// The slot becomes −1 with weight 0, and the weights of the token's other slots are scaled so that their sum is
    /// what it was. The layer keeps its magnitude; the experts that are left speak for the lost one.
    DropAndRenormalise,
    /// The slot becomes −1 and no weight changes: the lost expert's output is missing from the sum.
    DropRaw,
}

impl LostExpertPolicy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Fail, Self::DropAndRenormalise, Self::DropRaw];

    /// As it is written on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            LostExpertPolicy::Fail => "fail",
            LostExpertPolicy::DropAndRenormalise => "drop-and-renormalise",
            LostExpertPolicy::DropRaw => "drop-raw",
        }
    }
}

impl std::fmt::Display for LostExpertPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What calls have left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Slots that named a lost expert.
    pub slots: usize,
    /// Tokens with such a slot.
    pub tokens: usize,
    /// Of these, the ones without any other expert: the routed experts add nothing to them.
    pub empty_tokens: usize,
}

impl AddAssign for Dropped {
    fn add_assign(&mut self, other: Self) {
        self.slots += other.slots;
        self.tokens += other.tokens;
        self.empty_tokens += other.empty_tokens;
    }
}

/// Tokens that are routed to lost experts, under [`LostExpertPolicy::Fail`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} of {} tokens are routed to lost experts: {}", .dropped.tokens, .tokens, named(.experts))]
pub struct ExpertsLost {
    /// Tokens of the call.
    pub tokens: usize,
    /// What would have been left out.
    pub dropped: Dropped,
    /// The first such token.
    pub token: usize,
    /// The lost experts that the call names, ascending, and who held them.
    pub experts: Vec<LostExpert>,
    /// Of these, the one that the first such token names first.
    pub first: LostExpert,
}

fn named(experts: &[LostExpert]) -> String {
    let named = experts.iter().map(|LostExpert { expert, rank }| format!("expert {expert} of lost {rank}"));
    named.collect::<Vec<_>>().join(", ")
}

impl ExpertsLost {
    /// What this rank tells its peers.
    pub fn fault(&self) -> Fault {
        let LostExpert { expert, rank } = self.first;
        Fault::ExpertLost { token: self.token as u32, expert, rank: rank.0 }
    }
}

/// Top-k rows that are not mapped. Nothing has been written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SurvivorMapError {
    /// Rows that no table could map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Not a weight per id.
    #[error("{weights} weights for {ids} ids")]
    Weights {
        /// Ids given.
        ids: usize,
        /// Weights given.
        weights: usize,
    },
    /// Refused by [`LostExpertPolicy::Fail`].
    #[error(transparent)]
    Lost(#[from] ExpertsLost),
}

impl SurvivingExperts {
    /// Replaces logical `ids`, rows of `top_k` each, by slots of the new group, as
    /// [`ReplicaTable::map`](crate::eplb::ReplicaTable::map) chooses them, and treats lost experts by `policy`. `weights`
    /// are the routing weights of the same slots. Allocates nothing unless it fails.
    ///
    /// A token whose other weights sum to 0 cannot be scaled to another sum and keeps them.
    ///
    /// # Errors
    /// [`SurvivorMapError`]; `ids` and `weights` are untouched then.
    pub fn map(
        &self,
        policy: LostExpertPolicy,
        top_k: usize,
        ids: &mut [i32],
        weights: &mut [f32],
    ) -> Result<Dropped, SurvivorMapError> {
        self.table.check(top_k, ids)?;
        if ids.len() != weights.len() {
            return Err(SurvivorMapError::Weights { ids: ids.len(), weights: weights.len() });
        }
        let mut dropped = Dropped::default();
        for row in ids.chunks_exact(top_k) {
            let slots = row.iter().filter(|&&id| self.is_lost(id)).count();
            let others = row.iter().filter(|&&id| id != NO_EXPERT).count() - slots;
            dropped += Dropped {
                slots,
                tokens: usize::from(slots > 0),
                empty_tokens: usize::from(slots > 0 && others == 0),
            };
        }
        if dropped.slots > 0 {
            match policy {
                LostExpertPolicy::Fail => return Err(self.refuse(top_k, ids, dropped).into()),
                LostExpertPolicy::DropAndRenormalise => {
                    let rows = ids.chunks_exact(top_k).zip(weights.chunks_exact_mut(top_k));
                    rows.for_each(|(ids, weights)| self.renormalise(ids, weights));
                }
                LostExpertPolicy::DropRaw => {}
            }
        }
        self.table.replace(top_k, ids);
        Ok(dropped)
    }

    fn is_lost(&self, id: i32) -> bool {
        usize::try_from(id).is_ok_and(|id| self.table.replicas_of(id).is_empty())
    }

    fn renormalise(&self, ids: &[i32], weights: &mut [f32]) {
        let (mut all, mut left) = (0.0, 0.0);
        for (&id, &weight) in ids.iter().zip(&*weights) {
            let weight = if id == NO_EXPERT { 0.0 } else { f64::from(weight) };
            all += weight;
            left += if self.is_lost(id) { 0.0 } else { weight };
        }
        let factor = if left == 0.0 { 1.0 } else { all / left };
        for (&id, weight) in ids.iter().zip(weights) {
            if self.is_lost(id) {
                *weight = 0.0;
            } else if factor != 1.0 && id != NO_EXPERT {
                *weight = (f64::from(*weight) * factor) as f32;
            }
        }
    }

    fn refuse(&self, top_k: usize, ids: &[i32], dropped: Dropped) -> ExpertsLost {
        let of = |id: i32| self.lost.iter().find(|lost| i32::try_from(lost.expert) == Ok(id)).copied();
        let mut named = ids.iter().enumerate().filter_map(|(at, &id)| Some((at / top_k, of(id)?)));
        let mut experts: Vec<_> = named.clone().map(|(_, lost)| lost).collect();
        experts.sort_unstable_by_key(|lost| lost.expert);
        experts.dedup();
        let (token, first) = named.next().unwrap_or((0, self.lost[0]));
        ExpertsLost { tokens: ids.len() / top_k, dropped, token, experts, first }
    }
}
