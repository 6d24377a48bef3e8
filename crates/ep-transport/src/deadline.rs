//! The moment at which a wait gives up.

use std::time::{Duration, Instant};

/// What stands for "as good as never" where a timeout overflows the clock: a year.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The moment at which a wait gives up.
///
/// It is absolute, so one deadline bounds a whole sequence of waits: the phases of a round share it, and their
/// timeouts do not add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline `timeout` from now. A timeout beyond the range of the clock counts as a year.
    pub fn after(timeout: Duration) -> Self {
        let now = Instant::now();
        Self(now.checked_add(timeout).unwrap_or_else(|| now + FAR))
    }

    /// The deadline at `moment`.
    pub const fn at(moment: Instant) -> Self {
        Self(moment)
    }

    /// The deadline when half of the time left has passed.
    pub(crate) fn halfway(self) -> Self {
        Self::after(self.remaining().unwrap_or_default() / 2)
    }

    /// The deadline `by` later.
    #[cfg(feature = "mpi")]
    pub(crate) fn later(self, by: Duration) -> Self {
        Self(self.0.checked_add(by).unwrap_or(self.0))
    }

    /// Time left; `None` once the deadline has passed.
    pub fn remaining(self) -> Option<Duration> {
        self.0.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_huge_timeout_does_not_overflow_the_clock() {
        assert!(Deadline::after(Duration::MAX).remaining().is_some());
    }

    #[test]
    fn the_present_has_passed() {
        assert_eq!(Deadline::after(Duration::ZERO).remaining(), None);
    }
}
