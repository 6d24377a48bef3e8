//! A rank that is a process of an MPI job: the collectives.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use fused_moe_core::Rank;

use super::comm::Comm;
use super::heap::MpiHeap;
use super::session::{Remains, Session};
use super::watchdog::Wait;
use super::window::{Members, Window};
use super::world::numbers;
use crate::deadline::Deadline;
use crate::error::{Awaited, Result, TransportError};
use crate::heap::Heap;
use crate::segment::Segment;
use crate::symmetric::HeapSize;
use crate::traffic::{Distance, Traffic, TrafficCounters};
use crate::transport::{Collective, Transport};

/// A rank's membership in a group, held by its end and its heaps. The last to go leaves the group.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) session: Arc<Session>,
    number: u64,
    pub(super) comm: Comm,
    /// The ranks of this rank's node. They allocate together, and send each other nothing.
    pub(super) node: Comm,
    timeout: Duration,
    /// Whether ranks share cores, so that a rank that waits should let others run.
    pub(super) crowded: bool,
    pub(super) traffic: TrafficCounters,
    /// By number of allocation. One that nothing else holds has been dropped on this rank, but other ranks may still
    /// write to it.
    windows: Mutex<BTreeMap<u64, Arc<Window>>>,
}

impl Group {
    pub(super) fn new(
        session: Arc<Session>,
        number: u64,
        [comm, node]: [Comm; 2],
        (timeout, crowded): (Duration, bool),
    ) -> Self {
        let (traffic, windows) = (TrafficCounters::default(), Mutex::default());
        Self { session, number, comm, node, timeout, crowded, traffic, windows }
    }

    pub(super) fn rank(&self) -> Rank {
        Rank(self.comm.rank() as u32)
    }

    pub(super) fn distance(&self, to: Rank) -> Distance {
        let node = |rank: Rank| rank.index() / self.node.size();
        match to {
            _ if to == self.rank() => Distance::Own,
            _ if node(to) == node(self.rank()) => Distance::SameNode,
            _ => Distance::OtherNode,
        }
    }

    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.timeout)
    }

    fn windows(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Window>>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until everything that `window` was used for has reached its targets.
    pub(super) fn flush(&self, window: &Window, deadline: Deadline) {
        for to in window.unflushed() {
            let wait = Wait::new(Rank(to as u32), Awaited::Completion, deadline);
            self.session.call(wait, || window.flush(to));
        }
    }

    /// Frees the heaps that all ranks have dropped; `all` has the numbers that each has. Collective.
    fn free(&self, all: &[Vec<u64>], wait: Wait) {
        let Some((first, rest)) = all.split_first() else { return };
        for number in first.iter().filter(|number| rest.iter().all(|numbers| numbers.contains(number))) {
            if let Some(window) = self.windows().remove(number) {
                self.session.call(wait, || window.free());
            }
        }
    }

    fn dropped(&self) -> Vec<u64> {
        let windows = self.windows();
        windows
            .iter()
            .filter(|(_, window)| Arc::strong_count(window) == 1)
            .map(|(&number, _)| number)
            .collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let windows = std::mem::take(&mut *self.windows());
        self.session.leave(self.number, Remains { windows, comms: vec![self.node, self.comm] });
    }
}

/// One rank of a group of MPI ranks.
#[derive(Debug)]
pub struct MpiRank {
    group: Arc<Group>,
    /// Collectives begun.
    begun: Mutex<u64>,
}

impl MpiRank {
    pub(super) fn new(group: Group) -> Self {
        Self { group: Arc::new(group), begun: Mutex::default() }
    }

    /// Begins a collective, which ends when the guard is dropped.
    fn begin(&self, operation: Collective, deadline: Deadline) -> Result<(MutexGuard<'_, u64>, Wait)> {
        let mut begun = match self.begun.try_lock() {
            Ok(begun) => begun,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(TransportError::Overlapping { operation }),
        };
        *begun += 1;
        let wait = Wait::new(Rank(0), Awaited::Collective(operation), deadline);
        let wait = Wait { collective: Some(*begun), ..wait };
        // What this rank wrote before is visible to all after.
        let windows: Vec<_> = self.group.windows().values().cloned().collect();
        windows.iter().for_each(|window| self.group.flush(window, deadline));
        Ok((begun, wait))
    }

    /// Gives `mine` to every rank and returns what all gave, in rank order.
    fn meet(&self, operation: Collective, mine: &[u8], wait: Wait) -> Result<Vec<Vec<u8>>> {
        let Group { session, comm, .. } = &*self.group;
        let header = [operation.code(), mine.len() as u64].map(u64::to_le_bytes).concat();
        let headers = comm.swap(session, wait, &header, &vec![header.len(); comm.size()]);
        let headers: Vec<_> = headers.iter().map(|header| numbers(header)).collect();
        if let Some((rank, theirs)) =
            (0_u32..).zip(&headers).find(|(_, theirs)| theirs[0] != operation.code())
        {
            return Err(TransportError::Mismatch {
                field: "collective",
                mine: operation.to_string(),
                theirs: Collective::from_code(theirs[0])
                    .map_or_else(|| theirs[0].to_string(), |c| c.to_string()),
                rank: Rank(rank),
            });
        }
        let lens: Vec<usize> = headers.iter().map(|header| header[1] as usize).collect();
        if let Some(&len) = lens.iter().find(|&&len| i32::try_from(len).is_err()) {
            return Err(TransportError::Mpi { what: format!("{len} bytes are too many to gather") });
        }
        Ok(comm.swap(session, wait, mine, &lens))
    }
}

impl Transport for MpiRank {
    fn rank(&self) -> Rank {
        self.group.rank()
    }

    fn world_size(&self) -> usize {
        self.group.comm.size()
    }

    fn ranks_per_node(&self) -> usize {
        self.group.node.size()
    }

    fn timeout(&self) -> Duration {
        self.group.timeout
    }

    fn all_gather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        let (_begun, wait) = self.begin(Collective::AllGather, deadline)?;
        self.meet(Collective::AllGather, mine, wait)
    }

    fn barrier(&self, deadline: Deadline) -> Result<()> {
        let (_begun, wait) = self.begin(Collective::Barrier, deadline)?;
        self.meet(Collective::Barrier, &[], wait).map(drop)
    }

    fn allocate(&self, size: HeapSize, deadline: Deadline) -> Result<Arc<dyn Heap>> {
        let operation = Collective::Allocate;
        let (begun, wait) = self.begin(operation, deadline)?;
        // MPI does not say whether there is memory before it takes it, and not to all ranks alike.
        let bytes = size.required_bytes();
        let can =
            Segment::allocate(size).is_some() && bytes.checked_add(crate::symmetric::HEAP_ALIGN).is_some();
        let mut mine = [size.bytes as u64, size.words as u64, u64::from(can)].to_vec();
        mine.extend(self.group.dropped());
        let mine: Vec<u8> = mine.iter().flat_map(|number| number.to_le_bytes()).collect();
        let gathered = self.meet(operation, &mine, wait)?;
        let mut offers = Vec::with_capacity(gathered.len());
        let mut dropped = Vec::with_capacity(gathered.len());
        for bytes in &gathered {
            let numbers = numbers(bytes);
            let size = HeapSize { bytes: numbers[0] as usize, words: numbers[1] as usize };
            offers.push((size, numbers[2] != 0));
            dropped.push(numbers[3..].to_vec());
        }
        self.group.free(&dropped, wait);
        agree(size, &offers)?;

        let Group { session, comm, node, .. } = &*self.group;
        let window = session.call(wait, || Window::allocate(Members { group: comm, node }, size));
        let window = Arc::new(window);
        self.group.windows().insert(*begun, Arc::clone(&window));
        // No rank may write before all have zeroed their memory.
        self.meet(operation, &[], wait)?;
        tracing::debug!(rank = self.rank().0, bytes, "allocated a heap");
        Ok(Arc::new(MpiHeap::new(Arc::clone(&self.group), window)))
    }

    fn traffic(&self) -> Traffic {
        self.group.traffic.snapshot()
    }
}

/// Checks that all ranks want the same size and that all can have it.
fn agree(size: HeapSize, offers: &[(HeapSize, bool)]) -> Result<()> {
    let ranks = || (0_u32..).map(Rank).zip(offers);
    if let Some((rank, (theirs, _))) = ranks().find(|(_, (theirs, _))| *theirs != size) {
        let (mine, theirs) = (size.to_string(), theirs.to_string());
        return Err(TransportError::Mismatch { field: "heap size", mine, theirs, rank });
    }
    match ranks().find(|(_, (_, can))| !can) {
        Some((rank, _)) => Err(TransportError::OutOfMemory { bytes: size.required_bytes(), rank }),
        None => Ok(()),
    }
}
