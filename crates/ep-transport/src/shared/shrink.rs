//! Going on without ranks that are lost.
//!
//! Survivors may have seen different losses, so nobody is asked who is lost: who comes to the shrink is in. A rank
//! that sees all come whom it can expect, or has waited long enough, writes who is there as its proposal, and the first
//! to put its number into the word of the decision has decided. All read that one proposal. A rank that is not in it,
//! like one that was stopped and woke too late, is told so.
//!
//! The ranks that are left meet in a control segment of the next generation, which none that was left out has mapped,
//! and allocate heaps of their own from there. Whatever a left-out rank still writes goes to memory of the old group.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fused_moe_core::Rank;

use super::group::{Group, Topology};
use super::rank::SharedRank;
use super::seat::Absence;
use crate::deadline::Deadline;
use crate::doorbell::Cause;
use crate::error::{Result, TransportError};
use crate::transport::{Collective, Transport};

/// What a rank that missed a deadline is granted beyond the others: it may be stopped, but it may also have waited for
/// the very rank that is lost, and be about to come.
const SUSPECTS_GRACE: Duration = Duration::from_millis(500);

impl SharedRank {
    /// This rank in the group of those that come, and which ranks of this group those are.
    pub(super) fn shrunk(&self, deadline: Deadline) -> Result<(Arc<Self>, Vec<Rank>)> {
        let mut progress = self.begin(Collective::Shrink)?;
        if progress.superseded {
            return Err(TransportError::Superseded);
        }
        let decider = self.decide(deadline);
        progress.superseded = true;
        let (group, me) = (&self.member.group, self.rank());
        let survivors = group.proposal(decider);
        let Some(rank) = survivors.iter().position(|&survivor| survivor == me) else {
            return Err(TransportError::Excluded { rank: me, by: decider });
        };
        let next =
            group.without_others(&survivors).and_then(|group| Self::new(Arc::new(group), Rank(rank as u32)));
        let next = Arc::new(next.map_err(TransportError::system("memory for a group"))?);
        // One that is in the proposal may have died since.
        match next.barrier(deadline.halfway()) {
            Ok(()) => {
                tracing::info!(
                    rank = me.0,
                    left = survivors.len(),
                    of = self.world_size(),
                    "shrank the group"
                );
                Ok((next, survivors))
            }
            Err(TransportError::PeerLost { .. }) if deadline.remaining().is_some() => {
                let (next, left) = next.shrunk(deadline)?;
                Ok((next, left.into_iter().map(|rank| survivors[rank.index()]).collect()))
            }
            Err(TransportError::PeerLost { rank, awaited, silence }) => {
                Err(TransportError::PeerLost { rank: survivors[rank.index()], awaited, silence })
            }
            Err(other) => Err(other),
        }
    }

    /// Comes to the shrink and waits for the decision, or makes it: the rank whose proposal holds.
    fn decide(&self, deadline: Deadline) -> Rank {
        let group = &*self.member.group;
        self.member.announce(Absence::Shrinking);
        let doorbell = &self.member.seat().doorbell;
        let await_all = |limit: Deadline, excused: &dyn Fn(usize) -> bool| {
            let is_settled = |(index, seat): (usize, &super::seat::Seat)| {
                seat.is_shrinking() || seat.will_not_shrink() || excused(index)
            };
            doorbell.wait(Cause::ANY, group.spin, limit, || {
                (group.decider().is_some() || group.seats().iter().enumerate().all(is_settled)).then_some(())
            })
        };
        // Meeting in the new group takes the other half, if need be.
        let limit = deadline.halfway();
        await_all(limit, &|index| self.member.suspects(Rank(index as u32)));
        await_all(limit.min(Deadline::after(SUSPECTS_GRACE)), &|_| false);
        group.decider().unwrap_or_else(|| group.propose(self.rank()))
    }
}

impl Group {
    /// Words of a proposal: one bit per rank.
    const fn proposal_words(world_size: usize) -> usize {
        world_size.div_ceil(64)
    }

    /// Words of a control segment: the decision, and a proposal per rank.
    pub(super) const fn shrink_words(world_size: usize) -> usize {
        1 + world_size * Self::proposal_words(world_size)
    }

    /// The rank whose proposal holds, once there is one.
    fn decider(&self) -> Option<Rank> {
        let decision = self.word(0).load(Ordering::Acquire);
        decision.checked_sub(1).map(|rank| Rank(rank as u32))
    }

    /// Proposes, in the name of `rank`, the ranks that have come; returns the rank whose proposal holds.
    fn propose(&self, rank: Rank) -> Rank {
        let words = Self::proposal_words(self.topology.world_size);
        let start = 1 + rank.index() * words;
        for (word, seats) in self.seats().chunks(64).enumerate() {
            let is_there =
                |(_, seat): &(usize, &super::seat::Seat)| seat.is_shrinking() && !seat.will_not_shrink();
            let bits = seats.iter().enumerate().filter(is_there).fold(0, |bits, (bit, _)| bits | 1 << bit);
            self.word(start + word).store(bits, Ordering::Relaxed);
        }
        let mine = u64::from(rank.0) + 1;
        let decision = self.word(0).compare_exchange(0, mine, Ordering::AcqRel, Ordering::Acquire);
        self.ring_all();
        Rank(decision.map_or_else(|theirs| theirs, |_| mine) as u32 - 1)
    }

    /// The ranks that `rank` has proposed.
    fn proposal(&self, rank: Rank) -> Vec<Rank> {
        let world_size = self.topology.world_size;
        let start = 1 + rank.index() * Self::proposal_words(world_size);
        let is_in =
            |index: &usize| self.word(start + index / 64).load(Ordering::Relaxed) >> (index % 64) & 1 != 0;
        (0..world_size).filter(is_in).map(|index| Rank(index as u32)).collect()
    }

    /// The group of `survivors`, in a control segment of its own.
    fn without_others(&self, survivors: &[Rank]) -> io::Result<Self> {
        let members = survivors.iter().map(|rank| self.members()[rank.index()]).collect();
        let topology = self.topology.of(survivors);
        Self::next(self, members, topology)
    }
}

impl Topology {
    /// The topology of some ranks. Nodes may have lost different numbers of ranks, but all nodes of a group have the
    /// same; so they are cut into parts as large as that allows, none of which spans two.
    fn of(self, ranks: &[Rank]) -> Self {
        let mut counts = vec![0; self.world_size / self.ranks_per_node];
        ranks.iter().for_each(|&rank| counts[self.node_of(rank)] += 1);
        Self { world_size: ranks.len(), ranks_per_node: counts.into_iter().fold(0, greatest_common_divisor) }
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::one_node(8, 8, &[0, 1, 2, 4, 5, 6, 7], 7)]
    #[case::a_whole_node(8, 4, &[4, 5, 6, 7], 4)]
    #[case::one_of_each(8, 4, &[0, 1, 2, 5, 6, 7], 3)]
    #[case::one_of_two(8, 4, &[0, 1, 2, 3, 4, 5, 6], 1)]
    #[case::two_of_two(8, 4, &[0, 1, 2, 3, 4, 5], 2)]
    #[case::one_left(8, 4, &[6], 1)]
    fn nodes_are_cut_but_never_joined(
        #[case] world_size: usize,
        #[case] ranks_per_node: usize,
        #[case] left: &[u32],
        #[case] wanted: usize,
    ) {
        let before = Topology { world_size, ranks_per_node };
        let left: Vec<Rank> = left.iter().copied().map(Rank).collect();
        let after = before.of(&left);
        assert_eq!(after, Topology { world_size: left.len(), ranks_per_node: wanted });
        for node in left.chunks(after.ranks_per_node) {
            assert!(node.iter().all(|&rank| before.node_of(rank) == before.node_of(node[0])));
        }
    }
}
