//! Ranks as processes of an MPI job, on one machine or on several.
//!
//! Inside a node, ranks map each other's memory (`MPI_Win_allocate_shared`) and work as threads do: puts are copies,
//! signals are stores. Between nodes a put is an `MPI_Put`, and a signal follows it when it has been flushed.
//! What arrives by MPI arrives when its target calls MPI, so waits poll and never sleep.
//!
//! MPI cannot carry on without a rank, so the job ends with the first loss: a rank whose deadline passes, or to whom
//! MPI reports an error, prints the [`TransportError::PeerLost`](crate::TransportError::PeerLost) that ranks of other
//! kinds return, and aborts the job. A watchdog does so for a rank that is stuck inside MPI itself.

mod comm;
mod heap;
mod placement;
mod rank;
mod session;
mod watchdog;
mod window;
mod world;

use std::num::NonZeroUsize;
use std::time::Duration;

pub use rank::MpiRank;
pub use world::MpiWorld;

/// How to lay out a group of ranks of an MPI job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MpiOptions {
    /// Ranks in the group; `None` is the whole job.
    pub ranks: Option<NonZeroUsize>,
    /// Ranks on each node, a divisor of the group's; `None` is as many as the machines run. Fewer than that simulates
    /// several nodes on one machine; more cannot be had.
    pub ranks_per_node: Option<NonZeroUsize>,
    /// The group's [`timeout`](crate::Transport::timeout).
    pub timeout: Duration,
}

impl Default for MpiOptions {
    /// The whole job, on the nodes that there are, and a timeout of 30 s.
    fn default() -> Self {
        Self { ranks: None, ranks_per_node: None, timeout: Duration::from_secs(30) }
    }
}
