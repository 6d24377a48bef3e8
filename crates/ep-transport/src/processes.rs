//! Ranks as processes of one machine.
//!
//! Memory is in anonymous files that all ranks map; it vanishes with the last of them, however they end. Signals and
//! waits are those of threads. A rank that dies is noticed at once, as the kernel tells; a rank that is merely stopped,
//! at the deadline.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use ep_transport::{Deadline, Endpoint, ProcessOptions, Rendezvous, Token, join_processes};
//! use fused_moe_core::Rank;
//!
//! // Whoever starts the ranks holds the rendezvous, and tells them where it is, the token, and which rank they are.
//! let token = Token::random()?;
//! let rendezvous = Rendezvous::bind(([127, 0, 0, 1], 0).into(), 8, None, token)?;
//! let address = rendezvous.address();
//! std::thread::spawn(move || rendezvous.serve(Deadline::after(Duration::from_secs(60))));
//!
//! // In each of them:
//! # let rank = Rank(0);
//! let transport = join_processes(&ProcessOptions {
//!     rank,
//!     world_size: 8,
//!     ranks_per_node: None,
//!     rendezvous: address,
//!     token,
//!     timeout: Duration::from_secs(30),
//! })?;
//! let group = Endpoint::new(transport);
//! # Ok::<(), ep_transport::TransportError>(())
//! ```

mod memory;
mod rendezvous;
mod token;
mod vars;
mod watch;
mod wire;

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use fused_moe_core::Rank;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::deadline::Deadline;
use crate::error::{RendezvousError, Result, TransportError};
use crate::shared::{Group, SharedRank, Topology};
use memory::Processes;
pub use rendezvous::Rendezvous;
use rendezvous::limited;
pub use token::{NoToken, Token};
pub use vars::BadVariable;
use wire::{Answer, Hello, VERSION};

/// Between two attempts to reach a rendezvous that may not have been opened yet.
const RETRY: Duration = Duration::from_millis(10);

/// How a process joins a group.
#[derive(Clone, Copy, Debug)]
pub struct ProcessOptions {
    /// Which rank it is to be.
    pub rank: Rank,
    /// Ranks in the group.
    pub world_size: usize,
    /// Ranks on each simulated node, a divisor of the world size; `None` is one node for all.
    pub ranks_per_node: Option<NonZeroUsize>,
    /// Where the group's [`Rendezvous`] is.
    pub rendezvous: SocketAddr,
    /// The group's secret.
    pub token: Token,
    /// The group's [`timeout`](crate::Transport::timeout), and how long joining may take.
    pub timeout: Duration,
}

/// Joins a group of processes of this machine; returns when all of them have.
///
/// The rank has left when the transport and all heaps made from it are dropped, or when the process ends.
///
/// # Errors
/// [`TransportError::Topology`] if the ranks do not fill their nodes; [`TransportError::Rendezvous`] if the rendezvous
/// cannot be reached by the timeout, refuses this rank, or a rank does not come; [`TransportError::System`] if the
/// system refuses what a group needs.
pub fn join_processes(options: &ProcessOptions) -> Result<Arc<SharedRank>> {
    let topology = Topology::new(options.world_size, options.ranks_per_node)?;
    let deadline = Deadline::after(options.timeout);
    let hello = Hello {
        version: VERSION,
        token: options.token,
        rank: options.rank,
        world_size: topology.world_size as u32,
        ranks_per_node: topology.ranks_per_node as u32,
        pid: std::process::id(),
    };
    let refused = |reason| TransportError::Rendezvous { address: options.rendezvous, reason };
    let broken_off = |error: io::Error| refused(RendezvousError::BrokenOff(error.kind()));

    let mut stream =
        connect(options.rendezvous, deadline).map_err(|kind| refused(RendezvousError::Address(kind)))?;
    let said = limited(&stream, deadline).and_then(|()| stream.write_all(&hello.encode()));
    said.map_err(broken_off)?;
    let (control, pids) = match Answer::read(&mut stream, &hello).map_err(broken_off)? {
        Answer::Welcome { control, pids } => (control, pids),
        Answer::Refused(reason) => return Err(refused(reason)),
        Answer::Start => return Err(broken_off(ErrorKind::InvalidData.into())),
    };
    let control =
        control.open().map_err(TransportError::system("access to the memory of other processes"))?;
    let joined = join(options, topology, control, &pids)?;
    let said = limited(&stream, deadline).and_then(|()| stream.write_all(&[1]));
    said.map_err(broken_off)?;
    match Answer::read(&mut stream, &hello).map_err(broken_off)? {
        Answer::Start => {
            tracing::debug!(
                rank = options.rank.0,
                world_size = topology.world_size,
                "joined a group of processes"
            );
            Ok(joined)
        }
        Answer::Refused(reason) => Err(refused(reason)),
        Answer::Welcome { .. } => Err(broken_off(ErrorKind::InvalidData.into())),
    }
}

fn connect(address: SocketAddr, deadline: Deadline) -> Result<TcpStream, ErrorKind> {
    let mut failed = ErrorKind::TimedOut;
    while let Some(left) = deadline.remaining() {
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            // It may not be open yet.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => failed = error.kind(),
            Err(error) => return Err(error.kind()),
        }
        std::thread::sleep(RETRY.min(left));
    }
    Err(failed)
}

/// This rank of the group that meets in `control`.
fn join(
    options: &ProcessOptions,
    topology: Topology,
    control: File,
    pids: &[u32],
) -> Result<Arc<SharedRank>> {
    let descriptor = |pid: &u32| -> io::Result<OwnedFd> {
        let pid = i32::try_from(*pid).ok().and_then(Pid::from_raw).ok_or(ErrorKind::InvalidData)?;
        Ok(pidfd_open(pid, PidfdFlags::empty())?)
    };
    let pidfds = pids.iter().map(descriptor).collect::<io::Result<_>>();
    let pidfds = pidfds.map_err(TransportError::system("access to the processes of other ranks"))?;
    let processes = Processes::new(control, Group::control_size(topology), pidfds);
    let group = Group::new(Arc::new(processes), topology, options.timeout);
    let joined = group.and_then(|group| SharedRank::new(Arc::new(group), options.rank));
    joined.map(Arc::new).map_err(TransportError::system("memory for a group"))
}
