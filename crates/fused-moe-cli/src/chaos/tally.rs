//! What came of the rounds.

use std::collections::BTreeMap;

use serde::Serialize;

use super::messages::{Held, Outcome};

/// Counts of a run.
#[derive(Debug, Default, Serialize)]
pub struct Tally {
    pub rounds: u64,
    /// Groups that were formed.
    pub groups: u64,
    /// Processes that were started in the place of killed ones.
    pub respawned: u64,
    /// By fault and where it struck.
    pub faults: BTreeMap<String, u64>,
    /// Of all ranks in all calls: right results and errors by kind.
    pub outcomes: BTreeMap<String, u64>,
    /// Calls of smaller groups, by what they do with the tokens of lost experts.
    pub after_loss: BTreeMap<String, u64>,
    pub wrong: u64,
    pub hangs: u64,
    /// Errors that no fault explains.
    pub unexplained: u64,
    /// The first of what is not as it should be.
    pub complaints: Vec<String>,
    pub memory: Memory,
    pub leftovers: Leftovers,
}

/// Resident memory of ranks over the groups that they were in.
#[derive(Debug, Default, Serialize)]
pub struct Memory {
    /// Bytes that a rank gains with each group, by least squares over all lives of ranks, the first groups left out.
    pub slope_bytes_per_group: f64,
    pub samples: usize,
    pub largest_bytes: u64,
}

/// What should have gone and has not.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Leftovers {
    /// Descriptors that a rank holds between groups beyond those it started with.
    pub descriptors_of_ranks: usize,
    /// Anonymous shared mappings that a rank holds between groups.
    pub mappings_of_ranks: usize,
    /// Descriptors that this process gained.
    pub descriptors: usize,
    /// Processes that did not end.
    pub processes: usize,
}

/// Complaints that are kept in full.
const COMPLAINTS: usize = 10;

impl Tally {
    pub fn complain(&mut self, what: String) {
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(what);
        }
    }

    /// Counts an outcome.
    pub fn count(&mut self, outcome: &Outcome) {
        let name = match outcome {
            Outcome::Right => "right",
            Outcome::Wrong(_) => "WRONG",
            Outcome::Error { kind, .. } => kind,
        };
        *self.outcomes.entry(name.into()).or_default() += 1;
    }

    pub fn is_clean(&self) -> bool {
        self.wrong + self.hangs + self.unexplained == 0 && self.leftovers == Leftovers::default()
    }
}

/// Groups after which a rank has run every backend and has all the memory that it reuses.
const WARM: usize = 12;

/// What one process held after each of its groups.
#[derive(Debug, Default)]
pub struct Life(pub Vec<Held>);

impl Memory {
    pub fn of(lives: &[Life]) -> Self {
        let (mut covariance, mut variance, mut samples) = (0.0, 0.0, 0);
        for Life(held) in lives {
            let warm = held.get(WARM..).unwrap_or_default();
            let mean =
                |of: &dyn Fn(usize) -> f64| (0..warm.len()).map(of).sum::<f64>() / warm.len().max(1) as f64;
            let (groups, bytes) = (|i: usize| i as f64, |i: usize| warm[i].memory as f64);
            let (mean_groups, mean_bytes) = (mean(&groups), mean(&bytes));
            for i in 0..warm.len() {
                covariance += (groups(i) - mean_groups) * (bytes(i) - mean_bytes);
                variance += (groups(i) - mean_groups).powi(2);
            }
            samples += warm.len();
        }
        let largest = lives.iter().flat_map(|life| &life.0).map(|held| held.memory).max();
        Self {
            slope_bytes_per_group: if variance > 0.0 { covariance / variance } else { 0.0 },
            samples,
            largest_bytes: largest.unwrap_or(0),
        }
    }
}

impl Leftovers {
    /// What ranks gained over their first group, and mappings that outlived a group.
    pub fn of_ranks(lives: &[Life]) -> Self {
        let gained = |Life(held): &Life| {
            let first = held.first().map_or(0, |first| first.descriptors);
            held.iter().map(|held| held.descriptors.saturating_sub(first)).max().unwrap_or(0)
        };
        let mapped = lives.iter().flat_map(|life| &life.0).map(|held| held.mappings).max();
        Self {
            descriptors_of_ranks: lives.iter().map(gained).max().unwrap_or(0),
            mappings_of_ranks: mapped.unwrap_or(0),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(memory: impl IntoIterator<Item = u64>) -> Life {
        let held = |memory| Held { memory, descriptors: 5, mappings: 0 };
        Life(memory.into_iter().map(held).collect())
    }

    #[test]
    fn the_slope_is_that_within_lives() {
        // The later life holds more, and neither grows once it is warm.
        let level = [life([0; WARM].into_iter().chain([1000; 5])), life((0..WARM as u64).chain([9000; 3]))];
        assert_eq!(Memory::of(&level).slope_bytes_per_group, 0.0);
        let leaking = [
            life((0..WARM as u64 + 7).map(|i| 50 * i)),
            life((0..WARM as u64 + 17).map(|i| 7000 + 50 * i)),
            life([]),
        ];
        let memory = Memory::of(&leaking);
        assert!((memory.slope_bytes_per_group - 50.0).abs() < 1e-9, "{memory:?}");
        assert_eq!((memory.samples, memory.largest_bytes), (7 + 17, 7000 + 50 * (WARM as u64 + 16)));
    }

    #[test]
    fn what_a_rank_gains_is_left_over() {
        let mut lives = [life([1, 1, 1]), life([1, 1])];
        assert_eq!(Leftovers::of_ranks(&lives), Leftovers::default());
        lives[1].0[1].descriptors += 2;
        lives[0].0[2].mappings = 1;
        let left = Leftovers::of_ranks(&lives);
        assert_eq!((left.descriptors_of_ranks, left.mappings_of_ranks), (2, 1));
        assert!(!Tally { leftovers: left, ..Tally::default() }.is_clean());
    }
}
