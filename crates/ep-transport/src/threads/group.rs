//! What the ranks of a group of threads share.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fused_moe_core::Rank;

use crate::doorbell::{Cause, Doorbell, Spin};
use crate::error::{Result, Silence, TransportError};
use crate::segment::Segment;
use crate::traffic::{Distance, TrafficCounters};
use crate::transport::Collective;

/// Bit of [`Seat::absences`]: the rank does nothing any more.
const DEPARTED: u8 = 1;
/// Bit of [`Seat::absences`]: the rank's endpoint is gone, its heaps are not.
const NO_ENDPOINT: u8 = 2;
/// Bit of [`Seat::absences`]: the rank gave up on a collective.
const GAVE_UP: u8 = 4;

/// What a rank brings to a collective.
#[derive(Clone, Debug)]
pub(super) struct Posting {
    pub(super) operation: Collective,
    pub(super) bytes: Vec<u8>,
    pub(super) segment: Option<Arc<Segment>>,
}

/// One rank's place in the group.
#[derive(Debug, Default)]
pub(super) struct Seat {
    /// Rung when anything changes that the rank may wait for.
    pub(super) doorbell: Doorbell,
    /// Collectives that the rank has posted to.
    pub(super) posted: AtomicU64,
    /// What it posted to the last two, by parity. A rank posts to collective n + 1 only when it has read all
    /// postings of n − 1, so two suffice.
    pub(super) postings: [Mutex<Option<Posting>>; 2],
    absences: AtomicU8,
}

impl Seat {
    /// Whether the rank is past setting signals.
    pub(super) fn has_departed(&self) -> bool {
        self.absences.load(Ordering::Acquire) & DEPARTED != 0
    }

    /// Why the rank will not come to any further collective, if it will not.
    pub(super) fn shuns_collectives(&self) -> Option<Silence> {
        match self.absences.load(Ordering::Acquire) {
            0 => None,
            absences if absences & (DEPARTED | NO_ENDPOINT) != 0 => Some(Silence::Departed),
            _ => Some(Silence::GaveUp),
        }
    }
}

/// The group.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) seats: Box<[Seat]>,
    pub(super) ranks_per_node: usize,
    pub(super) timeout: Duration,
    pub(super) spin: Spin,
}

impl Group {
    pub(super) fn new(world_size: usize, ranks_per_node: usize, timeout: Duration) -> Self {
        let seats = (0..world_size).map(|_| Seat::default()).collect();
        Self { seats, ranks_per_node, timeout, spin: Spin::for_ranks(world_size) }
    }

    pub(super) fn seat(&self, rank: Rank) -> Result<&Seat> {
        let world_size = self.seats.len();
        self.seats.get(rank.index()).ok_or(TransportError::NoSuchRank { rank, world_size })
    }

    pub(super) fn ring_all(&self) {
        self.seats.iter().for_each(|seat| seat.doorbell.ring(Cause::ANY));
    }
}

/// A rank's membership, held by its endpoint and its heaps. The last to go tells the others that the rank has
/// left.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) group: Arc<Group>,
    pub(super) rank: Rank,
    pub(super) traffic: TrafficCounters,
}

impl Member {
    pub(super) fn seat(&self) -> &Seat {
        &self.group.seats[self.rank.index()]
    }

    pub(super) fn distance(&self, to: Rank) -> Distance {
        let node = |rank: Rank| rank.index() / self.group.ranks_per_node;
        match to {
            _ if to == self.rank => Distance::Own,
            _ if node(to) == node(self.rank) => Distance::SameNode,
            _ => Distance::OtherNode,
        }
    }

    /// Tells the group that this rank gave up on a collective.
    pub(super) fn give_up(&self) {
        self.announce(GAVE_UP);
    }

    /// Tells the group that this rank's endpoint is gone.
    pub(super) fn drop_endpoint(&self) {
        self.announce(NO_ENDPOINT);
    }

    fn announce(&self, absence: u8) {
        self.seat().absences.fetch_or(absence, Ordering::AcqRel);
        self.group.ring_all();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.announce(DEPARTED);
    }
}
