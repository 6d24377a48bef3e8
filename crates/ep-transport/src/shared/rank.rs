//! A rank of a group that shares memory: the collectives.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use fused_moe_core::Rank;

use super::group::{Group, Member};
use super::heap::SharedHeap;
use super::seat::{Absence, POSTING_BYTES, Posting, Seat};
use super::substrate::Offer;
use crate::deadline::Deadline;
use crate::doorbell::Cause;
use crate::error::{Awaited, Result, Silence, TransportError};
use crate::heap::Heap;
use crate::segment::Segment;
use crate::symmetric::HeapSize;
use crate::traffic::Traffic;
use crate::transport::{Collective, Shrunk, Transport};

/// Where a rank stands in the sequence of meetings.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Meetings begun. A collective takes one or more.
    begun: u64,
    /// Who was lost in one, after which there are no more.
    lost: Option<(Rank, Silence)>,
    /// Whether the group was shrunk, after which there are no more either.
    pub(super) superseded: bool,
}

/// One rank of a group that shares memory.
#[derive(Debug)]
pub struct SharedRank {
    pub(super) member: Arc<Member>,
    progress: Mutex<Progress>,
}

impl SharedRank {
    pub(crate) fn new(group: Arc<Group>, rank: Rank) -> io::Result<Self> {
        Ok(Self { member: Arc::new(Member::new(group, rank)?), progress: Mutex::default() })
    }

    /// Begins a collective, which ends when the guard is dropped.
    pub(super) fn begin(&self, operation: Collective) -> Result<MutexGuard<'_, Progress>> {
        match self.progress.try_lock() {
            Ok(progress) => Ok(progress),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(TransportError::Overlapping { operation }),
        }
    }

    /// Gives `mine` to all ranks and returns what each of them gave, in as many meetings as the longest takes.
    fn exchange(
        &self,
        progress: &mut Progress,
        operation: Collective,
        mine: &[u8],
        deadline: Deadline,
    ) -> Result<Vec<Vec<u8>>> {
        let mut gathered = vec![Vec::new(); self.world_size()];
        let (mut rest, mut room) = (mine, 0);
        loop {
            let (bytes, later) = rest.split_at(rest.len().min(POSTING_BYTES));
            rest = later;
            room += POSTING_BYTES;
            let posting = Posting { operation, total: mine.len(), bytes: bytes.to_vec() };
            let postings = self.meet(progress, &posting, deadline)?;
            let longest = postings.iter().map(|posting| posting.total).max().unwrap_or(0);
            for (whole, part) in gathered.iter_mut().zip(postings) {
                whole.extend(part.bytes);
            }
            if longest <= room {
                return Ok(gathered);
            }
        }
    }

    /// Posts `mine` and returns what all ranks posted, in rank order.
    fn meet(&self, progress: &mut Progress, mine: &Posting, deadline: Deadline) -> Result<Vec<Posting>> {
        let operation = mine.operation;
        let lost = |(rank, silence)| TransportError::PeerLost {
            rank,
            awaited: Awaited::Collective(operation),
            silence,
        };
        if progress.superseded {
            return Err(TransportError::Superseded);
        }
        if let Some(earlier) = progress.lost {
            return Err(lost(earlier));
        }
        progress.begun += 1;
        let number = progress.begun;
        self.member.seat().post(number, mine);
        self.member.group.ring_all();

        let gathered = self.gather(number, deadline).map_err(|loss| {
            let loss = self.member.blame(loss.0, loss.1);
            progress.lost = Some(loss);
            self.member.announce(Absence::GaveUp);
            lost(loss)
        })?;
        let differing = (0_u32..).zip(&gathered).find(|(_, theirs)| theirs.operation != operation);
        match differing {
            None => Ok(gathered),
            Some((rank, theirs)) => Err(TransportError::Mismatch {
                field: "collective",
                mine: operation.to_string(),
                theirs: theirs.operation.to_string(),
                rank: Rank(rank),
            }),
        }
    }

    /// Collects the postings of meeting `number`; the error is who did not post, and why.
    fn gather(&self, number: u64, deadline: Deadline) -> Result<Vec<Posting>, (Rank, Silence)> {
        let group = &*self.member.group;
        let doorbell = &self.member.seat().doorbell;
        (0_u32..)
            .zip(group.seats())
            .map(|(rank, seat)| {
                let arrival =
                    doorbell.wait(Cause::ANY, group.spin, deadline, || match seat.has_posted(number) {
                        true => Some(Ok(())),
                        // It may have posted and left between the two looks, so look again.
                        false => seat.shuns_collectives().map(|silence| match seat.has_posted(number) {
                            true => Ok(()),
                            false => Err(silence),
                        }),
                    });
                arrival.unwrap_or(Err(Silence::Deadline)).map_err(|silence| (Rank(rank), silence))?;
                // A rank that has posted keeps the posting until all have read it, unless it gave up meanwhile.
                seat.posting(number).ok_or((Rank(rank), Silence::GaveUp))
            })
            .collect()
    }
}

impl Drop for SharedRank {
    fn drop(&mut self) {
        self.member.announce(Absence::NoEndpoint);
    }
}

impl Transport for SharedRank {
    fn rank(&self) -> Rank {
        self.member.rank
    }

    fn world_size(&self) -> usize {
        self.member.group.topology.world_size
    }

    fn ranks_per_node(&self) -> usize {
        self.member.group.topology.ranks_per_node
    }

    fn timeout(&self) -> Duration {
        self.member.group.timeout
    }

    fn all_gather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        let mut progress = self.begin(Collective::AllGather)?;
        self.exchange(&mut progress, Collective::AllGather, mine, deadline)
    }

    fn barrier(&self, deadline: Deadline) -> Result<()> {
        let mut progress = self.begin(Collective::Barrier)?;
        self.exchange(&mut progress, Collective::Barrier, &[], deadline).map(drop)
    }

    fn allocate(&self, size: HeapSize, deadline: Deadline) -> Result<Arc<dyn Heap>> {
        let operation = Collective::Allocate;
        let mut progress = self.begin(operation)?;
        let mine = self.member.group.substrate.offer(size);
        let offers =
            self.exchange(&mut progress, operation, &Offered::encode(size, mine.as_ref()), deadline)?;
        let addresses = agreed_addresses(size, &offers)?;
        let taken = self.take(mine.as_ref(), &addresses, size);
        // All ranks must have taken the segments before any of them withdraws its own, and none goes on if
        // another could not.
        let outcome = taken.as_ref().err().map(Missing::encode).unwrap_or_default();
        let outcomes = self.exchange(&mut progress, operation, &outcome, deadline)?;
        drop(mine);
        let failed = outcomes.iter().find_map(|outcome| Missing::decode(outcome));
        match (taken, failed) {
            (Ok(segments), None) => {
                tracing::debug!(rank = self.member.rank.0, bytes = size.required_bytes(), "allocated a heap");
                Ok(Arc::new(SharedHeap::new(Arc::clone(&self.member), size, segments)))
            }
            (Err(missing), _) | (_, Some(missing)) => Err(match missing {
                Missing { rank, is_gone: false } => {
                    TransportError::OutOfMemory { bytes: size.required_bytes(), rank }
                }
                Missing { rank, is_gone: true } => {
                    let awaited = Awaited::Collective(operation);
                    TransportError::PeerLost { rank, awaited, silence: Silence::Died }
                }
            }),
        }
    }

    fn shrink(&self, deadline: Deadline) -> Result<Shrunk> {
        let (transport, survivors) = self.shrunk(deadline)?;
        Ok(Shrunk { transport, survivors })
    }

    fn traffic(&self) -> Traffic {
        self.member.traffic.snapshot()
    }
}

impl SharedRank {
    /// The segments at `addresses`, one per rank; the error is the first that cannot be had.
    fn take(
        &self,
        mine: Option<&Offer>,
        addresses: &[&[u8]],
        size: HeapSize,
    ) -> Result<Box<[Arc<Segment>]>, Missing> {
        let segments = (0_u32..).map(Rank).zip(addresses).map(|(rank, address)| match mine {
            Some(mine) if rank == self.member.rank => Ok(Arc::clone(&mine.segment)),
            _ => self.member.group.substrate.take(address, size).map_err(|error| {
                tracing::warn!(rank = self.member.rank.0, of = rank.0, %error, "cannot map a segment");
                // A rank withdraws nothing before all have it, so what is not found went with the rank.
                let has_died = || self.member.group.seat(rank).is_ok_and(Seat::has_died);
                Missing { rank, is_gone: error.kind() == io::ErrorKind::NotFound || has_died() }
            }),
        });
        segments.collect()
    }
}

/// A segment that could not be had.
#[derive(Clone, Copy)]
struct Missing {
    /// Whose it is.
    rank: Rank,
    /// Whether that rank has died since it offered the segment.
    is_gone: bool,
}

impl Missing {
    fn encode(&self) -> Vec<u8> {
        [&self.rank.0.to_le_bytes()[..], &[u8::from(self.is_gone)]].concat()
    }

    /// Nothing for a rank that misses nothing.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (rank, rest) = bytes.split_first_chunk()?;
        Some(Self { rank: Rank(u32::from_le_bytes(*rank)), is_gone: rest == [1] })
    }
}

/// What a rank brings to an allocation: the size it wants, and where its segment is.
struct Offered<'a> {
    size: HeapSize,
    /// Empty if the rank has none.
    address: &'a [u8],
}

impl<'a> Offered<'a> {
    fn encode(size: HeapSize, offer: Option<&Offer>) -> Vec<u8> {
        let sizes = [size.bytes, size.words].map(|n| (n as u64).to_le_bytes());
        // An address may be empty; the byte in front tells it from none.
        let offer = offer.into_iter().flat_map(|offer| [1].into_iter().chain(offer.address.iter().copied()));
        sizes.into_iter().flatten().chain(offer).collect()
    }

    fn decode(bytes: &'a [u8]) -> Option<Self> {
        let (bytes_len, rest) = bytes.split_first_chunk()?;
        let (words, address) = rest.split_first_chunk()?;
        let number = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes) as usize;
        Some(Self { size: HeapSize { bytes: number(bytes_len), words: number(words) }, address })
    }
}

/// Where the segments of all ranks are, if they have agreed on `size` and all have one.
fn agreed_addresses(size: HeapSize, offers: &[Vec<u8>]) -> Result<Vec<&[u8]>> {
    let offers: Vec<_> =
        (0_u32..).map(Rank).zip(offers).map(|(rank, o)| (rank, Offered::decode(o))).collect();
    for (rank, offered) in &offers {
        let theirs = offered.as_ref().map_or(HeapSize::default(), |offered| offered.size);
        if theirs != size {
            let (mine, theirs) = (size.to_string(), theirs.to_string());
            return Err(TransportError::Mismatch { field: "heap size", mine, theirs, rank: *rank });
        }
    }
    let addresses = offers.into_iter().map(|(rank, offered)| {
        let address = offered.and_then(|offered| Some(offered.address.split_first()?.1));
        address.ok_or(TransportError::OutOfMemory { bytes: size.required_bytes(), rank })
    });
    addresses.collect()
}
