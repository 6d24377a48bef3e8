//! A rank's membership in a group, and what the group does together.

use std::sync::Arc;
use std::time::Duration;

use fused_moe_core::Rank;

use crate::deadline::Deadline;
use crate::error::{Result, TransportError};
use crate::heap::Heap;
use crate::symmetric::HeapSize;
use crate::traffic::Traffic;

/// The operations that all ranks call together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Collective {
    /// [`Transport::all_gather`].
    AllGather,
    /// [`Transport::barrier`].
    Barrier,
    /// [`Transport::allocate`].
    Allocate,
    /// [`Transport::shrink`].
    Shrink,
    /// Making a group of some ranks of a larger one.
    Split,
}

impl Collective {
    /// The operation as a word in shared memory; never 0.
    pub(crate) const fn code(self) -> u64 {
        match self {
            Collective::AllGather => 1,
            Collective::Barrier => 2,
            Collective::Allocate => 3,
            Collective::Shrink => 4,
            Collective::Split => 5,
        }
    }

    pub(crate) fn from_code(code: u64) -> Option<Self> {
        [Self::AllGather, Self::Barrier, Self::Allocate, Self::Shrink, Self::Split]
            .into_iter()
            .find(|operation| operation.code() == code)
    }
}

impl std::fmt::Display for Collective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Collective::AllGather => "all-gather",
            Collective::Barrier => "barrier",
            Collective::Allocate => "allocate",
            Collective::Shrink => "shrink",
            Collective::Split => "split",
        })
    }
}

/// What is left of a group.
pub struct Shrunk {
    /// This rank's end of the new group.
    pub transport: Arc<dyn Transport>,
    /// Which rank of the old group each rank of the new one was, in ascending order.
    pub survivors: Vec<Rank>,
}

impl std::fmt::Debug for Shrunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shrunk({}, survivors {:?})", self.transport.rank(), self.survivors)
    }
}

/// One rank's end of a group: who it is, the collectives, and the memory it shares.
///
/// Collectives are for building handles, not for the rounds of a layer; those go over a [`Heap`]. All ranks call
/// them in the same order, one at a time. A rank that gives up on one (its deadline passed, a peer left) is
/// out of step with the others for good: from then on every collective of the group ends in
/// [`TransportError::PeerLost`](crate::TransportError::PeerLost), at once. Heaps that exist go on working.
///
/// Ranks are numbered node by node: the first [`ranks_per_node`](Transport::ranks_per_node) are on node 0.
pub trait Transport: Send + Sync {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Ranks in the group.
    fn world_size(&self) -> usize;

    /// Ranks on each node, a divisor of the world size. Inside a node ranks reach each other's memory directly.
    fn ranks_per_node(&self) -> usize;

    /// The time that a wait gets where the caller has no better idea.
    fn timeout(&self) -> Duration;

    /// Gives `mine` to every rank and returns what all of them gave, in rank order. Collective; the lengths may
    /// differ. Everything that a rank wrote before is visible to all after.
    ///
    /// # Errors
    /// [`PeerLost`](crate::TransportError::PeerLost) if a rank does not take part by the deadline,
    /// [`Mismatch`](crate::TransportError::Mismatch) if ranks are in different collectives,
    /// [`Overlapping`](crate::TransportError::Overlapping) if this rank is in one already.
    fn all_gather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>>;

    /// Waits until every rank is here. Collective. Everything that a rank wrote before is visible to all after.
    ///
    /// # Errors
    /// As [`all_gather`](Transport::all_gather).
    fn barrier(&self, deadline: Deadline) -> Result<()>;

    /// Allocates a heap of `size` on every rank, all bytes and words zero (but see [`Poisoned`](crate::Poisoned)).
    /// Collective; returns when the memory of every rank is ready to be written by every other. The memory of a rank
    /// lives as long as any rank holds the heap.
    ///
    /// # Errors
    /// As [`all_gather`](Transport::all_gather); [`Mismatch`](crate::TransportError::Mismatch) on all ranks if
    /// the sizes differ, [`OutOfMemory`](crate::TransportError::OutOfMemory) on all ranks if one cannot allocate.
    fn allocate(&self, size: HeapSize, deadline: Deadline) -> Result<Arc<dyn Heap>>;

    /// Goes on without ranks that are lost: makes a group of all that call this by about half of the time until
    /// `deadline`. Who is known to be dead is not waited for, and who has missed a deadline, not long.
    ///
    /// All survivors get the same group, whichever losses each of them has seen. They are numbered anew, in the order
    /// of their ranks; nodes keep their boundaries, but are cut into equal parts if they lost different numbers. The new
    /// group's heaps are new memory: whatever a rank that was left out still writes cannot reach them.
    ///
    /// The old group ends with the call: waits for a rank that has called this end with
    /// [`PeerLost`](crate::TransportError::PeerLost), so a loss that one survivor has noticed reaches all. Handles over
    /// its heaps are of no use any more.
    ///
    /// # Errors
    /// [`Excluded`](crate::TransportError::Excluded) if the others have gone on without this rank;
    /// [`PeerLost`](crate::TransportError::PeerLost) if there is no group by the deadline;
    /// [`Superseded`](crate::TransportError::Superseded) if it was called before;
    /// [`FailStop`](crate::TransportError::FailStop) if this transport cannot;
    /// [`Overlapping`](crate::TransportError::Overlapping), [`System`](crate::TransportError::System).
    fn shrink(&self, deadline: Deadline) -> Result<Shrunk> {
        let _ = deadline;
        Err(TransportError::FailStop)
    }

    /// What this rank has moved over all its heaps so far.
    fn traffic(&self) -> Traffic;

    /// The node of `rank`.
    fn node_of(&self, rank: Rank) -> usize {
        rank.index() / self.ranks_per_node()
    }

    /// The deadline [`timeout`](Transport::timeout) from now.
    fn deadline(&self) -> Deadline {
        Deadline::after(self.timeout())
    }
}
