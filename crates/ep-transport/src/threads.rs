//! Ranks as threads of one process: the embedded default.

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fused_moe_core::Rank;

use crate::endpoint::Endpoint;
use crate::error::{Result, TransportError};
use crate::segment::Segment;
use crate::shared::{Group, Offer, SharedRank, Substrate, Topology};
use crate::symmetric::HeapSize;

/// How to lay out a group of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadOptions {
    /// Ranks on each simulated node, a divisor of the world size; `None` is one node for all.
    pub ranks_per_node: Option<NonZeroUsize>,
    /// The group's [`timeout`](crate::Transport::timeout).
    pub timeout: Duration,
}

impl Default for ThreadOptions {
    /// One node, and a timeout of 30 s: far beyond any round, well below a person's patience.
    fn default() -> Self {
        Self { ranks_per_node: None, timeout: Duration::from_secs(30) }
    }
}

/// Makes groups of threads.
#[derive(Debug)]
pub struct ThreadGroup;

impl ThreadGroup {
    /// The endpoints of a new group, in rank order, each to be moved into the thread that is to be that rank.
    ///
    /// A rank has left when its endpoint and all heaps made from it are dropped; collectives need the endpoint.
    ///
    /// # Errors
    /// [`TransportError::Topology`] if there are no ranks or they do not fill their nodes.
    #[expect(clippy::new_ret_no_self, reason = "a group is its ranks, each owned by another thread")]
    pub fn new(world_size: usize, options: ThreadOptions) -> Result<Vec<Arc<SharedRank>>> {
        let topology = Topology::new(world_size, options.ranks_per_node)?;
        let refused = TransportError::system("memory for a group");
        let process = Arc::new(OneProcess::default());
        let group = Arc::new(Group::new(process, topology, options.timeout).map_err(&refused)?);
        tracing::debug!(world_size, ranks_per_node = topology.ranks_per_node, "new group of threads");
        let ranks = (0..world_size).map(|rank| SharedRank::new(Arc::clone(&group), Rank(rank as u32)));
        ranks.map(|rank| rank.map(Arc::new).map_err(&refused)).collect()
    }
}

/// What threads of one process share segments by: a table of them.
#[derive(Debug, Default)]
struct OneProcess {
    offers: Arc<Mutex<Offers>>,
    /// Control segments, by generation.
    controls: Mutex<BTreeMap<u32, Arc<Segment>>>,
}

/// Segments on offer.
#[derive(Debug, Default)]
struct Offers {
    by_number: BTreeMap<u64, Arc<Segment>>,
    next: u64,
}

/// Withdraws an offer when it is dropped.
struct OnOffer {
    offers: Arc<Mutex<Offers>>,
    number: u64,
}

impl Drop for OnOffer {
    fn drop(&mut self) {
        lock(&self.offers).by_number.remove(&self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Substrate for OneProcess {
    fn offer(&self, size: HeapSize) -> Option<Offer> {
        let segment = Arc::new(Segment::allocate(size)?);
        let mut offers = lock(&self.offers);
        let number = offers.next;
        offers.next += 1;
        offers.by_number.insert(number, Arc::clone(&segment));
        let _keep = Box::new(OnOffer { offers: Arc::clone(&self.offers), number });
        Some(Offer { segment, address: number.to_le_bytes().to_vec(), _keep })
    }

    fn take(&self, address: &[u8], _size: HeapSize) -> io::Result<Arc<Segment>> {
        let number = address.try_into().map(u64::from_le_bytes).map_err(io::Error::other)?;
        lock(&self.offers).by_number.get(&number).cloned().ok_or(io::ErrorKind::NotFound.into())
    }

    fn control(&self, generation: u32, size: HeapSize) -> io::Result<Arc<Segment>> {
        let mut controls = lock(&self.controls);
        if let Some(control) = controls.get(&generation) {
            return Ok(Arc::clone(control));
        }
        let control = Arc::new(Segment::allocate(size).ok_or(io::ErrorKind::OutOfMemory)?);
        controls.insert(generation, Arc::clone(&control));
        Ok(control)
    }

    /// A thread does not die without dropping what it owns.
    fn watch(&self, _group: &Arc<Group>) -> io::Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }
}

/// Runs `body` once per rank, each on a thread of its own, and returns what they return, in rank order.
///
/// A rank stays in the group until its `body` has returned and its result holds no heap.
///
/// # Errors
/// [`TransportError::Topology`] as [`ThreadGroup::new`], [`TransportError::Spawn`] if a thread cannot be had
/// (ranks that did start find the others gone).
///
/// # Panics
/// If a body panics: with the payload of the body that panicked first, after all have ended. Its peers find it
/// gone and get [`TransportError::PeerLost`].
pub fn run_ranks<T, F>(world_size: usize, options: ThreadOptions, body: F) -> Result<Vec<T>>
where
    T: Send,
    F: Fn(Endpoint) -> T + Sync,
{
    let ranks = ThreadGroup::new(world_size, options)?;
    let first_panic = Mutex::new(None);
    let run = |rank: Arc<SharedRank>| {
        // `rank` outlives the body, so the group notices a panic only after its payload is recorded: the panics
        // that it causes among the peers come later.
        let endpoint = Endpoint::new(Arc::clone(&rank) as _);
        match catch_unwind(AssertUnwindSafe(|| body(endpoint))) {
            Ok(value) => Some(value),
            Err(payload) => {
                first_panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
                None
            }
        }
    };
    let outcome = std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(world_size);
        for (index, rank) in ranks.into_iter().enumerate() {
            let builder = std::thread::Builder::new().name(format!("rank-{index}"));
            let thread = builder
                .spawn_scoped(scope, || run(rank))
                .map_err(|error| TransportError::Spawn { rank: Rank(index as u32), kind: error.kind() })?;
            threads.push(thread);
        }
        // A body's panic is caught within its thread, so a join fails for no reason but a panicking `drop` of
        // its payload, which counts as no value.
        Ok(threads.into_iter().map(|thread| thread.join().unwrap_or(None)).collect::<Option<Vec<_>>>())
    });
    match first_panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(payload) => resume_unwind(payload),
        None => outcome.map(|values| values.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heap::Heap;
    use crate::transport::Transport;

    /// Allocates on both ranks of a group and returns the outcomes and how many segments are still on offer.
    fn allocate(sizes: [usize; 2]) -> (Vec<Result<Arc<dyn Heap>>>, usize) {
        let process = Arc::new(OneProcess::default());
        let topology = Topology::new(2, None).unwrap();
        let group = Group::new(Arc::clone(&process) as _, topology, Duration::from_secs(30)).unwrap();
        let group = Arc::new(group);
        let outcomes = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2)
                .map(|index| {
                    let rank = SharedRank::new(Arc::clone(&group), Rank(index as u32)).unwrap();
                    let size = HeapSize { bytes: sizes[index], words: 1 };
                    scope.spawn(move || rank.allocate(size, rank.deadline()))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let on_offer = lock(&process.offers).by_number.len();
        (outcomes, on_offer)
    }

    #[test]
    fn only_the_handles_keep_the_memory_of_a_heap() {
        let (outcomes, on_offer) = allocate([100, 100]);
        assert!(outcomes.iter().all(Result::is_ok));
        assert_eq!(on_offer, 0);
    }

    #[test]
    fn a_refused_heap_keeps_no_memory() {
        let (outcomes, on_offer) = allocate([100, 101]);
        assert!(outcomes.iter().all(Result::is_err));
        assert_eq!(on_offer, 0);
    }
}
