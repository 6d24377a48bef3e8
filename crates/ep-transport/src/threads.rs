//! Ranks as threads of one process: the embedded default.
//!
//! All memory is reachable by loads and stores, so puts are copies made by the caller and are complete when they
//! return. A node boundary can be simulated: ranks on different "nodes" then get no
//! [`peer_ptr`](crate::Heap::peer_ptr) and no [`atomic_fetch_add`](crate::Heap::atomic_fetch_add), as between
//! machines.

mod group;
mod heap;
mod rank;

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fused_moe_core::Rank;

use crate::endpoint::Endpoint;
use crate::error::{Result, TransportError};
use group::Group;
pub use rank::ThreadRank;

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
    pub fn new(world_size: usize, options: ThreadOptions) -> Result<Vec<Arc<ThreadRank>>> {
        let ranks_per_node = options.ranks_per_node.map_or(world_size, NonZeroUsize::get);
        if world_size == 0 || !world_size.is_multiple_of(ranks_per_node) || u32::try_from(world_size).is_err()
        {
            return Err(TransportError::Topology { world_size, ranks_per_node });
        }
        tracing::debug!(world_size, ranks_per_node, "new group of threads");
        let group = Arc::new(Group::new(world_size, ranks_per_node, options.timeout));
        let ranks = (0..world_size).map(|rank| Rank(rank as u32));
        Ok(ranks.map(|rank| Arc::new(ThreadRank::new(Arc::clone(&group), rank))).collect())
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
    let run = |rank: Arc<ThreadRank>| {
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
