//! This process' part in the MPI job: one call at a time, each watched, the job aborted when one fails.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fused_moe_core::Rank;
use mpi::environment::Universe;
use mpi::{Threading, ffi};

use super::comm::Comm;
use super::watchdog::{Wait, Watchdog};
use super::window::Window;
use crate::deadline::Deadline;
use crate::error::{Awaited, Result, TransportError};

/// Exit code of a job that was aborted: the program's for what fails at run time.
const EXIT_CODE: c_int = 1;

/// How long a rank that has said why the job must end lets the others speak. Ranks that wait for each other reach their
/// deadlines at about the same time, and only those that wait for the lost rank itself can name it: some of them inside
/// MPI, where the watchdog has to speak for them.
const LAST_WORDS: Duration = super::watchdog::LATEST.saturating_add(Duration::from_millis(400));

/// How long an aborting thread tries to get hold of MPI.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);

/// What a group leaves behind: memory that others may still write, and its communicators.
#[derive(Debug, Default)]
pub(super) struct Remains {
    pub(super) windows: BTreeMap<u64, Arc<Window>>,
    pub(super) comms: Vec<Comm>,
}

/// This process in the job. Dropping the last handle ends MPI.
pub(super) struct Session {
    /// Held during every call: MPI is initialised for calls from any thread, one at a time.
    calls: Mutex<()>,
    watchdog: Watchdog,
    /// Groups that this rank has left, by number. They are taken down when all ranks have left them: taking down is
    /// collective, and a rank that drops its end must not wait for the others.
    left: Mutex<BTreeMap<u64, Remains>>,
    timeout: Duration,
    universe: Option<Universe>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    /// Joins the job. `timeout` is for what the whole job does together.
    pub(super) fn start(timeout: Duration) -> Result<Self> {
        let failed = |what: String| TransportError::Mpi { what };
        let watchdog = Watchdog::start().map_err(|e| failed(format!("no thread for the watchdog: {e}")))?;
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("initialised already".into()))?;
        if !matches!(threading, Threading::Serialized | Threading::Multiple) {
            return Err(failed(format!("allows {threading:?} threads only, needs Serialized")));
        }
        let (calls, left) = (Mutex::default(), Mutex::default());
        Ok(Self { calls, watchdog, left, timeout, universe: Some(universe) })
    }

    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.timeout)
    }

    /// Makes calls into MPI. Does not return if one fails, nor long after the deadline.
    pub(super) fn call<T>(&self, wait: Wait, calls: impl FnOnce() -> Result<T, c_int>) -> T {
        let held = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        self.watchdog.watch(Some(wait));
        let outcome = calls();
        self.watchdog.watch(None);
        drop(held);
        outcome.unwrap_or_else(|code| self.abort(&format!("{}; MPI says: {}", wait.loss(), error_text(code))))
    }

    /// Prints what `wait` ended in and aborts the job.
    pub(super) fn fail(&self, wait: Wait) -> ! {
        self.abort(&wait.loss())
    }

    fn abort(&self, why: &str) -> ! {
        eprintln!("{why}; this rank aborts the job");
        std::thread::sleep(LAST_WORDS);
        let patience = Deadline::after(ABORT_PATIENCE);
        while patience.remaining().is_some() {
            if let Ok(_held) = self.calls.try_lock() {
                // SAFETY: MPI is initialised while `self` exists, and no other call is under way.
                unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, EXIT_CODE) };
            }
            std::thread::yield_now();
        }
        std::process::abort()
    }

    fn graves(&self) -> MutexGuard<'_, BTreeMap<u64, Remains>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what group `number` leaves behind until all its ranks have left.
    pub(super) fn leave(&self, number: u64, remains: Remains) {
        self.graves().insert(number, remains);
    }

    /// The numbers of the groups that this rank has left.
    pub(super) fn left(&self) -> Vec<u64> {
        self.graves().keys().copied().collect()
    }

    /// Takes down groups that all their ranks have left. All ranks call it with the same numbers.
    pub(super) fn take_down(&self, numbers: impl IntoIterator<Item = u64>) {
        for number in numbers {
            let Remains { windows, comms } = self.graves().remove(&number).unwrap_or_default();
            for window in windows.into_values() {
                self.call(self.shutdown(), || window.free());
            }
            for comm in comms {
                self.call(self.shutdown(), || comm.free());
            }
        }
    }

    fn shutdown(&self) -> Wait {
        Wait::new(Rank(0), Awaited::Shutdown, self.deadline())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort("a rank panicked");
        }
        // Every group has been left, here and, once they get here, on all other ranks.
        self.take_down(self.left());
        self.watchdog.watch(Some(self.shutdown()));
        self.universe = None;
        self.watchdog.watch(None);
    }
}

/// `Ok` if `code` says that a call succeeded.
pub(super) fn check(code: c_int) -> Result<(), c_int> {
    if code == ffi::MPI_SUCCESS as c_int { Ok(()) } else { Err(code) }
}

/// What MPI says about an error code.
fn error_text(code: c_int) -> String {
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the buffer has the size that the standard demands; the call may be made at any time.
    let known = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut len) };
    match check(known) {
        Ok(()) => String::from_utf8_lossy(&text[..(len.max(0) as usize).min(text.len())]).into_owned(),
        Err(_) => format!("error {code}"),
    }
}
