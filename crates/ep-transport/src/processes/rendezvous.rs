//! How processes that know nothing but an address and a token become a group.
//!
//! Each rank says who it is. When all are there, each gets the control file and the processes of the others; when
//! each has them, all may start. The connections are closed then: a group needs no coordinator.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Duration;

use fused_moe_core::Rank;

use super::memory::{FileAddress, address_of, control_bytes, create_file};
use super::token::Token;
use super::wire::{Answer, Hello};
use crate::deadline::Deadline;
use crate::error::{RendezvousError, Result, TransportError};
use crate::shared::{Group, Topology};

/// Between two looks at who has come.
const LOOK: Duration = Duration::from_millis(1);

/// A place where the ranks of one group meet, once. Whoever starts the ranks holds it, or the program of rank 0.
#[derive(Debug)]
pub struct Rendezvous {
    listener: TcpListener,
    address: SocketAddr,
    topology: Topology,
    token: Token,
}

/// A rank that has come.
struct Guest {
    rank: Rank,
    stream: TcpStream,
    pid: u32,
}

impl Guest {
    /// Says `bytes`; the error is who could not be told.
    fn say(&mut self, bytes: &[u8], deadline: Deadline) -> Result<(), Rank> {
        let said = limited(&self.stream, deadline).and_then(|()| self.stream.write_all(bytes));
        said.map_err(|_| self.rank)
    }

    /// Waits for word that it is ready; the error is who is not.
    fn hear(&mut self, deadline: Deadline) -> Result<(), Rank> {
        let heard = limited(&self.stream, deadline).and_then(|()| self.stream.read_exact(&mut [0]));
        heard.map_err(|_| self.rank)
    }

    /// Whether it has hung up.
    fn is_gone(&self) -> bool {
        match self.stream.peek(&mut [0]) {
            Ok(read) => read == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
}

/// Makes `stream` block, until `deadline` at most.
pub(super) fn limited(stream: &TcpStream, deadline: Deadline) -> io::Result<()> {
    let left = deadline.remaining().ok_or(ErrorKind::TimedOut)?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))
}

impl Rendezvous {
    /// Listens at `address`, which should be of the loopback interface (port 0 is any free port), for `world_size`
    /// ranks that know `token`.
    ///
    /// # Errors
    /// [`TransportError::Topology`] if the ranks do not fill their nodes, [`TransportError::Rendezvous`] if the address
    /// cannot be had.
    pub fn bind(
        address: SocketAddr,
        world_size: usize,
        ranks_per_node: Option<NonZeroUsize>,
        token: Token,
    ) -> Result<Self> {
        let topology = Topology::new(world_size, ranks_per_node)?;
        let bound = || -> io::Result<_> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = bound().map_err(|error| TransportError::Rendezvous {
            address,
            reason: RendezvousError::Address(error.kind()),
        })?;
        Ok(Self { listener, address, topology, token })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until all ranks have come and lets them start. Who does not know the token is sent away.
    ///
    /// # Errors
    /// [`TransportError::Rendezvous`] if a rank does not come by the deadline, or is lost before all may start. Those
    /// that came get the same error. [`TransportError::System`] if there is no memory for the group.
    pub fn serve(self, deadline: Deadline) -> Result<()> {
        let size = Group::control_size(self.topology);
        let created = || -> io::Result<(OwnedFd, FileAddress)> {
            let file = create_file(control_bytes(size))?;
            let address = address_of(&file)?;
            Ok((file, address))
        };
        let (_file, control) = created().map_err(TransportError::system("memory for a group"))?;
        let mut guests = self.gather(deadline)?;
        let pids: Vec<u32> = guests.iter().map(|guest| guest.pid).collect();
        let welcome = Answer::Welcome { control, pids }.encode();
        let started = guests
            .iter_mut()
            .try_for_each(|guest| guest.say(&welcome, deadline))
            .and_then(|()| guests.iter_mut().try_for_each(|guest| guest.hear(deadline)));
        match started {
            Ok(()) => {
                guests.iter_mut().for_each(|guest| {
                    // One that is lost now is lost to a group that exists, which notices by itself.
                    let _ = guest.say(&Answer::Start.encode(), deadline);
                });
                Ok(())
            }
            Err(rank) => Err(self.dismiss(guests.iter_mut(), rank)),
        }
    }

    /// Receives ranks until all are there, in rank order.
    fn gather(&self, deadline: Deadline) -> Result<Vec<Guest>> {
        let mut guests: Vec<Option<Guest>> = (0..self.topology.world_size).map(|_| None).collect();
        let mut strangers: Vec<(TcpStream, Vec<u8>)> = Vec::new();
        loop {
            // An error of `accept` is the connection's, not the listener's, or passes.
            while let Ok((stream, _)) = self.listener.accept() {
                if stream.set_nonblocking(true).is_ok() {
                    strangers.push((stream, Vec::new()));
                }
            }
            strangers = strangers.into_iter().filter_map(|it| self.receive(it, &mut guests)).collect();
            let gone = (0_u32..)
                .map(Rank)
                .zip(&guests)
                .find(|(_, guest)| guest.as_ref().is_some_and(Guest::is_gone));
            if let Some((rank, _)) = gone {
                return Err(self.dismiss(guests.iter_mut().flatten(), rank));
            }
            let missing = (0_u32..).map(Rank).zip(&guests).find(|(_, guest)| guest.is_none());
            match missing {
                None => return Ok(guests.into_iter().flatten().collect()),
                Some((rank, _)) if deadline.remaining().is_none() => {
                    return Err(self.dismiss(guests.iter_mut().flatten(), rank));
                }
                Some(_) => std::thread::sleep(LOOK),
            }
        }
    }

    /// Reads on what a stranger says: gives him back if he has not finished, else lets him in or sends him away.
    fn receive(
        &self,
        (mut stream, mut said): (TcpStream, Vec<u8>),
        guests: &mut [Option<Guest>],
    ) -> Option<(TcpStream, Vec<u8>)> {
        let mut bytes = [0; Hello::BYTES];
        let wanted = Hello::BYTES - said.len();
        match stream.read(&mut bytes[..wanted]) {
            Ok(0) => return None,
            Ok(read) => said.extend(&bytes[..read]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return None,
        }
        if said.len() < Hello::BYTES {
            return Some((stream, said));
        }
        let hello = Hello::decode(&said)?;
        let refusal = hello
            .refused_by(self.topology, &self.token)
            .or_else(|| guests[hello.rank.index()].is_some().then_some(RendezvousError::Taken(hello.rank)));
        match refusal {
            None => guests[hello.rank.index()] = Some(Guest { rank: hello.rank, stream, pid: hello.pid }),
            Some(reason) => {
                tracing::warn!(rank = hello.rank.0, %reason, "sent a process away");
                // Whoever is sent away may have hung up already.
                let _ = stream.write_all(&Answer::Refused(reason).encode());
            }
        }
        None
    }

    /// Tells the ranks that are there that there will be no group without `rank`.
    fn dismiss<'g>(&self, guests: impl Iterator<Item = &'g mut Guest>, rank: Rank) -> TransportError {
        let reason = RendezvousError::Missing(rank);
        let answer = Answer::Refused(reason.clone()).encode();
        guests.for_each(|guest| {
            // A lost one cannot hear it.
            let _ = guest.say(&answer, Deadline::after(Duration::from_secs(1)));
        });
        TransportError::Rendezvous { address: self.address, reason }
    }
}
