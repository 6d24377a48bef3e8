//! A rank that is a thread: the collectives.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use fused_moe_core::Rank;

use super::group::{Group, Member, Posting, Seat};
use super::heap::ThreadHeap;
use crate::deadline::Deadline;
use crate::doorbell::Cause;
use crate::error::{Awaited, Result, Silence, TransportError};
use crate::heap::Heap;
use crate::segment::Segment;
use crate::symmetric::HeapSize;
use crate::traffic::{Traffic, TrafficCounters};
use crate::transport::{Collective, Transport};

/// Where a rank stands in the sequence of collectives.
#[derive(Debug, Default)]
struct Progress {
    /// Collectives begun.
    begun: u64,
    /// Who was lost in one, after which there are no more.
    lost: Option<(Rank, Silence)>,
}

/// One rank of a group of threads.
#[derive(Debug)]
pub struct ThreadRank {
    member: Arc<Member>,
    progress: Mutex<Progress>,
}

impl ThreadRank {
    pub(super) fn new(group: Arc<Group>, rank: Rank) -> Self {
        let member = Arc::new(Member { group, rank, traffic: TrafficCounters::default() });
        Self { member, progress: Mutex::default() }
    }

    /// Begins a collective, which ends when the guard is dropped.
    fn begin(&self, operation: Collective) -> Result<MutexGuard<'_, Progress>> {
        match self.progress.try_lock() {
            Ok(progress) => Ok(progress),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(TransportError::Overlapping { operation }),
        }
    }

    /// Posts `mine` and returns what all ranks posted, in rank order.
    fn meet(&self, progress: &mut Progress, mine: Posting, deadline: Deadline) -> Result<Vec<Posting>> {
        let operation = mine.operation;
        let lost = |(rank, silence)| TransportError::PeerLost {
            rank,
            awaited: Awaited::Collective(operation),
            silence,
        };
        if let Some(earlier) = progress.lost {
            return Err(lost(earlier));
        }
        progress.begun += 1;
        let number = progress.begun;
        let seat = self.member.seat();
        *posting(seat, number) = Some(mine.clone());
        seat.posted.store(number, Ordering::Release);
        self.member.group.ring_all();

        let gathered = self.gather(number, deadline).map_err(|loss| {
            progress.lost = Some(loss);
            self.member.give_up();
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

    /// Collects the postings of collective `number`; the error is who did not post, and why.
    fn gather(&self, number: u64, deadline: Deadline) -> Result<Vec<Posting>, (Rank, Silence)> {
        let group = &*self.member.group;
        let doorbell = &self.member.seat().doorbell;
        (0_u32..)
            .zip(&group.seats)
            .map(|(rank, seat)| {
                let has_posted = || seat.posted.load(Ordering::Acquire) >= number;
                let arrival = doorbell.wait(Cause::ANY, group.spin, deadline, || match has_posted() {
                    true => Some(Ok(())),
                    // It may have posted and left between the two looks, so look again.
                    false => seat.shuns_collectives().map(|silence| match has_posted() {
                        true => Ok(()),
                        false => Err(silence),
                    }),
                });
                arrival.unwrap_or(Err(Silence::Deadline)).map_err(|silence| (Rank(rank), silence))?;
                // A rank that has posted keeps the posting until all have read it, unless it gave up meanwhile.
                posting(seat, number).clone().ok_or((Rank(rank), Silence::GaveUp))
            })
            .collect()
    }
}

/// The posting of `seat` to collective `number`.
fn posting(seat: &Seat, number: u64) -> MutexGuard<'_, Option<Posting>> {
    seat.postings[(number % 2) as usize].lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.member.drop_endpoint();
    }
}

impl Transport for ThreadRank {
    fn rank(&self) -> Rank {
        self.member.rank
    }

    fn world_size(&self) -> usize {
        self.member.group.seats.len()
    }

    fn ranks_per_node(&self) -> usize {
        self.member.group.ranks_per_node
    }

    fn timeout(&self) -> Duration {
        self.member.group.timeout
    }

    fn all_gather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        let mut progress = self.begin(Collective::AllGather)?;
        let mine = Posting { operation: Collective::AllGather, bytes: mine.to_vec(), segment: None };
        let gathered = self.meet(&mut progress, mine, deadline)?;
        Ok(gathered.into_iter().map(|posting| posting.bytes).collect())
    }

    fn barrier(&self, deadline: Deadline) -> Result<()> {
        let mut progress = self.begin(Collective::Barrier)?;
        let mine = Posting { operation: Collective::Barrier, bytes: Vec::new(), segment: None };
        self.meet(&mut progress, mine, deadline).map(drop)
    }

    fn allocate(&self, size: HeapSize, deadline: Deadline) -> Result<Arc<dyn Heap>> {
        let operation = Collective::Allocate;
        let mut progress = self.begin(operation)?;
        let segment = Segment::allocate(size).map(Arc::new);
        let bytes = size.to_string().into_bytes();
        let mine = Posting { operation, bytes, segment };
        let segments =
            self.meet(&mut progress, mine, deadline).map(|gathered| agreed_segments(size, gathered));
        let posted = progress.begun;
        // All ranks must have taken the segments before any of them withdraws its own; left in place, it would
        // live on in the posting after the last heap handle is gone. If the ranks did not even meet in the same
        // collective, there is nothing to take.
        let taken = match &segments {
            Ok(_) => {
                let done = Posting { operation, bytes: Vec::new(), segment: None };
                self.meet(&mut progress, done, deadline).map(drop)
            }
            Err(_) => Ok(()),
        };
        if let Some(mine) = &mut *posting(self.member.seat(), posted) {
            mine.segment = None;
        }
        let segments = segments??;
        taken?;
        tracing::debug!(rank = self.member.rank.0, bytes = size.required_bytes(), "allocated a heap");
        Ok(Arc::new(ThreadHeap::new(Arc::clone(&self.member), size, segments)))
    }

    fn traffic(&self) -> Traffic {
        self.member.traffic.snapshot()
    }
}

/// The segments of all ranks, if they have agreed on `size` and all have one.
fn agreed_segments(size: HeapSize, gathered: Vec<Posting>) -> Result<Box<[Arc<Segment>]>> {
    let ranks = || (0_u32..).map(Rank);
    let mine = size.to_string();
    if let Some((rank, other)) = ranks().zip(&gathered).find(|(_, other)| other.bytes != mine.as_bytes()) {
        let theirs = String::from_utf8_lossy(&other.bytes).into_owned();
        return Err(TransportError::Mismatch { field: "heap size", mine, theirs, rank });
    }
    let segments = ranks().zip(gathered).map(|(rank, other)| {
        other.segment.ok_or(TransportError::OutOfMemory { bytes: size.required_bytes(), rank })
    });
    segments.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::{ThreadGroup, ThreadOptions};

    /// Allocates on both ranks of a group and returns the outcomes and the segments still held by postings.
    fn allocate(sizes: [usize; 2]) -> (Vec<Result<Arc<dyn Heap>>>, usize) {
        let ranks = ThreadGroup::new(2, ThreadOptions::default()).unwrap();
        let outcomes = std::thread::scope(|scope| {
            let threads = ranks.iter().zip(sizes).map(|(rank, bytes)| {
                scope.spawn(move || rank.allocate(HeapSize { bytes, words: 1 }, rank.deadline()))
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let seats = &ranks[0].member.group.seats;
        let postings = seats.iter().flat_map(|seat| &seat.postings);
        let held = postings.filter(|posting| posting.lock().unwrap().iter().any(|p| p.segment.is_some()));
        (outcomes, held.count())
    }

    #[test]
    fn only_the_handles_keep_the_memory_of_a_heap() {
        let (outcomes, held) = allocate([100, 100]);
        assert!(outcomes.iter().all(Result::is_ok));
        assert_eq!(held, 0);
    }

    #[test]
    fn a_refused_heap_keeps_no_memory() {
        let (outcomes, held) = allocate([100, 101]);
        assert!(outcomes.iter().all(Result::is_err));
        assert_eq!(held, 0);
    }
}
