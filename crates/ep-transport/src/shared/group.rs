//! What the ranks of a group share.

use std::any::Any;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fused_moe_core::Rank;

use super::seat::{Absence, Seat};
use super::substrate::Substrate;
use crate::doorbell::{Cause, Spin};
use crate::error::{Result, Silence, TransportError};
use crate::segment::Segment;
use crate::symmetric::{HeapSize, SymOffset, SymWord};
use crate::traffic::{Distance, TrafficCounters};

/// How many ranks, and on which nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    /// Ranks in the group.
    pub(crate) world_size: usize,
    /// Ranks on each node, a divisor of the above.
    pub(crate) ranks_per_node: usize,
}

impl Topology {
    /// `world_size` ranks on nodes of `ranks_per_node`; `None` is one node for all.
    pub(crate) fn new(world_size: usize, ranks_per_node: Option<NonZeroUsize>) -> Result<Self> {
        let ranks_per_node = ranks_per_node.map_or(world_size, NonZeroUsize::get);
        if world_size == 0 || !world_size.is_multiple_of(ranks_per_node) || u32::try_from(world_size).is_err()
        {
            return Err(TransportError::Topology { world_size, ranks_per_node });
        }
        Ok(Self { world_size, ranks_per_node })
    }

    pub(super) fn node_of(self, rank: Rank) -> usize {
        rank.index() / self.ranks_per_node
    }
}

/// The group.
#[derive(Debug)]
pub(crate) struct Group {
    /// A [`Seat`] for each rank, and the words of a shrink.
    control: Arc<Segment>,
    /// Shrinks that led to this group.
    generation: u32,
    /// Which rank of the first generation each rank is.
    members: Box<[u32]>,
    pub(super) topology: Topology,
    pub(super) timeout: Duration,
    pub(super) spin: Spin,
    pub(super) substrate: Arc<dyn Substrate>,
}

impl Group {
    /// The first group over `substrate`.
    pub(crate) fn new(
        substrate: Arc<dyn Substrate>,
        topology: Topology,
        timeout: Duration,
    ) -> io::Result<Self> {
        let control = substrate.control(0, Self::control_size(topology))?;
        let members = (0..topology.world_size as u32).collect();
        let spin = Spin::for_ranks(topology.world_size);
        Ok(Self { control, generation: 0, members, topology, timeout, spin, substrate })
    }

    /// The group of `members` that follows this one.
    pub(super) fn next(&self, members: Box<[u32]>, topology: Topology) -> io::Result<Self> {
        let substrate = Arc::clone(&self.substrate);
        let generation = self.generation + 1;
        let control = substrate.control(generation, Self::control_size(topology))?;
        let spin = Spin::for_ranks(topology.world_size);
        Ok(Self { control, generation, members, topology, timeout: self.timeout, spin, substrate })
    }

    /// Which rank of the first generation each rank is.
    pub(crate) fn members(&self) -> &[u32] {
        &self.members
    }

    /// Size of the control segment.
    pub(crate) fn control_size(topology: Topology) -> HeapSize {
        let Topology { world_size, .. } = topology;
        HeapSize {
            bytes: world_size.saturating_mul(size_of::<Seat>()),
            words: Self::shrink_words(world_size),
        }
    }

    /// A word of the control segment.
    pub(super) fn word(&self, index: usize) -> &AtomicU64 {
        self.control.word(SymWord(index)).expect("a control segment holds the words of a shrink")
    }

    pub(super) fn seats(&self) -> &[Seat] {
        let world_size = self.topology.world_size;
        let size = Self::control_size(self.topology);
        let start =
            self.control.payload(SymOffset(0), size.bytes).expect("a control segment holds all seats");
        // SAFETY: the segment is mapped as long as `self`, page-aligned and large enough. It was zeroed, which is
        // a valid `Seat`, and a `Seat` consists of atomics, so sharing it is sound whoever writes it.
        unsafe { std::slice::from_raw_parts(start.cast::<Seat>().as_ptr(), world_size) }
    }

    pub(super) fn seat(&self, rank: Rank) -> Result<&Seat> {
        let world_size = self.topology.world_size;
        self.seats().get(rank.index()).ok_or(TransportError::NoSuchRank { rank, world_size })
    }

    /// Records that the rank with seat `index` is absent, and wakes everyone who may wait for it.
    pub(crate) fn announce(&self, index: usize, absence: Absence) {
        self.seats()[index].announce(absence);
        self.ring_all();
    }

    pub(super) fn ring_all(&self) {
        self.seats().iter().for_each(|seat| seat.doorbell.ring(Cause::ANY));
    }
}

/// A rank's membership, held by its endpoint and its heaps. The last to go tells the others that the rank has
/// left.
pub(super) struct Member {
    pub(super) group: Arc<Group>,
    pub(super) rank: Rank,
    pub(super) traffic: TrafficCounters,
    /// Ranks that missed a deadline of this one.
    suspects: Box<[AtomicBool]>,
    /// What [`Substrate::watch`] gave.
    _watch: Box<dyn Any + Send + Sync>,
}

impl Member {
    pub(super) fn new(group: Arc<Group>, rank: Rank) -> io::Result<Self> {
        let watch = group.substrate.watch(&group)?;
        let suspects = (0..group.topology.world_size).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { group, rank, traffic: TrafficCounters::default(), suspects, _watch: watch })
    }

    /// Remembers that `rank` missed a deadline.
    fn suspect(&self, rank: Rank) {
        self.suspects[rank.index()].store(true, Ordering::Relaxed);
    }

    /// Whether `rank` has missed a deadline.
    pub(super) fn suspects(&self, rank: Rank) -> bool {
        self.suspects[rank.index()].load(Ordering::Relaxed)
    }

    /// Who is lost if `rank` says nothing for the reason `silence`: a survivor that shrinks the group does so because
    /// of another.
    pub(super) fn blame(&self, rank: Rank, silence: Silence) -> (Rank, Silence) {
        match silence {
            Silence::Deadline => self.suspect(rank),
            Silence::Shrinking => {
                if let Some(dead) = self.group.seats().iter().position(Seat::has_died) {
                    return (Rank(dead as u32), Silence::Died);
                }
            }
            _ => {}
        }
        (rank, silence)
    }

    pub(super) fn seat(&self) -> &Seat {
        &self.group.seats()[self.rank.index()]
    }

    pub(super) fn distance(&self, to: Rank) -> Distance {
        let topology = self.group.topology;
        match to {
            _ if to == self.rank => Distance::Own,
            _ if topology.node_of(to) == topology.node_of(self.rank) => Distance::SameNode,
            _ => Distance::OtherNode,
        }
    }

    /// Tells the group that this rank is absent.
    pub(super) fn announce(&self, absence: Absence) {
        self.group.announce(self.rank.index(), absence);
    }
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Member({} of {})", self.rank, self.group.topology.world_size)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.announce(Absence::Departed);
    }
}
