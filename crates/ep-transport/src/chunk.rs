//! The flag of rows that travel as one put: what came, and whether more follows.

use fused_moe_core::Rank;

use crate::deadline::Deadline;
use crate::error::Result;
use crate::heap::{Heap, Payload, Signal, Until};
use crate::symmetric::SymWord;

/// What the flag of a chunk says.
///
/// A flag is SET to the number of the round with the rest below it, so a flag of a round is larger than all flags of the
/// rounds before, and what lies in a word from two rounds ago is only a chunk that has not come yet.
///
/// The window of a chunk may be written again two rounds later, if there is one window per parity of the round and the
/// ranks exchange statuses ([`StatusBoard`](crate::StatusBoard)) before they wait for chunks: a rank is in round r + 2 only
/// when it has seen its reader's status of round r + 1, and so the end of its reading in round r.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Counted from 1.
    pub round: u64,
    /// Rows in it, at most [`Chunk::MOST_ROWS`].
    pub rows: usize,
    /// Whether no other follows in this round.
    pub last: bool,
}

impl Chunk {
    const LAST: u64 = 1 << 7;

    /// The most rows that a flag can tell of.
    pub const MOST_ROWS: usize = Self::LAST as usize - 1;

    /// Puts the rows of the chunk at `to`, and sets its flag there once they have come.
    ///
    /// # Safety
    /// As [`Heap::put_signal`].
    ///
    /// # Errors
    /// As [`Heap::put_signal`].
    pub unsafe fn put(self, heap: &dyn Heap, to: Rank, payload: Payload<'_>, flag: SymWord) -> Result<()> {
        // SAFETY: the caller makes the promises of `put_signal`.
        unsafe { heap.put_signal(to, payload, Signal { word: flag, value: self.pack() }) }
    }

    /// The chunk of `round` with this flag, if it has come.
    ///
    /// # Errors
    /// As [`Heap::signal_read`].
    pub fn look(heap: &dyn Heap, flag: SymWord, round: u64) -> Result<Option<Self>> {
        let value = heap.signal_read(flag)?;
        Ok(Self::of(round).holds(value).then(|| Self::unpack(value)))
    }

    /// Waits for the chunk of `round` with this flag, which `from` sets.
    ///
    /// # Errors
    /// As [`Heap::signal_wait_until`].
    pub fn wait(heap: &dyn Heap, flag: SymWord, round: u64, from: Rank, deadline: Deadline) -> Result<Self> {
        Ok(Self::unpack(heap.signal_wait_until(flag, Self::of(round), from, deadline)?))
    }

    const fn of(round: u64) -> Until {
        Until::Ge(round << 8)
    }

    const fn pack(self) -> u64 {
        self.round << 8 | self.rows as u64 | if self.last { Self::LAST } else { 0 }
    }

    const fn unpack(flag: u64) -> Self {
        let rows = (flag & (Self::LAST - 1)) as usize;
        Self { round: flag >> 8, rows, last: flag & Self::LAST != 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_of_a_round_is_larger_than_all_of_the_rounds_before() {
        let chunk = |round, rows, last| Chunk { round, rows, last };
        for flag in
            [chunk(7, 0, true), chunk(7, Chunk::MOST_ROWS, false), chunk(7, 64, true), chunk(7, 1, false)]
        {
            assert_eq!(Chunk::unpack(flag.pack()), flag);
            assert!(Chunk::of(7).holds(flag.pack()) && !Chunk::of(8).holds(flag.pack()));
        }
    }
}
