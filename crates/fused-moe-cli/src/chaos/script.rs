//! What happens in a round.

use std::time::Duration;

use rand::Rng;
use rand::seq::index;
use rand_pcg::Pcg64;

use super::args::FaultKind;
use super::messages::Phase;

/// What happens to the victims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// SIGKILL.
    Kill,
    /// SIGSTOP, until the others have gone on without them.
    Stop,
    /// They are late, but come.
    Delay(Duration),
}

/// One round.
#[derive(Clone, Debug)]
pub struct Scene {
    pub fault: Fault,
    pub victims: Vec<usize>,
    /// Where it strikes; `None` is anywhere, `after` the call has begun.
    pub phase: Option<Phase>,
    pub after: Duration,
}

/// Calls of the small layer take about as long, on a machine with a processor per rank or without.
const CALL: Duration = Duration::from_millis(4);

impl Scene {
    /// A round in which nothing happens.
    pub fn calm() -> Self {
        Self { fault: Fault::None, victims: Vec::new(), phase: None, after: Duration::ZERO }
    }

    /// A round over `seats` with one of `faults`, or without.
    pub fn draw(random: &mut Pcg64, seats: usize, faults: &[FaultKind], timeout: Duration) -> Self {
        let mut lots = vec![None; 2];
        for &kind in faults {
            // A stop lasts until a deadline, so there are fewer of them.
            lots.extend(std::iter::repeat_n(Some(kind), if kind == FaultKind::Stop { 1 } else { 3 }));
        }
        let fault = match lots[random.random_range(0..lots.len())] {
            None => return Self::calm(),
            Some(FaultKind::Kill) => Fault::Kill,
            Some(FaultKind::Stop) => Fault::Stop,
            Some(FaultKind::Delay) => Fault::Delay(random.random_range(Duration::ZERO..=timeout / 8)),
        };
        let two = seats > 2 && random.random_bool(0.2);
        Self {
            fault,
            victims: index::sample(random, seats, 1 + usize::from(two)).into_vec(),
            phase: [None, Some(Phase::Before), Some(Phase::Dispatch), Some(Phase::Combine)]
                [random.random_range(0..4)],
            after: random.random_range(Duration::ZERO..CALL),
        }
    }

    /// The fault and where it strikes, as it is counted.
    pub fn name(&self) -> String {
        let fault = match self.fault {
            Fault::None => return "none".into(),
            Fault::Kill => "kill",
            Fault::Stop => "stop",
            Fault::Delay(_) => "delay",
        };
        let phase = match self.phase {
            None => "anywhere",
            Some(Phase::Before) => "before",
            Some(Phase::Dispatch) => "in dispatch",
            Some(Phase::Combine) => "in combine",
        };
        format!("{fault} {phase}")
    }

    /// Whether the victims cannot do their part in time.
    pub fn loses(&self) -> bool {
        matches!(self.fault, Fault::Kill | Fault::Stop)
    }
}
