//! What ends a job whose rank is stuck inside MPI.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use fused_moe_core::Rank;

use crate::deadline::Deadline;
use crate::error::{Awaited, Silence, TransportError};

/// How long after its deadline a call into MPI may go on. A rank that can look at the clock itself comes first.
const GRACE: Duration = Duration::from_millis(250);

/// Time between two looks at the clock.
const PERIOD: Duration = Duration::from_millis(100);

/// How long after its deadline a call has ended the process.
pub(super) const LATEST: Duration = GRACE.saturating_add(PERIOD);

/// What is waited for, and until when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    /// Who is waited for; of several, one.
    pub(super) on: Rank,
    pub(super) awaited: Awaited,
    /// Number of the collective, if it is one.
    pub(super) collective: Option<u64>,
    pub(super) deadline: Deadline,
}

impl Wait {
    /// A wait for `on` outside of collectives.
    pub(super) fn new(on: Rank, awaited: Awaited, deadline: Deadline) -> Self {
        Self { on, awaited, collective: None, deadline }
    }

    /// What it means if the deadline passes.
    pub(super) fn loss(self) -> String {
        let silence = Silence::Deadline;
        let lost = TransportError::PeerLost { rank: self.on, awaited: self.awaited, silence };
        let collective = self.collective.map(|number| format!(", collective {number} of the group"));
        format!("PeerLost: {lost}{}", collective.unwrap_or_default())
    }
}

#[derive(Debug, Default)]
struct State {
    watched: Option<Wait>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    closed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        let mut state = self.lock();
        while !state.closed {
            if let Some(wait) = state.watched.filter(|wait| wait.deadline.later(GRACE).remaining().is_none())
            {
                // MPI is busy with the call that hangs and cannot be asked to abort the job. The launcher does,
                // when it sees this process die.
                eprintln!("{}; stuck inside MPI, this rank aborts", wait.loss());
                std::process::abort();
            }
            state = self.closed.wait_timeout(state, PERIOD).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A thread that aborts the process when a watched call outlives its deadline.
#[derive(Debug)]
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub(super) fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let watcher = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("mpi-watchdog".into()).spawn(move || watcher.watch())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Watches a call, or none.
    pub(super) fn watch(&self, call: Option<Wait>) {
        self.shared.lock().watched = call;
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.closed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It ends without a panic, and nothing depends on it any more.
            let _ = thread.join();
        }
    }
}
