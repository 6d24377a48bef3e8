//! A rank that does nothing any more: the others come back by their deadline and name it.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use fused_moe_core::{ErrorKind, ProcessGroup, Rank as Number};
use mori_comm::MoriBackend;
use rstest::rstest;

use crate::world::{Phase, Rank, World};

/// Deadline of every wait.
const TIMEOUT: Duration = Duration::from_millis(300);

/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(15);

#[rstest]
fn the_silent_rank_is_named(
    #[values(1, 2, 4)] nodes: usize,
    #[values(MoriBackend::HighThroughput, MoriBackend::LowLatency)] backend: MoriBackend,
    #[values(Phase::PrepareSend, Phase::PrepareRecv, Phase::FinalizeSend)] last: Phase,
) {
    let world = World { nodes, ranks_per_node: 8 / nodes, ..World::everywhere() };
    let silent = 5;
    // It stays in the group until the others have ended: it must not be found to have left.
    let ended = Barrier::new(world.ranks());
    let ends = world.run_within(TIMEOUT, |group| {
        let number = group.rank().index();
        let mut rank = Rank::new(&world, backend, &group);
        let start = Instant::now();
        let end = rank.round_until((number == silent).then_some(last)).map(|_| ());
        let took = start.elapsed();
        ended.wait();
        (end.map_err(|error| error.kind), took)
    });
    for (number, (end, took)) in ends.into_iter().enumerate().filter(|(number, _)| *number != silent) {
        // Behind its outputs nobody needs a rank but those whose tokens it sums for its node.
        let needs_it = last != Phase::FinalizeSend
            || (nodes > 1 && number % world.ranks_per_node == silent % world.ranks_per_node);
        match end {
            Err(ErrorKind::PeerLost { rank: Number(5), round: 1 }) => assert!(needs_it, "rank {number}"),
            Ok(()) => assert!(!needs_it, "rank {number} does not miss the silent rank"),
            other => panic!("rank {number}: {other:?}"),
        }
        assert!(took < TIMEOUT * 2 + SLACK, "rank {number} came back after {took:?}");
    }
}
