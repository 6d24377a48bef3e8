//! The whole job, and the groups made of its ranks.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fused_moe_core::Rank;

use super::MpiOptions;
use super::comm::Comm;
use super::placement;
use super::rank::{Group, MpiRank};
use super::session::{Remains, Session};
use super::watchdog::Wait;
use crate::error::{Awaited, Result, TransportError};
use crate::transport::Collective;

/// This process in an MPI job.
///
/// Dropping it, once all groups and heaps are gone as well, ends MPI for this process, which waits for the others.
#[derive(Debug)]
pub struct MpiWorld {
    session: Arc<Session>,
    comm: Comm,
    hosts: Vec<Vec<usize>>,
    /// Groups made so far, counted alike on all ranks.
    groups: AtomicU64,
    /// Groups are made one at a time.
    making: Mutex<()>,
}

impl MpiWorld {
    /// Joins the job that this process was started in; alone, if `mpirun` did not start it. All ranks call it, once.
    /// `timeout` bounds what the whole job does together, here and when groups are made and taken down.
    ///
    /// # Errors
    /// [`TransportError::Mpi`] if MPI has been initialised before in this process, or cannot be called from threads.
    pub fn init(timeout: Duration) -> Result<Self> {
        let session = Arc::new(Session::start(timeout)?);
        let wait = together(&session, 0);
        let comm = session.call(wait, Comm::world);
        let machine = session.call(wait, || comm.machine());
        let mine = (comm.rank() as u64).to_le_bytes();
        let on_machine = machine.swap(&session, wait, &mine, &vec![mine.len(); machine.size()]);
        let firsts = comm.swap(&session, wait, &on_machine[0], &vec![mine.len(); comm.size()]);
        session.call(wait, || machine.free());
        let firsts: Vec<usize> = firsts.iter().map(|first| numbers(first)[0] as usize).collect();
        let hosts = placement::hosts(&firsts);
        tracing::debug!(rank = comm.rank(), ranks = comm.size(), machines = hosts.len(), "joined an MPI job");
        Ok(Self { session, comm, hosts, groups: AtomicU64::new(1), making: Mutex::default() })
    }

    /// Number of this rank in the job, as `mpirun` gave it. Groups number by node.
    pub fn rank(&self) -> usize {
        self.comm.rank()
    }

    /// Ranks in the job.
    pub fn size(&self) -> usize {
        self.comm.size()
    }

    /// Ranks on each machine.
    pub fn ranks_per_host(&self) -> Vec<usize> {
        self.hosts.iter().map(Vec::len).collect()
    }

    /// Makes a group of ranks of the job; `None` on a rank that is not in it. Rank 0 of the job is rank 0 of
    /// every group. All ranks call it, with the same options and in the same order.
    ///
    /// # Errors
    /// On all ranks alike: [`TransportError::Topology`] if the ranks do not fill their nodes,
    /// [`TransportError::Placement`] if the machines do not run enough ranks each,
    /// [`TransportError::Mismatch`] if the ranks have different options.
    pub fn group(&self, options: MpiOptions) -> Result<Option<Arc<MpiRank>>> {
        let _making = self.making.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let number = self.groups.fetch_add(1, Ordering::Relaxed);
        let wait = together(&self.session, number);
        self.agree(options, wait)?;

        let ranks = options.ranks.map_or(self.comm.size(), NonZeroUsize::get);
        let placed = || TransportError::Placement { ranks, hosts: self.ranks_per_host() };
        let ranks_per_node = match options.ranks_per_node {
            Some(asked) => asked.get(),
            None if ranks == self.comm.size() => placement::even(&self.hosts).ok_or_else(placed)?,
            None => ranks,
        };
        if !ranks.is_multiple_of(ranks_per_node) {
            return Err(TransportError::Topology { world_size: ranks, ranks_per_node });
        }
        let chosen = placement::place(&self.hosts, ranks, ranks_per_node).ok_or_else(placed)?;
        let mine = chosen.iter().position(|&rank| rank == self.comm.rank());
        let comm = self.session.call(wait, || self.comm.split(mine.map(|_| 0), mine.unwrap_or(0)));
        let (Some(comm), Some(mine)) = (comm, mine) else {
            self.session.leave(number, Remains::default());
            return Ok(None);
        };
        let node = self.session.call(wait, || comm.split(Some(mine / ranks_per_node), mine));
        let node = node.ok_or_else(placed)?;
        tracing::debug!(rank = mine, ranks, ranks_per_node, "new group of MPI ranks");
        let crowded = self.hosts.iter().map(Vec::len).max()
            > std::thread::available_parallelism().ok().map(NonZeroUsize::get);
        let group = Group::new(Arc::clone(&self.session), number, [comm, node], (options.timeout, crowded));
        Ok(Some(Arc::new(MpiRank::new(group))))
    }

    /// Compares options, and takes down the groups that all ranks have left.
    fn agree(&self, options: MpiOptions, wait: Wait) -> Result<()> {
        let text = format!("{options:?}");
        let mut mine = (text.len() as u64).to_le_bytes().to_vec();
        mine.extend(text.as_bytes());
        mine.extend(self.session.left().iter().flat_map(|number| number.to_le_bytes()));
        let lens = self.comm.swap(
            &self.session,
            wait,
            &(mine.len() as u64).to_le_bytes(),
            &vec![8; self.comm.size()],
        );
        let lens: Vec<usize> = lens.iter().map(|len| numbers(len)[0] as usize).collect();
        let all = self.comm.swap(&self.session, wait, &mine, &lens);
        let parts = all.iter().map(|bytes| {
            let (len, rest) = bytes.split_at(8);
            rest.split_at(numbers(len)[0] as usize)
        });
        let (texts, left): (Vec<_>, Vec<_>) = parts.unzip();
        let everywhere = |number: &u64| left.iter().all(|left| numbers(left).contains(number));
        self.session.take_down(self.session.left().into_iter().filter(everywhere));
        match (0_u32..).zip(&texts).find(|(_, theirs)| **theirs != text.as_bytes()) {
            None => Ok(()),
            Some((rank, theirs)) => Err(TransportError::Mismatch {
                field: "MPI options",
                mine: text,
                theirs: String::from_utf8_lossy(theirs).into_owned(),
                rank: Rank(rank),
            }),
        }
    }
}

/// A wait for the whole job.
fn together(session: &Session, number: u64) -> Wait {
    let awaited = Awaited::Collective(Collective::Split);
    Wait { collective: Some(number), ..Wait::new(Rank(0), awaited, session.deadline()) }
}

/// Numbers that were sent as 8 bytes each.
pub(super) fn numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|&number| u64::from_le_bytes(number)).collect()
}
