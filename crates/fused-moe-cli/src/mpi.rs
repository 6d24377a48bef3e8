//! Ranks of an MPI job: `mpirun` starts this program once per rank, with the same arguments.

use std::num::NonZeroUsize;
use std::time::Duration;

use fused_moe::transport::{Endpoint, MpiOptions, MpiWorld, TransportError};

use crate::exit::{Failure, OrFailure, refused};

/// This rank in its job.
#[derive(Debug)]
pub struct Job {
    world: MpiWorld,
    timeout: Duration,
}

impl Job {
    /// Joins the job. `timeout` is that of every wait of its ranks for each other.
    pub fn join(timeout: Duration) -> Result<Self, Failure> {
        Ok(Self { world: MpiWorld::init(timeout).or_failed()?, timeout })
    }

    /// Whether this rank is the one that reports: rank 0, of the job and of each of its groups.
    pub fn reports(&self) -> bool {
        self.world.rank() == 0
    }

    /// The group of all ranks, which have to be `ranks`, `ranks_per_node` of them on each node.
    pub fn everyone(&self, ranks: usize, ranks_per_node: usize) -> Result<Endpoint, Failure> {
        match self.group(ranks, ranks_per_node) {
            Ok(Some(group)) if ranks == self.world.size() => Ok(group),
            Err(error) => Err(error).or_refused(),
            Ok(_) => refused(format!(
                "--ep-size {ranks} in a job of {} ranks: start it with `mpirun -np {ranks}`",
                self.world.size()
            )),
        }
    }

    /// A group of `ranks` ranks; `None` on those that are not in it. All ranks of the job call it.
    pub fn group(&self, ranks: usize, ranks_per_node: usize) -> Result<Option<Endpoint>, TransportError> {
        let [ranks, ranks_per_node] = [ranks, ranks_per_node].map(NonZeroUsize::new);
        let options = MpiOptions { ranks, ranks_per_node, timeout: self.timeout };
        Ok(self.world.group(options)?.map(|rank| Endpoint::new(rank)))
    }

    /// What becomes on this rank of what all ranks have `done` alike: a failure is that of the rank that reports, and the others
    /// have nothing to add. They must not end with its exit code either, as `mpirun` kills the rest of the job at the
    /// first that does, maybe before it has been told.
    pub fn told_once<T>(&self, done: Result<T, Failure>) -> Result<Option<T>, Failure> {
        match done {
            Err(_) if !self.reports() => Ok(None),
            done => done.map(Some),
        }
    }
}
