//! Rows of a rank that the ranks of its node share out among themselves.

use fused_moe_core::Rank;

use crate::error::Result;
use crate::heap::{Heap, Signal};
use crate::symmetric::{HeapLayout, SymWord};

/// The next free row of a rank's memory, counted from zero in every round.
///
/// There is one word per parity of the round. Zeroing the word of the next round is safe at the start of a round
/// if the ranks exchange statuses ([`StatusBoard`](crate::StatusBoard)) after they took rows:
///
/// - the word was last added to in the round before, and by then this rank has seen all statuses of that round;
/// - it is next added to in the round after, which no rank begins without this rank's status of this one.
#[derive(Clone, Copy, Debug)]
pub struct RowCursor {
    words: SymWord,
}

impl RowCursor {
    /// Reserves the words.
    pub fn reserve(layout: &mut HeapLayout) -> Self {
        Self { words: layout.words(2) }
    }

    /// Takes `rows` rows of `of` in round `round`; returns the first.
    ///
    /// # Errors
    /// As [`Heap::atomic_fetch_add`].
    pub fn take(&self, heap: &dyn Heap, of: Rank, round: u64, rows: u64) -> Result<u64> {
        heap.atomic_fetch_add(of, self.word(round), rows)
    }

    /// Counts this rank's rows of the round after `round` from zero. Called at the start of `round`, before this
    /// rank's first status of it.
    ///
    /// # Errors
    /// As [`Heap::signal_set`].
    pub fn rearm(&self, heap: &dyn Heap, round: u64) -> Result<()> {
        heap.signal_set(heap.rank(), Signal { word: self.word(round + 1), value: 0 })
    }

    fn word(&self, round: u64) -> SymWord {
        self.words + (round % 2) as usize
    }
}
