//! The expert-parallel group as the core sees it: who we are, and a way to compare notes before building.

use std::any::Any;

use crate::error::Result;
use crate::placement::Rank;

/// One rank's membership in an expert-parallel group.
///
/// The core uses a group only to agree on a plan. A comm backend asks it for what it moves bytes with by
/// downcasting [`ProcessGroup::as_any`] to the transport it was written for, and refuses others.
pub trait ProcessGroup: Send + Sync {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Gives `mine` to every rank and returns what all of them gave, in rank order. Collective.
    ///
    /// # Errors
    /// [`crate::ErrorKind::PeerLost`] if a rank does not take part by the group's deadline.
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// The concrete group.
    fn as_any(&self) -> &dyn Any;
}

/// The group of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl ProcessGroup for SingleRank {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine.to_vec()])
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
