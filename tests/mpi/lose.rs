//! A rank that does not answer any more: the job must end, and say why.

use std::num::NonZeroUsize;
use std::process::Command;
use std::time::{Duration, Instant};

use ep_transport::{HeapLayout, MpiOptions, Payload, Signal, Transport, Until};
use fused_moe_core::Rank;

use crate::{Failure, Job};

/// Deadline of the others.
const SILENCE: Duration = Duration::from_millis(700);

/// Rank 1 of the first two is lost in the way that `how` says. Never ends well.
pub fn run(job: &Job, how: &str) -> Result<(), Failure> {
    let two = NonZeroUsize::new(2);
    let options = MpiOptions { ranks: two, ranks_per_node: two, timeout: SILENCE };
    // Two nodes if there are two machines, so that the loss is found inside MPI as well.
    let options = match job.world.ranks_per_host().len() {
        1 => options,
        _ => MpiOptions { ranks_per_node: NonZeroUsize::new(1), ..options },
    };
    let group = job.world.group(options)?;
    if let Some(group) = &group {
        let mut layout = HeapLayout::default();
        let (row, word) = (layout.region(1 << 20), layout.words(2));
        let heap = group.allocate(layout.size(), group.deadline())?;
        let bytes = vec![7; 1 << 20];
        for round in 1..=20 {
            if round == 11 && group.rank() == Rank(1) {
                lose(how)?;
            }
            let peer = Rank(1 - group.rank().0);
            // SAFETY: each rank writes the other's row, and does so again when the other has waited for it.
            unsafe {
                heap.put_signal(peer, Payload { offset: row, bytes: &bytes }, Signal { word, value: round })?;
            }
            heap.signal_wait_until(word, Until::Ge(round), peer, group.deadline())?;
            // The other has read what there was to read.
            heap.signal_set(peer, Signal { word: word + 1, value: round })?;
            heap.signal_wait_until(word + 1, Until::Ge(round), peer, group.deadline())?;
        }
    }
    // Those outside the two wait for the end.
    job.everyone.transport().barrier(job.everyone.transport().deadline())?;
    Err(format!("nobody missed the rank that was to be lost ({how})").into())
}

fn lose(how: &str) -> Result<(), Failure> {
    let signal = match how {
        // Alive, but not in MPI; longer than the others wait.
        "silent" => {
            let end = Instant::now() + 10 * SILENCE;
            while let Some(left) = end.checked_duration_since(Instant::now()) {
                std::thread::park_timeout(left);
            }
            return Ok(());
        }
        "stopped" => "-STOP",
        "killed" => "-KILL",
        _ => return Err(format!("unknown way to be lost: {how}").into()),
    };
    let status = Command::new("kill").args([signal, &std::process::id().to_string()]).status()?;
    if status.success() { Ok(()) } else { Err(format!("kill ended with {status}").into()) }
}
