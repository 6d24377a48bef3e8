//! The expert-parallel group as the core sees it: who we are, and a way to compare notes before building.

use std::any::Any;

use crate::error::{Mismatch, Result};
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

/// Compares named values over all ranks: the first difference from this rank's own, `None` if there is none.
/// Collective; where one rank sees a difference, every rank sees one. Values have no line breaks.
///
/// # Errors
/// As [`ProcessGroup::all_gather`].
pub fn first_mismatch(
    group: &dyn ProcessGroup,
    fields: &[(&'static str, String)],
) -> Result<Option<Mismatch>> {
    let mine: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let all = group.all_gather(mine.join("\n").as_bytes())?;
    for (rank, theirs) in all.iter().enumerate() {
        let theirs = String::from_utf8_lossy(theirs);
        let mut theirs = theirs.lines();
        for (name, value) in fields {
            let line = theirs.next().unwrap_or("");
            let other = line.strip_prefix(name).and_then(|l| l.strip_prefix('='));
            if other != Some(value) {
                return Ok(Some(Mismatch {
                    field: (*name).to_string(),
                    mine: value.clone(),
                    theirs: other.unwrap_or(line).to_string(),
                    rank: Rank(rank as u32),
                }));
            }
        }
    }
    Ok(None)
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
