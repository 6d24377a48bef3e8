//! Waiting for memory to change: spin briefly, then sleep until whoever changed it rings.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Duration;

use crate::deadline::Deadline;

/// Looks at the awaited memory between two looks at the clock.
const LOOKS_PER_CLOCK: u32 = 64;

/// How long a waiter spins before it sleeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin(Duration);

impl Spin {
    /// A waiter with a core of its own may spin past the cost of a sleep and a wake-up (tens of microseconds);
    /// one that shares its core keeps it from the very rank it waits for.
    pub(crate) fn for_ranks(ranks: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Self(if ranks <= cores { Duration::from_micros(50) } else { Duration::ZERO })
    }
}

/// A bell that one rank sleeps on and all others ring.
///
/// Two 32-bit words without pointers, so it may lie in memory shared between processes.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct Doorbell {
    /// Rings so far, modulo 2^32: the futex.
    rings: AtomicU32,
    /// Threads asleep, or about to be.
    sleepers: AtomicU32,
}

impl Doorbell {
    /// Wakes the sleepers. Called after the store that they wait for.
    pub(crate) fn ring(&self) {
        // This fence and the one in `wait` make sure that either the ringer sees the sleeper or the sleeper sees
        // the ringer's store; without them both could miss each other.
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            self.rings.fetch_add(1, Ordering::Release);
            wake_all(&self.rings);
        }
    }

    /// Waits until `ready` gives a value; `None` if it has not by the deadline. `ready` is asked at least once.
    pub(crate) fn wait<T>(
        &self,
        spin: Spin,
        deadline: Deadline,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if let Some(value) = ready() {
            return Some(value);
        }
        let spin_until = Deadline::after(spin.0).min(deadline);
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                spin_loop();
                if let Some(value) = ready() {
                    return Some(value);
                }
            }
            if spin_until.remaining().is_none() {
                break;
            }
        }
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let outcome = loop {
            let heard = self.rings.load(Ordering::Acquire);
            if let Some(value) = ready() {
                break Some(value);
            }
            let Some(left) = deadline.remaining() else { break None };
            sleep_while(&self.rings, heard, left);
        };
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        outcome
    }
}

/// Sleeps while `word` is `value`, at most `limit`; may return early.
#[cfg(target_os = "linux")]
fn sleep_while(word: &AtomicU32, value: u32, limit: Duration) {
    use rustix::thread::futex;

    // A limit beyond what the kernel's clock can say is cut; the caller loops.
    let limit = limit.min(Duration::from_secs(3600));
    let limit = futex::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    // Not FUTEX_PRIVATE: the word may be shared between processes. An error is an early return: the word has
    // changed (EAGAIN), a signal came (EINTR), or the time is up (ETIMEDOUT).
    let _ = futex::wait(word, futex::Flags::empty(), value, Some(&limit));
}

/// Wakes everyone who sleeps on `word`.
#[cfg(target_os = "linux")]
fn wake_all(word: &AtomicU32) {
    use rustix::thread::futex;

    // The only errors are those of a bad address, which a reference is not.
    let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
}

/// Without a futex a sleeper naps and looks again.
#[cfg(not(target_os = "linux"))]
fn sleep_while(word: &AtomicU32, value: u32, limit: Duration) {
    const NAP: Duration = Duration::from_micros(50);
    if word.load(Ordering::Relaxed) == value {
        std::thread::sleep(limit.min(NAP));
    }
}

#[cfg(not(target_os = "linux"))]
fn wake_all(_word: &AtomicU32) {}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_deadline_ends_a_wait_that_no_one_answers() {
        let bell = Doorbell::default();
        let start = Instant::now();
        let outcome =
            bell.wait(Spin::for_ranks(1), Deadline::after(Duration::from_millis(50)), || None::<()>);
        let took = start.elapsed();
        assert_eq!(outcome, None);
        assert!(took >= Duration::from_millis(50) && took < Duration::from_millis(500), "took {took:?}");
    }

    #[test]
    fn no_ring_is_missed() {
        let (ping, pong) = (Doorbell::default(), Doorbell::default());
        let (there, back) = (AtomicU64::new(0), AtomicU64::new(0));
        let rounds = 20_000;
        let limit = Deadline::after(Duration::from_secs(60));
        let see = |word: &AtomicU64, n| (word.load(Ordering::Acquire) == n).then_some(());
        // Without spinning every round sleeps, so every round can miss its ring.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1..=rounds {
                    assert!(ping.wait(Spin(Duration::ZERO), limit, || see(&there, n)).is_some());
                    back.store(n, Ordering::Release);
                    pong.ring();
                }
            });
            for n in 1..=rounds {
                there.store(n, Ordering::Release);
                ping.ring();
                assert!(pong.wait(Spin(Duration::ZERO), limit, || see(&back, n)).is_some());
            }
        });
    }
}
