//! What expert-parallel ranks move bytes with: groups, symmetric heaps, puts and signals, shaped like OpenSHMEM.
//!
//! This crate is below the comm backends (stages 2 and 4). A backend asks its process group for the
//! [`Transport`], allocates one [`Heap`] laid out with [`HeapLayout`], and then works with
//! [`put_signal`](Heap::put_signal) and [`signal_wait_until`](Heap::signal_wait_until) alone: signals are SET with
//! an epoch, every wait has a [`Deadline`], and every byte is counted ([`Traffic`]).
//!
//! ```
//! use ep_transport::{HeapLayout, Payload, Signal, ThreadOptions, Until, run_ranks, transport_of};
//! use fused_moe_core::Rank;
//!
//! // Two ranks; each greets the other.
//! let greetings = run_ranks(2, ThreadOptions::default(), |group| -> ep_transport::Result<u8> {
//!     let transport = transport_of(&group).expect("an endpoint has a transport");
//!     let mut layout = HeapLayout::default();
//!     let (row, arrived) = (layout.region(1), layout.words(1));
//!     let heap = transport.allocate(layout.size(), transport.deadline())?;
//!     let (me, peer) = (transport.rank().0, Rank(1 - transport.rank().0));
//!     let greeting = [10 + me as u8];
//!     // SAFETY: only this rank writes the peer's row, once, and the peer reads it after the signal.
//!     unsafe {
//!         heap.put_signal(
//!             peer,
//!             Payload { offset: row, bytes: &greeting },
//!             Signal { word: arrived, value: 1 },
//!         )?;
//!     }
//!     heap.signal_wait_until(arrived, Until::Eq(1), peer, transport.deadline())?;
//!     // SAFETY: the peer's only write is ordered before the signal.
//!     let received = unsafe { heap.local(row, 1)? }[0];
//!     heap.quiet(transport.deadline())?;
//!     Ok(received)
//! })?;
//! assert_eq!(greetings, [Ok(11), Ok(10)]);
//! # Ok::<(), ep_transport::TransportError>(())
//! ```
//!
//! Ranks are [threads of one process](ThreadGroup) or, on Linux, [processes of one machine](join_processes), or with
//! feature `mpi` processes of an MPI job (`MpiWorld`) on any number of machines; all of them can pretend to be on more
//! nodes than they are. No operation needs a peer's memory to be mapped, and the atomic ones are confined to a node. A
//! group of threads or processes that lost ranks goes on without them by [`shrink`](Transport::shrink). There is no
//! network engine here, and no device memory.

mod chunk;
mod cursor;
mod deadline;
mod doorbell;
mod endpoint;
mod error;
mod handshake;
mod heap;
#[cfg(feature = "mpi")]
mod mpi;
mod poison;
pub mod probe;
#[cfg(target_os = "linux")]
mod processes;
mod segment;
mod shared;
mod status;
mod streaming;
mod symmetric;
mod threads;
mod traffic;
mod transport;

pub use endpoint::{Endpoint, transport_of};
pub use transport::{Collective, Shrunk, Transport};

pub use symmetric::{HEAP_ALIGN, HeapLayout, HeapSize, REGION_ALIGN, SymOffset, SymWord};

pub use chunk::Chunk;
pub use cursor::RowCursor;
pub use deadline::Deadline;
pub use error::{Awaited, RendezvousError, Result, Silence, TransportError};
pub use heap::{Heap, Payload, Signal, Until};
pub use status::{Status, StatusBoard};
pub use streaming::copy_streaming;
pub use traffic::Traffic;

#[cfg(feature = "mpi")]
pub use mpi::{MpiOptions, MpiRank, MpiWorld};
pub use poison::{POISON, Poisoned};
#[cfg(target_os = "linux")]
pub use processes::{BadVariable, NoToken, ProcessOptions, Rendezvous, Token, join_processes};
pub use shared::SharedRank;
pub use threads::{ThreadGroup, ThreadOptions, run_ranks};
