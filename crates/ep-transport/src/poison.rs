//! A transport whose fresh memory is poison.

use std::sync::Arc;
use std::time::Duration;

use fused_moe_core::Rank;

use crate::deadline::Deadline;
use crate::error::Result;
use crate::heap::Heap;
use crate::symmetric::{HeapSize, SymOffset};
use crate::traffic::Traffic;
use crate::transport::{Shrunk, Transport};

/// What every byte of payload is that no one has written: elements made of it are NaN (f32, bf16, OCP's FP8), ids −1.
pub const POISON: u8 = 0xff;

/// A transport that fills the payload of every heap with [`POISON`] instead of zeros, for tests: a read of memory that
/// no one wrote then shows in the results. Words are zero as always. All ranks of a group use it, or none.
pub struct Poisoned(Arc<dyn Transport>);

impl Poisoned {
    /// `transport` with poisoned heaps.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self(transport)
    }
}

impl Transport for Poisoned {
    fn rank(&self) -> Rank {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn ranks_per_node(&self) -> usize {
        self.0.ranks_per_node()
    }

    fn timeout(&self) -> Duration {
        self.0.timeout()
    }

    fn all_gather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        self.0.all_gather(mine, deadline)
    }

    fn barrier(&self, deadline: Deadline) -> Result<()> {
        self.0.barrier(deadline)
    }

    fn allocate(&self, size: HeapSize, deadline: Deadline) -> Result<Arc<dyn Heap>> {
        let heap = self.0.allocate(size, deadline)?;
        // SAFETY: no rank has told another to write to it: all wait for the barrier first.
        unsafe { heap.local_mut(SymOffset(0), size.bytes)? }.fill(POISON);
        self.0.barrier(deadline)?;
        Ok(heap)
    }

    fn shrink(&self, deadline: Deadline) -> Result<Shrunk> {
        let Shrunk { transport, survivors } = self.0.shrink(deadline)?;
        Ok(Shrunk { transport: Arc::new(Self(transport)), survivors })
    }

    fn traffic(&self) -> Traffic {
        self.0.traffic()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HeapLayout, ThreadOptions, run_ranks, transport_of};

    #[test]
    fn what_no_one_wrote_is_poison() {
        let outcomes = run_ranks(2, ThreadOptions::default(), |group| -> Result<()> {
            let transport = Poisoned::new(transport_of(&group).expect("an endpoint has a transport"));
            let mut layout = HeapLayout::default();
            let (row, word) = (layout.region(100), layout.words(2));
            let heap = transport.allocate(layout.size(), transport.deadline())?;
            assert_eq!([heap.signal_read(word)?, heap.signal_read(word + 1)?], [0, 0]);
            // SAFETY: no rank writes.
            let bytes = unsafe { heap.local(row, 100)? };
            assert!(bytes.iter().all(|&byte| byte == POISON), "{bytes:?}");
            let (elements, _) = bytes.as_chunks::<4>();
            assert!(elements.iter().all(|&bytes| f32::from_ne_bytes(bytes).is_nan()));
            Ok(())
        });
        assert!(outcomes.expect("threads").iter().all(|outcome| *outcome == Ok(())));
    }
}
