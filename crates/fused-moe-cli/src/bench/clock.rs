//! The clock that a timed call is measured by.

use std::time::{Duration, Instant};

use serde::Serialize;

/// One thread is measured by the time that the process computes, which leaves out when others had the core; several
/// threads also wait for each other, so they are measured by the time that passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// Time that the threads of this process ran.
    Cpu,
    /// Time that passed.
    Wall,
}

impl Clock {
    /// The clock for a call on `threads` threads.
    pub fn for_threads(threads: usize) -> Self {
        if cfg!(unix) && threads == 1 { Clock::Cpu } else { Clock::Wall }
    }

    /// How long `call` takes.
    pub fn time<T>(self, call: impl FnOnce() -> T) -> (Duration, T) {
        let (ran, passed) = (process_time(), Instant::now());
        let outcome = call();
        let passed = passed.elapsed();
        let took = match self {
            Clock::Cpu => process_time().saturating_sub(ran),
            Clock::Wall => passed,
        };
        (took, outcome)
    }
}

#[cfg(unix)]
fn process_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

#[cfg(not(unix))]
fn process_time() -> Duration {
    Duration::ZERO
}
