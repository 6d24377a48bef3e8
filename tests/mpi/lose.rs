//! A rank that does not answer any more: the job must end, and say why.

use std::num::NonZeroUsize;
use std::process::Command;
use std::time::{Duration, Instant};

use ep_transport::{Endpoint, HeapLayout, MpiOptions, Payload, Signal, Transport, Until};
use fused_moe::{Overlap, ProcessGroup, QuantScheme, default_backends};
use fused_moe_core::Rank;
use moe_conformance::Case;

use crate::common::{self, pair};
use crate::{Failure, Job};

/// Deadline of the others.
const SILENCE: Duration = Duration::from_millis(700);

/// The rank that is lost.
const VICTIM: Rank = Rank(1);

/// Where a rank is lost in a layer: before it dispatches, while tokens travel, while results do.
const PHASES: [&str; 3] = ["between", "in_dispatch", "in_combine"];

/// Rank 1 of the whole job is lost in a phase of a layer over two nodes, after two rounds. Never ends well.
pub fn in_layer(job: &Job, how: &str, phase: &str) -> Result<(), Failure> {
    if !PHASES.contains(&phase) {
        return Err(format!("unknown phase {phase}; there are {PHASES:?}").into());
    }
    let half = job.world.size() / 2;
    let options = MpiOptions { ranks: None, ranks_per_node: NonZeroUsize::new(half), timeout: SILENCE };
    let group = Endpoint::new(job.world.group(options)?.ok_or("the group is the whole job")?);
    let case =
        Case::small(QuantScheme::Unquantized, job.world.size(), job.seed).on_nodes(job.world.size() / half);
    let (config, weights) = (case.config(), case.weights());
    let (registry, selection) = (default_backends(), pair(("mori_high_throughput", "aiter")));
    let mut kernel = common::Rank::build(&registry, (&config, &weights), selection, &group)?;
    let input = &case.inputs(0)[kernel.rank];
    for round in 0..4 {
        let lose_at = |now: &str| {
            if group.rank() == VICTIM && round == 2 && phase == now {
                lose(how).expect("a process can signal itself");
            }
        };
        let overlapped = |now: &'static str| {
            move |_| {
                lose_at(now);
                Ok(())
            }
        };
        lose_at("between");
        let (mut in_dispatch, mut in_combine) = (overlapped("in_dispatch"), overlapped("in_combine"));
        let overlap = Overlap { dispatch: Some(&mut in_dispatch), combine: Some(&mut in_combine) };
        kernel.apply(input, overlap)?;
    }
    Err(format!("nobody missed the rank that was to be lost ({how}, {phase})").into())
}

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
            if round == 11 && group.rank() == VICTIM {
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
