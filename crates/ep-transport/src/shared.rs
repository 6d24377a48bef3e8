//! Groups whose ranks share memory, be they threads of one process or processes of one machine.
//!
//! All memory is reachable by loads and stores, so puts are copies made by the caller and are complete when they
//! return. A node boundary can be simulated: ranks on different "nodes" then get no
//! [`peer_ptr`](crate::Heap::peer_ptr) and no [`atomic_fetch_add`](crate::Heap::atomic_fetch_add), as between
//! machines.
//!
//! What ranks share lies in segments: one control segment with a seat per rank, and one segment per rank and heap.
//! How a segment gets from one rank to the others is all that threads and processes do differently
//! ([`Substrate`](substrate::Substrate)).

mod group;
mod heap;
mod rank;
mod seat;
mod shrink;
mod substrate;

pub(crate) use group::{Group, Topology};
pub use rank::SharedRank;
pub(crate) use seat::Absence;
pub(crate) use substrate::{Offer, Substrate};
