//! Waiting for memory to change: spin briefly, then sleep until whoever changed it rings.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::deadline::Deadline;
use crate::handshake::Word;
use crate::symmetric::SymWord;

/// How a waiter spins before it sleeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    /// Past the cost of a sleep and a wake-up, which is tens of microseconds.
    limit: Duration,
    /// Looks at the awaited memory before the core is offered to others.
    looks: u32,
}

impl Spin {
    /// Sleeps at once.
    #[cfg(test)]
    const NONE: Self = Self { limit: Duration::ZERO, looks: 1 };

    /// A waiter that shares its core keeps it from the very rank it waits for, so it offers the core after every look.
    pub(crate) fn for_ranks(ranks: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Self { limit: Duration::from_micros(50), looks: if ranks <= cores { 64 } else { 1 } }
    }
}

/// What changed, or what is waited for. Two things may share a cause; that only costs a needless wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cause(u32);

impl Cause {
    /// Anything: wakes everyone, is woken by everything.
    pub(crate) const ANY: Self = Self(u32::MAX);

    /// A word of any heap.
    pub(crate) const fn word(word: SymWord) -> Self {
        Self(word.0 as u32)
    }
}

/// Who sleeps: the number of threads, and the cause if there is just one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sleepers {
    count: u32,
    cause: Cause,
}

impl Sleepers {
    const fn unpack(packed: u64) -> Self {
        Self { count: packed as u32, cause: Cause((packed >> 32) as u32) }
    }

    const fn pack(self) -> u64 {
        (self.cause.0 as u64) << 32 | self.count as u64
    }

    /// With one more, who waits for `cause`.
    fn joined(self, cause: Cause) -> Self {
        Self { count: self.count + 1, cause: if self.count == 0 { cause } else { Cause::ANY } }
    }

    /// With one less. Whose cause remains is no longer known.
    fn left(self) -> Self {
        Self { count: self.count - 1, cause: Cause::ANY }
    }

    /// Whether anyone may be waiting for `cause`.
    fn heed(self, cause: Cause) -> bool {
        self.count != 0 && (self.cause == cause || self.cause == Cause::ANY || cause == Cause::ANY)
    }
}

/// A bell that one rank sleeps on and all others ring.
///
/// Two words without pointers, so it may lie in memory shared between processes.
pub(crate) type Doorbell = DoorbellOf<AtomicU32, AtomicU64>;

/// A [`Doorbell`] made of any kind of words.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct DoorbellOf<R, S> {
    /// Rings so far, modulo 2^32.
    rings: R,
    /// A packed [`Sleepers`]: threads asleep, or about to be.
    sleepers: S,
}

/// A 32-bit word to sleep on.
pub(crate) trait Futex {
    /// As [`AtomicU32::load`], acquiring.
    fn load(&self) -> u32;
    /// Adds one, releasing.
    fn increment(&self);
    /// Sleeps while the word is `value`, at most `limit`; may return early.
    fn sleep_while(&self, value: u32, limit: Duration);
    /// Wakes everyone who sleeps on the word.
    fn wake_all(&self);
}

impl<R: Futex, S: Word> DoorbellOf<R, S> {
    /// A bell of the words `rings` and `sleepers`, both zero.
    #[cfg(test)]
    pub(crate) fn new(rings: R, sleepers: S) -> Self {
        Self { rings, sleepers }
    }

    /// Wakes the sleepers if they may be waiting for `cause`. Called after the store that they wait for.
    ///
    /// The cause matters where ranks share cores: a rank that waits for eight signals in turn is otherwise woken
    /// by each of them to find that it was the wrong one.
    pub(crate) fn ring(&self, cause: Cause) {
        // This fence and the one in `wait` make sure that either the ringer sees the sleeper or the sleeper sees
        // the ringer's store; without them both could miss each other.
        self.sleepers.fence(Ordering::SeqCst);
        if Sleepers::unpack(self.sleepers.load(Ordering::Relaxed)).heed(cause) {
            self.rings.increment();
            self.rings.wake_all();
        }
    }

    /// Waits until `ready` gives a value; `None` if it has not by the deadline. `ready` is asked at least once,
    /// and again after every ring for `cause`.
    pub(crate) fn wait<T>(
        &self,
        cause: Cause,
        spin: Spin,
        deadline: Deadline,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if let Some(value) = ready() {
            return Some(value);
        }
        let spin_until = Deadline::after(spin.limit).min(deadline);
        loop {
            for _ in 0..spin.looks {
                spin_loop();
                if let Some(value) = ready() {
                    return Some(value);
                }
            }
            if spin_until.remaining().is_none() {
                break;
            }
            // Two ranks may have been put on one core while another is idle. If each slept until the other had run,
            // no more than one of them would ever be runnable, and the kernel would see no reason to part them.
            std::thread::yield_now();
        }
        self.sleep_until(cause, || deadline.remaining(), ready)
    }

    /// Sleeps until `ready` gives a value; `None` once there is no time `remaining`.
    pub(crate) fn sleep_until<T>(
        &self,
        cause: Cause,
        mut remaining: impl FnMut() -> Option<Duration>,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        self.update_sleepers(|sleepers| sleepers.joined(cause));
        self.sleepers.fence(Ordering::SeqCst);
        let outcome = loop {
            let heard = self.rings.load();
            if let Some(value) = ready() {
                break Some(value);
            }
            let Some(left) = remaining() else { break None };
            self.rings.sleep_while(heard, left);
        };
        self.update_sleepers(Sleepers::left);
        outcome
    }

    fn update_sleepers(&self, change: impl Fn(Sleepers) -> Sleepers) {
        let mut packed = self.sleepers.load(Ordering::Relaxed);
        while let Err(found) = self.sleepers.replace(packed, change(Sleepers::unpack(packed)).pack()) {
            packed = found;
        }
    }
}

impl Futex for AtomicU32 {
    fn load(&self) -> u32 {
        self.load(Ordering::Acquire)
    }

    fn increment(&self) {
        self.fetch_add(1, Ordering::Release);
    }

    #[cfg(target_os = "linux")]
    fn sleep_while(&self, value: u32, limit: Duration) {
        use rustix::thread::futex;

        // A limit beyond what the kernel's clock can say is cut; the caller loops.
        let limit = limit.min(Duration::from_secs(3600));
        let limit = futex::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        // Not FUTEX_PRIVATE: the word may be shared between processes. An error is an early return: the word has
        // changed (EAGAIN), a signal came (EINTR), or the time is up (ETIMEDOUT).
        let _ = futex::wait(self, futex::Flags::empty(), value, Some(&limit));
    }

    #[cfg(target_os = "linux")]
    fn wake_all(&self) {
        use rustix::thread::futex;

        // The only errors are those of a bad address, which a reference is not.
        let _ = futex::wake(self, futex::Flags::empty(), i32::MAX as u32);
    }

    /// Without a futex a sleeper naps and looks again.
    #[cfg(not(target_os = "linux"))]
    fn sleep_while(&self, value: u32, limit: Duration) {
        const NAP: Duration = Duration::from_micros(50);
        if self.load(Ordering::Relaxed) == value {
            std::thread::sleep(limit.min(NAP));
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn wake_all(&self) {}
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rstest::rstest;

    use super::*;

    #[test]
    fn the_deadline_ends_a_wait_that_no_one_answers() {
        let bell = Doorbell::default();
        let start = Instant::now();
        let deadline = Deadline::after(Duration::from_millis(50));
        let outcome = bell.wait(Cause::ANY, Spin::for_ranks(1), deadline, || None::<()>);
        let took = start.elapsed();
        assert_eq!(outcome, None);
        assert!(took >= Duration::from_millis(50) && took < Duration::from_millis(500), "took {took:?}");
    }

    #[rstest]
    #[case::one_word(Cause(3), Cause(3))]
    #[case::a_ring_for_all(Cause(3), Cause::ANY)]
    #[case::a_sleeper_for_all(Cause::ANY, Cause(3))]
    fn no_ring_is_missed(#[case] awaited: Cause, #[case] changed: Cause) {
        let (ping, pong) = (Doorbell::default(), Doorbell::default());
        let (there, back) = (AtomicU64::new(0), AtomicU64::new(0));
        let rounds = 10_000;
        let limit = Deadline::after(Duration::from_secs(60));
        // Without spinning nearly every round sleeps, so every round can miss its ring.
        let await_value = |bell: &Doorbell, word: &AtomicU64, n| {
            let see = || (word.load(Ordering::Acquire) == n).then_some(());
            assert!(bell.wait(awaited, Spin::NONE, limit, see).is_some());
        };
        let change = |bell: &Doorbell, word: &AtomicU64, n| {
            word.store(n, Ordering::Release);
            bell.ring(changed);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1..=rounds {
                    await_value(&ping, &there, n);
                    change(&pong, &back, n);
                }
            });
            for n in 1..=rounds {
                change(&ping, &there, n);
                await_value(&pong, &back, n);
            }
        });
    }

    #[test]
    fn two_sleepers_with_different_causes_both_wake() {
        let (bell, words) = (Doorbell::default(), [AtomicU64::new(0), AtomicU64::new(0)]);
        let rounds = 5_000;
        let done = [AtomicU64::new(0), AtomicU64::new(0)];
        let limit = Deadline::after(Duration::from_secs(60));
        std::thread::scope(|scope| {
            for (index, (word, done)) in words.iter().zip(&done).enumerate() {
                let bell = &bell;
                scope.spawn(move || {
                    for n in 1..=rounds {
                        let see = || (word.load(Ordering::Acquire) >= n).then_some(());
                        assert!(bell.wait(Cause(index as u32), Spin::NONE, limit, see).is_some());
                        done.store(n, Ordering::Release);
                    }
                });
            }
            for n in 1..=rounds {
                for (index, word) in words.iter().enumerate() {
                    word.store(n, Ordering::Release);
                    bell.ring(Cause(index as u32));
                }
                for done in &done {
                    while done.load(Ordering::Acquire) < n && limit.remaining().is_some() {
                        std::thread::yield_now();
                    }
                }
            }
        });
        assert_eq!(Sleepers::unpack(bell.sleepers.into_inner()).count, 0);
    }

    #[test]
    fn only_a_lone_sleeper_has_a_cause() {
        let nobody = Sleepers::unpack(0);
        let one = nobody.joined(Cause(4));
        assert!(one.heed(Cause(4)) && one.heed(Cause::ANY) && !one.heed(Cause(5)));
        let two = one.joined(Cause(6));
        assert!(two.heed(Cause(5)) && two.left().heed(Cause(5)));
        let last = two.left().left();
        assert!(!last.heed(Cause(4)) && !last.heed(Cause::ANY));
        assert_eq!(Sleepers::unpack(two.pack()), two);
        assert!(!last.joined(Cause(7)).heed(Cause(4)));
    }
}
