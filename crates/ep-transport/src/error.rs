//! What can go wrong between ranks.

use fused_moe_core::{Error, ErrorKind, Mismatch, Rank, Stage};

use crate::heap::Until;
use crate::symmetric::{HeapSize, SymOffset, SymWord};
use crate::transport::Collective;

/// What a rank was waiting for when it gave a peer up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Awaited {
    /// A word of this rank's own heap.
    Signal {
        /// The word.
        word: SymWord,
        /// The condition that did not come true.
        until: Until,
        /// The value that the word had when the wait ended.
        last_seen: u64,
    },
    /// The peer's part in a collective.
    Collective(Collective),
    /// That what this rank wrote to the peer has arrived.
    Completion,
    /// The peer's part in taking down the group.
    Shutdown,
}

impl std::fmt::Display for Awaited {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Awaited::Signal { word, until, last_seen } => {
                write!(f, "signal word {} is {last_seen}, awaited {until}", word.0)
            }
            Awaited::Collective(operation) => write!(f, "awaited in {operation}"),
            Awaited::Completion => f.write_str("awaited the arrival of puts"),
            Awaited::Shutdown => f.write_str("awaited to take the group down"),
        }
    }
}

/// How a peer was found to be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Silence {
    /// The deadline passed.
    Deadline,
    /// The peer left the group (its endpoint was dropped, or its thread panicked).
    Departed,
    /// The peer's process has ended without leaving the group.
    Died,
    /// The peer has called [`Transport::shrink`](crate::Transport::shrink): it takes no further part in this group.
    Shrinking,
    /// The peer gave up on an earlier collective, so the group can hold no further ones.
    GaveUp,
}

impl std::fmt::Display for Silence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Silence::Deadline => "did not answer by the deadline",
            Silence::Departed => "left the group",
            Silence::Died => "died",
            Silence::Shrinking => "is shrinking the group",
            Silence::GaveUp => "gave up on an earlier collective",
        })
    }
}

/// Why processes did not become a group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RendezvousError {
    /// The address cannot be had, or no one listens there.
    #[error("{0}")]
    Address(std::io::ErrorKind),
    /// The connection broke off.
    #[error("connection broke off: {0}")]
    BrokenOff(std::io::ErrorKind),
    /// The rank has another token, so it is of another group.
    #[error("the token is that of another group")]
    Token,
    /// Ranks of one group need one version of this crate.
    #[error("version {mine} here, {theirs} there")]
    Version {
        /// The rank's version.
        mine: String,
        /// The version of who holds the rendezvous.
        theirs: String,
    },
    /// The rank thinks that it is one of another group.
    #[error("{rank} of {} ranks, {} per node, here; {} ranks, {} per node, there", mine.0, mine.1, theirs.0, theirs.1)]
    Topology {
        /// The rank.
        rank: Rank,
        /// Its number of ranks, and of ranks per node.
        mine: (usize, usize),
        /// Those of who holds the rendezvous.
        theirs: (usize, usize),
    },
    /// Another process is this rank.
    #[error("another process is {0}")]
    Taken(Rank),
    /// A rank did not come by the deadline, or was lost before all had come.
    #[error("{0} is missing")]
    Missing(Rank),
}

/// Errors of transports and heaps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// A peer is silent or gone.
    #[error("{rank} {silence} ({awaited})")]
    PeerLost {
        /// The lost rank.
        rank: Rank,
        /// What was awaited from it.
        awaited: Awaited,
        /// How it was found to be lost.
        silence: Silence,
    },
    /// The ranks called a collective with different arguments, or different collectives. Every rank gets this
    /// error, each from its own side, and the group stays usable.
    #[error("{field} differs between ranks: {mine} here, {theirs} on {rank}")]
    Mismatch {
        /// What differs.
        field: &'static str,
        /// This rank's value.
        mine: String,
        /// The other rank's value.
        theirs: String,
        /// The lowest rank whose value differs from this rank's.
        rank: Rank,
    },
    /// Some rank could not allocate its part of a heap. Every rank gets this error.
    #[error("{bytes} bytes of symmetric memory could not be had on {rank}")]
    OutOfMemory {
        /// Bytes asked for on each rank.
        bytes: usize,
        /// The lowest rank that failed.
        rank: Rank,
    },
    /// A payload range that does not lie within the heap.
    #[error("range of {len} bytes at offset {} leaves the heap of {size}", offset.0)]
    OutOfBounds {
        /// Start of the range.
        offset: SymOffset,
        /// Bytes of the range.
        len: usize,
        /// The heap.
        size: HeapSize,
    },
    /// A word that the heap does not have.
    #[error("no word {} in the heap of {size}", word.0)]
    NoSuchWord {
        /// The word.
        word: SymWord,
        /// The heap.
        size: HeapSize,
    },
    /// A rank outside the group.
    #[error("no {rank} in a group of {world_size}")]
    NoSuchRank {
        /// The rank.
        rank: Rank,
        /// Ranks in the group.
        world_size: usize,
    },
    /// An operation that works only inside a node was asked of a rank on another.
    #[error("{rank} is on another node, atomic operations work inside a node only")]
    OtherNode {
        /// The rank.
        rank: Rank,
    },
    /// Two threads of one rank were in collectives at once.
    #[error("{operation} called while another collective of this rank is running")]
    Overlapping {
        /// The collective that came second.
        operation: Collective,
    },
    /// The group went on without this rank, which did not come to its shrink in time.
    #[error("the group shrank without {rank} (decided by {by})")]
    Excluded {
        /// This rank.
        rank: Rank,
        /// Whose proposal held.
        by: Rank,
    },
    /// The group was shrunk; its ranks are in the new one.
    #[error("this group was shrunk")]
    Superseded,
    /// The transport ends with the first rank that is lost.
    #[error("groups over this transport cannot go on without a rank")]
    FailStop,
    /// Ranks that cannot be spread evenly over nodes.
    #[error("{world_size} ranks cannot be spread evenly over nodes of {ranks_per_node}")]
    Topology {
        /// Ranks in the group.
        world_size: usize,
        /// Ranks on each node.
        ranks_per_node: usize,
    },
    /// Nodes that are larger than what the machines of an MPI job run.
    #[error("{ranks} ranks on nodes as asked for do not fit machines that run {hosts:?} ranks")]
    Placement {
        /// Ranks in the group.
        ranks: usize,
        /// Ranks of the job on each machine.
        hosts: Vec<usize>,
    },
    /// MPI cannot be used.
    #[error("MPI: {what}")]
    Mpi {
        /// Why.
        what: String,
    },
    /// The operating system refused a thread for a rank.
    #[error("no thread for {rank}: {kind}")]
    Spawn {
        /// The rank.
        rank: Rank,
        /// What the system said.
        kind: std::io::ErrorKind,
    },
    /// Processes did not become a group.
    #[error("rendezvous at {address}: {reason}")]
    Rendezvous {
        /// Where.
        address: std::net::SocketAddr,
        /// Why not.
        reason: RendezvousError,
    },
    /// The operating system refused what a group needs to exist.
    #[error("no {what}: {kind}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// What the system said.
        kind: std::io::ErrorKind,
    },
}

impl TransportError {
    /// The rank that is silent or gone, if that is what happened.
    pub fn lost_rank(&self) -> Option<Rank> {
        match self {
            TransportError::PeerLost { rank, .. } => Some(*rank),
            _ => None,
        }
    }

    /// What turns an error of the operating system that was asked for `what` into one of this type.
    pub(crate) fn system(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |error| TransportError::System { what, kind: error.kind() }
    }

    /// The error as a stage of the pipeline reports it, with this error as its source. `round` is the sequence
    /// number of the round on the caller's handle (0 while it is being built).
    pub fn into_core(self, stage: Stage, backend: &'static str, round: u64) -> Error {
        let kind = match &self {
            TransportError::PeerLost { rank, .. } => ErrorKind::PeerLost { rank: *rank, round },
            TransportError::Mismatch { field, mine, theirs, rank } => {
                let (field, mine, theirs) = ((*field).to_owned(), mine.clone(), theirs.clone());
                ErrorKind::Mismatch(Box::new(Mismatch { field, mine, theirs, rank: *rank }))
            }
            TransportError::OutOfMemory { bytes, .. } => ErrorKind::OutOfMemory { bytes: *bytes },
            TransportError::OutOfBounds { .. }
            | TransportError::NoSuchWord { .. }
            | TransportError::NoSuchRank { .. }
            | TransportError::OtherNode { .. }
            | TransportError::Superseded
            | TransportError::Overlapping { .. } => ErrorKind::Contract,
            TransportError::Topology { .. }
            | TransportError::Excluded { .. }
            | TransportError::FailStop
            | TransportError::Placement { .. }
            | TransportError::Mpi { .. }
            | TransportError::Spawn { .. }
            | TransportError::Rendezvous { .. }
            | TransportError::System { .. } => ErrorKind::Other,
        };
        Error::new(kind, stage, backend).caused_by(self)
    }
}

/// Result of a transport operation.
pub type Result<T, E = TransportError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_peer_keeps_its_rank_and_gets_the_round() {
        let awaited = Awaited::Signal { word: SymWord(5), until: Until::Ge(3), last_seen: 2 };
        let lost = TransportError::PeerLost { rank: Rank(7), awaited, silence: Silence::Deadline };
        assert_eq!(
            lost.to_string(),
            "rank 7 did not answer by the deadline (signal word 5 is 2, awaited >= 3)"
        );
        assert_eq!(lost.lost_rank(), Some(Rank(7)));
        let core = lost.into_core(Stage::Combine, "naive", 41);
        assert_eq!(core.kind, ErrorKind::PeerLost { rank: Rank(7), round: 41 });
        assert!(std::error::Error::source(&core).is_some());
    }

    #[test]
    fn misuse_is_a_broken_contract() {
        let size = HeapSize { bytes: 8, words: 0 };
        let error = TransportError::OutOfBounds { offset: SymOffset(4), len: 8, size };
        assert_eq!(error.to_string(), "range of 8 bytes at offset 4 leaves the heap of 8 bytes and 0 words");
        assert_eq!(error.into_core(Stage::Combine, "naive", 0).kind, ErrorKind::Contract);
    }
}
