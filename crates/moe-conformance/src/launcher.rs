//! What a rank is while a case runs: a thread, or a process that runs the whole suite beside its peers.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ep_transport::{Endpoint, ThreadOptions, TransportError, run_ranks};
use fused_moe_core::{Axis, ProcessGroup, Unsupported};

use crate::outcome::{Check, Outcome, fail, panic_text};

/// The group that a case needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    /// Ranks in the group.
    pub ranks: usize,
    /// Ranks on each node, a divisor of `ranks`.
    pub ranks_per_node: usize,
    /// Timeout of the group.
    pub timeout: Duration,
}

/// Runs something on every rank of a group and gathers what it gives.
///
/// Where ranks are processes, every one of them runs the same cases in the same order, and each gets the same
/// answer from [`launch`](Launcher::launch).
pub trait Launcher: Send + Sync + std::fmt::Debug {
    /// Runs `body` on every rank of a new group and returns what it returned on each, in rank order.
    ///
    /// # Errors
    /// [`Outcome::Refused`] if there can be no such group, [`Outcome::Fail`] if something went wrong.
    fn launch(
        &self,
        spec: GroupSpec,
        body: &(dyn Fn(Endpoint) -> Vec<u8> + Sync),
    ) -> Result<Vec<Vec<u8>>, Outcome>;

    /// Why there can be no such group, where that is known already: asked before a case is prepared at length.
    fn refusal(&self, _spec: GroupSpec) -> Option<Outcome> {
        None
    }

    /// Whether this process checks what was gathered. Where every rank gathers the same, one of them is enough.
    fn is_judge(&self) -> bool {
        true
    }

    /// Whether all ranks are threads of this process. Cases in which ranks meet outside their group need it.
    fn is_one_process(&self) -> bool;
}

/// Ranks that are threads of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Threads;

impl Launcher for Threads {
    fn launch(
        &self,
        spec: GroupSpec,
        body: &(dyn Fn(Endpoint) -> Vec<u8> + Sync),
    ) -> Result<Vec<Vec<u8>>, Outcome> {
        let ranks_per_node = NonZeroUsize::new(spec.ranks_per_node);
        let options = ThreadOptions { ranks_per_node, timeout: spec.timeout };
        run_ranks(spec.ranks, options, body).or_else(fail)
    }

    fn is_one_process(&self) -> bool {
        true
    }
}

/// Ranks that exist already, each running this program.
///
/// `world` is this rank among all of them, with a timeout beyond any case. `split` makes a group of some of them: it
/// is called by all at the same time, gives the endpoint to those inside and `None` to the others.
pub struct Spmd<S> {
    world: Endpoint,
    split: S,
    /// Ranks, and ranks per node, of groups that there cannot be.
    refused: Mutex<BTreeSet<[usize; 2]>>,
}

impl<S> Spmd<S>
where
    S: Fn(GroupSpec) -> ep_transport::Result<Option<Endpoint>> + Send + Sync,
{
    /// The launcher over `world`.
    pub fn new(world: Endpoint, split: S) -> Self {
        Self { world, split, refused: Mutex::default() }
    }

    fn refused(&self) -> MutexGuard<'_, BTreeSet<[usize; 2]>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn no_room(&self, spec: GroupSpec) -> Outcome {
        let wanted = format!("{} ranks on nodes of {}", spec.ranks, spec.ranks_per_node);
        let offered = format!("what fits into {} ranks as they are placed", self.world.world_size());
        Outcome::Refused(vec![Unsupported::new(Axis::Parallel, wanted, offered)])
    }
}

impl<S> std::fmt::Debug for Spmd<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spmd").field("world", &self.world).finish_non_exhaustive()
    }
}

impl<S> Launcher for Spmd<S>
where
    S: Fn(GroupSpec) -> ep_transport::Result<Option<Endpoint>> + Send + Sync,
{
    fn launch(
        &self,
        spec: GroupSpec,
        body: &(dyn Fn(Endpoint) -> Vec<u8> + Sync),
    ) -> Result<Vec<Vec<u8>>, Outcome> {
        let group = match (self.split)(spec) {
            Ok(group) => group,
            Err(TransportError::Topology { .. } | TransportError::Placement { .. }) => {
                self.refused().insert([spec.ranks, spec.ranks_per_node]);
                return Err(self.no_room(spec));
            }
            Err(error) => return fail(error),
        };
        // A panic must not keep this rank from telling the others; they may have given it up by then.
        let mine = group.map(|group| {
            let rank = group.rank();
            let returned = catch_unwind(AssertUnwindSafe(|| body(group)));
            (rank, returned.unwrap_or_else(|panic| encode::<()>(fail(panic_text(&*panic)))))
        });
        let posted = mine.map_or(Vec::new(), |(rank, bytes)| [&rank.0.to_le_bytes()[..], &bytes].concat());
        let gathered = self.world.all_gather(&posted).or_else(fail)?;
        let parts = gathered.iter().filter_map(|posted| posted.split_first_chunk::<4>());
        let mut parts: Vec<_> = parts.map(|(rank, bytes)| (u32::from_le_bytes(*rank), bytes)).collect();
        parts.sort_by_key(|(rank, _)| *rank);
        match parts.len() == spec.ranks {
            true => Ok(parts.into_iter().map(|(_, bytes)| bytes.to_vec()).collect()),
            false => fail(format!("{} ranks answered, {} are in the group", parts.len(), spec.ranks)),
        }
    }

    /// What [`launch`](Launcher::launch) has refused before: how ranks are placed does not change.
    fn refusal(&self, spec: GroupSpec) -> Option<Outcome> {
        self.refused().contains(&[spec.ranks, spec.ranks_per_node]).then(|| self.no_room(spec))
    }

    fn is_judge(&self) -> bool {
        self.world.rank().0 == 0
    }

    fn is_one_process(&self) -> bool {
        false
    }
}

/// What a check returns from every rank, as bytes.
pub(crate) trait Portable: Sized {
    fn to_bytes(&self) -> Vec<u8>;
    /// `None` if the bytes are none of [`to_bytes`](Portable::to_bytes).
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

impl Portable for () {
    fn to_bytes(&self) -> Vec<u8> {
        Vec::new()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.is_empty().then_some(())
    }
}

impl Portable for u64 {
    fn to_bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }
}

/// Vectors one behind the other, each after its length.
impl Portable for Vec<Vec<f32>> {
    fn to_bytes(&self) -> Vec<u8> {
        let vector = |values: &Vec<f32>| {
            let values = values.iter().flat_map(|x| x.to_le_bytes());
            values.collect::<Vec<u8>>()
        };
        let vectors = self.iter().map(vector);
        vectors.flat_map(|bytes| [bytes.len().to_bytes(), bytes].concat()).collect()
    }

    fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let mut vectors = Vec::new();
        while !bytes.is_empty() {
            let (len, rest) = bytes.split_first_chunk::<8>()?;
            let (values, rest) = rest.split_at_checked(usize::from_bytes(len)?)?;
            let values = values.chunks(4).map(|x| Some(f32::from_le_bytes(x.try_into().ok()?)));
            vectors.push(values.collect::<Option<_>>()?);
            bytes = rest;
        }
        Some(vectors)
    }
}

impl Portable for usize {
    fn to_bytes(&self) -> Vec<u8> {
        (*self as u64).to_bytes()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        usize::try_from(u64::from_bytes(bytes)?).ok()
    }
}

/// How a check ended on one rank: 0 and the value, or 1 and what went wrong.
pub(crate) fn encode<T: Portable>(ended: Check<T>) -> Vec<u8> {
    let (tag, bytes) = match ended {
        Ok(value) => (0, value.to_bytes()),
        Err(Outcome::Fail(why)) => (1, why.into_bytes()),
        Err(other) => (1, other.to_string().into_bytes()),
    };
    [&[tag], &*bytes].concat()
}

pub(crate) fn decode<T: Portable>(bytes: &[u8]) -> Check<T> {
    match bytes.split_first() {
        Some((0, value)) => T::from_bytes(value).map_or_else(|| fail("returned unreadable bytes"), Ok),
        Some((_, why)) => fail(String::from_utf8_lossy(why)),
        None => fail("returned nothing"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rank_returns_survives_the_journey() {
        let vectors = vec![vec![1.5, f32::NEG_INFINITY], Vec::new(), vec![-0.0]];
        assert_eq!(decode::<Vec<Vec<f32>>>(&encode(Ok(vectors.clone()))), Ok(vectors));
        assert_eq!(decode::<u64>(&encode(Ok(u64::MAX))), Ok(u64::MAX));
        assert_eq!(decode::<()>(&encode(Ok(()))), Ok(()));
        assert_eq!(decode::<u64>(&encode::<u64>(fail("no"))), fail("no"));
        assert!(decode::<u64>(&encode(Ok(()))).is_err());
        assert!(decode::<Vec<Vec<f32>>>(&[0, 8, 0, 0, 0, 0, 0, 0, 0, 1]).is_err());
        assert!(decode::<()>(&[]).is_err());
    }

    /// Threads that act as processes: each has a launcher of its own over a shared world.
    #[test]
    fn ranks_that_exist_already_all_get_the_same_answer() {
        let split = |group: &Endpoint, spec: GroupSpec| {
            let whole = group.world_size();
            match spec.ranks {
                ranks if ranks == whole => Ok(Some(group.clone())),
                _ => Err(TransportError::Topology { world_size: spec.ranks, ranks_per_node: 1 }),
            }
        };
        let answers = run_ranks(3, ThreadOptions::default(), |world| {
            let launcher = Spmd::new(world.clone(), |spec| split(&world, spec));
            let spec = |ranks| GroupSpec { ranks, ranks_per_node: ranks, timeout: Duration::from_secs(20) };
            let body = |group: Endpoint| match group.rank().0 {
                1 => panic!("one fails"),
                rank => encode(Ok(u64::from(rank))),
            };
            let known = |ranks| launcher.refusal(spec(ranks));
            assert_eq!((known(3), known(2)), (None, None));
            let answers = (launcher.launch(spec(3), &body), launcher.launch(spec(2), &body));
            assert_eq!((known(3), known(2)), (None, answers.1.clone().err()));
            answers
        });
        for (whole, part) in answers.unwrap() {
            let ended: Vec<_> = whole.unwrap().iter().map(|bytes| decode::<u64>(bytes)).collect();
            assert_eq!((&ended[0], &ended[2]), (&Ok(0), &Ok(2)));
            assert!(matches!(&ended[1], Err(Outcome::Fail(why)) if why.contains("one fails")));
            assert!(matches!(part, Err(Outcome::Refused(_))));
        }
    }
}
