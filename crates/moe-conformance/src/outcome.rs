//! How a case ends, and how long it may take.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use ep_transport::{Endpoint, Poisoned};
use fused_moe_core::{DeviceKind, Unsupported};

use crate::case::Case;
use crate::device::TestDevice;
use crate::launcher::{GroupSpec, Launcher, Portable, Threads, decode, encode};
use crate::seed::Seed;

/// How a case ended. There is no skipping: what is not supported is refused with reasons, and whoever refuses must
/// refuse to be built, too.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub enum Outcome {
    /// As it must be.
    Pass,
    /// The backend said beforehand that it cannot, and why.
    Refused(Vec<Unsupported>),
    /// Not as it must be, with the case, the rank and the first difference.
    Fail(String),
}

impl Outcome {
    /// Whether it is [`Outcome::Pass`].
    pub fn is_pass(&self) -> bool {
        matches!(self, Outcome::Pass)
    }

    /// Whether it is [`Outcome::Fail`].
    pub fn is_fail(&self) -> bool {
        matches!(self, Outcome::Fail(_))
    }

    /// The same with `context` in front of a failure.
    pub(crate) fn within(self, context: impl std::fmt::Display) -> Self {
        match self {
            Outcome::Fail(why) => Outcome::Fail(format!("{context}: {why}")),
            other => other,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Pass => f.write_str("pass"),
            Outcome::Refused(reasons) => {
                f.write_str("refused")?;
                reasons.iter().try_for_each(|reason| write!(f, "\n  {reason}"))
            }
            Outcome::Fail(why) => write!(f, "fail: {why}"),
        }
    }
}

/// A check of a case: nothing, or the outcome that ends it.
pub(crate) type Check<T = ()> = Result<T, Outcome>;

pub(crate) fn fail<T>(why: impl std::fmt::Display) -> Check<T> {
    Err(Outcome::Fail(why.to_string()))
}

/// An error with all its causes.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(error.source(), |e| e.source()).fold(error.to_string(), |s, e| format!("{s}: {e}"))
}

/// What a run of the suite starts from.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What all random numbers follow from. Every failure prints it.
    pub seed: Seed,
    /// Deadline of every wait between ranks.
    pub timeout: Duration,
    /// What ranks are.
    pub launcher: &'static dyn Launcher,
    /// Where tensors lie; `None` for the host.
    pub device: Option<&'static dyn TestDevice>,
}

impl Default for Settings {
    /// A fresh seed, threads, and 20 s: no round takes so long, on however busy a machine.
    fn default() -> Self {
        Self { seed: Seed::fresh(), timeout: Duration::from_secs(20), launcher: &Threads, device: None }
    }
}

impl Settings {
    /// The settings with another seed.
    #[must_use]
    pub fn with_seed(mut self, seed: Seed) -> Self {
        self.seed = seed;
        self
    }

    /// The settings with another deadline.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The settings with other ranks. Where they are processes, all of them need the same seed.
    #[must_use]
    pub fn with_launcher(mut self, launcher: &'static dyn Launcher) -> Self {
        self.launcher = launcher;
        self
    }

    /// The settings for backends whose tensors lie on `device`.
    #[must_use]
    pub fn with_device(mut self, device: &'static dyn TestDevice) -> Self {
        self.device = Some(device);
        self
    }

    /// Where tensors lie.
    pub fn device_kind(&self) -> DeviceKind {
        self.device.map_or(DeviceKind::Host, |device| device.memory().device().kind)
    }

    /// How long a case may take before it counts as hanging.
    fn patience(&self) -> Duration {
        self.timeout * 4 + Duration::from_secs(40)
    }
}

/// What a panic says.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or_default())
}

/// Runs `case` on a thread of its own. A panic and a hang are failures; the thread of a hang is left behind.
pub(crate) fn supervised(settings: Settings, case: impl FnOnce() -> Check + Send + 'static) -> Outcome {
    let (done, outcome) = mpsc::channel();
    let run = move || {
        let ended = catch_unwind(AssertUnwindSafe(case)).unwrap_or_else(|panic| fail(panic_text(&*panic)));
        // Nobody listens any more if the patience has ended.
        let _ = done.send(ended.err().unwrap_or(Outcome::Pass));
    };
    if let Err(error) = std::thread::Builder::new().name("conformance".into()).spawn(run) {
        return Outcome::Fail(format!("no thread for the case: {error}"));
    }
    let patience = settings.patience();
    outcome
        .recv_timeout(patience)
        .unwrap_or_else(|_| Outcome::Fail(format!("hangs: no end after {patience:?}")))
}

fn poisoned(group: &Endpoint) -> Endpoint {
    Endpoint::new(Arc::new(Poisoned::new(Arc::clone(group.transport()))))
}

fn spec(case: &Case, settings: Settings) -> GroupSpec {
    let ranks_per_node = case.config().ranks_per_node;
    GroupSpec { ranks: case.ep_size(), ranks_per_node, timeout: settings.timeout }
}

/// Refuses `case` if it is known that there cannot be its ranks.
pub(crate) fn has_ranks(case: &Case, settings: Settings) -> Check {
    settings.launcher.refusal(spec(case, settings)).map_or(Ok(()), Err)
}

/// Runs `body` on the ranks that `case` needs and returns what they return, or the failures of all. Their heaps are
/// poisoned: what a backend reads without having written it is NaN.
pub(crate) fn on_ranks<T: Portable>(
    case: &Case,
    settings: Settings,
    body: impl Fn(Endpoint) -> Check<T> + Sync,
) -> Check<Vec<T>> {
    let results = settings.launcher.launch(spec(case, settings), &|group| encode(body(poisoned(&group))))?;
    let (mut values, mut failures) = (Vec::new(), Vec::new());
    for (rank, result) in results.iter().enumerate() {
        match decode(result) {
            Ok(value) => values.push(value),
            Err(Outcome::Fail(why)) => failures.push(format!("rank {rank}: {why}")),
            Err(other) => return Err(other),
        }
    }
    if failures.is_empty() { Ok(values) } else { fail(failures.join("\n  ")) }
}
