//! How the ranks of a round tell each other that they have done their part, or why they could not.

use fused_moe_core::{Error, Fault, Rank, Stage, TicketLedger};

use crate::deadline::Deadline;
use crate::error::{Result, TransportError};
use crate::heap::{Heap, Signal, Until};
use crate::symmetric::{HeapLayout, SymWord};

/// Words of one status: two of fault, one of count, and the epoch that makes them valid.
const WORDS: usize = 4;

/// Rounds that can be told apart: a rank is at most one round ahead of a peer that still reads its status.
const PARITIES: usize = 2;

/// What one rank says about its part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// A number for the peer, typically rows written to it.
    pub count: u64,
    /// Why there are none.
    pub fault: Option<Fault>,
}

impl Status {
    /// A part that was done.
    pub const fn done(count: u64) -> Self {
        Self { count, fault: None }
    }

    /// A part that could not be done.
    pub const fn failed(fault: Fault) -> Self {
        Self { count: 0, fault: Some(fault) }
    }
}

/// The statuses that a rank receives in one step of every round, one slot per peer.
///
/// A status is SET under the number of the round (from 1), never added to and never cleared, so there is nothing
/// to re-arm between rounds. Slots alternate with the parity of the round. That is enough because all ranks exchange
/// statuses in every step: to be two rounds ahead of a peer, a rank would need a status that the peer has not yet
/// sent.
#[derive(Clone, Copy, Debug)]
pub struct StatusBoard {
    words: SymWord,
    world_size: usize,
}

impl StatusBoard {
    /// Reserves the slots of one step for `world_size` ranks.
    pub fn reserve(layout: &mut HeapLayout, world_size: usize) -> Self {
        Self { words: layout.words(PARITIES * world_size * WORDS), world_size }
    }

    /// Tells `to` about this rank's part of round `round`. Everything that this thread put to `to` before is
    /// visible to it once it sees the status.
    ///
    /// # Errors
    /// As [`Heap::signal_set`].
    pub fn post(&self, heap: &dyn Heap, to: Rank, round: u64, status: Status) -> Result<()> {
        let slot = self.slot(round, heap.rank());
        let [code, a, b, c] = status.fault.map_or([0; 4], Fault::to_words);
        let words = [pack(code, a), pack(b, c), status.count];
        for (index, value) in words.into_iter().enumerate() {
            heap.signal_set(to, Signal { word: slot + index, value })?;
        }
        heap.fence();
        heap.signal_set(to, Signal { word: slot + (WORDS - 1), value: round })
    }

    /// Tells every rank the same, this one last: the others start early, and not all with the same one.
    ///
    /// # Errors
    /// As [`StatusBoard::post`]; every rank is told that can be.
    pub fn post_all(&self, heap: &dyn Heap, round: u64, status: Status) -> Result<()> {
        let me = heap.rank().index();
        let mut told = Ok(());
        for distance in 1..=self.world_size {
            let to = Rank(((me + distance) % self.world_size) as u32);
            told = told.and(self.post(heap, to, round, status));
        }
        told
    }

    /// Waits for the status of `from` in round `round`.
    ///
    /// # Errors
    /// [`TransportError::PeerLost`] by the deadline.
    pub fn wait(&self, heap: &dyn Heap, from: Rank, round: u64, deadline: Deadline) -> Result<Status> {
        let slot = self.slot(round, from);
        heap.signal_wait_until(slot + (WORDS - 1), Until::Ge(round), from, deadline)?;
        let (code, a) = unpack(heap.signal_read(slot)?);
        let (b, c) = unpack(heap.signal_read(slot + 1)?);
        Ok(Status { count: heap.signal_read(slot + 2)?, fault: Fault::from_words([code, a, b, c]) })
    }

    /// Waits for the statuses of all ranks in round `round` and hands each to `seen`, in rank order. Returns the
    /// fault of the lowest rank that has one: the same answer on every rank.
    ///
    /// # Errors
    /// As [`StatusBoard::wait`].
    pub fn wait_all(
        &self,
        heap: &dyn Heap,
        round: u64,
        deadline: Deadline,
        mut seen: impl FnMut(Rank, Status),
    ) -> Result<Option<(Rank, Fault)>> {
        let mut first = None;
        for rank in (0..self.world_size as u32).map(Rank) {
            let status = self.wait(heap, rank, round, deadline)?;
            first = first.or(status.fault.map(|fault| (rank, fault)));
            seen(rank, status);
        }
        Ok(first)
    }

    fn slot(&self, round: u64, from: Rank) -> SymWord {
        let parity = (round % PARITIES as u64) as usize;
        self.words + (parity * self.world_size + from.index()) * WORDS
    }
}

fn pack(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn unpack(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

impl TransportError {
    /// The error as a stage of an open round reports it; a lost peer also ends the handle's life.
    pub fn into_round(self, ledger: &mut TicketLedger, stage: Stage, backend: &'static str) -> Error {
        match self.lost_rank() {
            Some(rank) => ledger.lost(rank, stage).caused_by(self),
            None => self.into_core(stage, backend, ledger.round()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ThreadOptions, run_ranks, transport_of};

    #[test]
    fn every_rank_sees_every_status_of_every_round() {
        let outcomes = run_ranks(5, ThreadOptions::default(), |group| -> Result<()> {
            let transport = transport_of(&group).expect("an endpoint has a transport");
            let mut layout = HeapLayout::default();
            let board = StatusBoard::reserve(&mut layout, 5);
            let heap = transport.allocate(layout.size(), transport.deadline())?;
            let me = transport.rank();
            for round in 1..=500u64 {
                // Ranks 2 and 4 fail in some rounds; the lowest is the one that counts.
                let fails =
                    |rank: Rank| rank.0.is_multiple_of(2) && rank.0 > 0 && round % u64::from(rank.0) == 1;
                let fault =
                    |rank: Rank| Fault::ExpertIdOutOfRange { token: rank.0, slot: round as u32, id: -7 };
                for to in (0..5).map(Rank) {
                    let done = Status::done(round * 10 + u64::from(me.0));
                    let status = if fails(me) { Status::failed(fault(me)) } else { done };
                    board.post(&*heap, to, round, status)?;
                }
                let mut counts = [0; 5];
                let first = board.wait_all(&*heap, round, transport.deadline(), |rank, status| {
                    counts[rank.index()] = status.count;
                })?;
                assert_eq!(first, (0..5).map(Rank).find(|&r| fails(r)).map(|r| (r, fault(r))));
                for rank in (0..5).map(Rank) {
                    let want = if fails(rank) { 0 } else { round * 10 + u64::from(rank.0) };
                    assert_eq!(counts[rank.index()], want, "{rank} in round {round}");
                }
            }
            Ok(())
        });
        assert!(outcomes.expect("threads").iter().all(|outcome| *outcome == Ok(())));
    }
}
