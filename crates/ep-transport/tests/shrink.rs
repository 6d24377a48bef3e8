//! Groups of threads that go on without ranks that left or do not answer.

mod common;

use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use common::{Exchange, ranks};
use ep_transport::{
    Collective, Deadline, Endpoint, HeapSize, Result, Shrunk, Silence, SymWord, ThreadOptions, Transport,
    TransportError, Until, run_ranks,
};
use fused_moe_core::Rank;
use rand::RngCore;
use rstest::rstest;

/// A time that is nothing beside the timeout of 30 s.
const SOON: Duration = Duration::from_secs(5);

fn shrink(group: &Endpoint) -> Result<Shrunk> {
    group.transport().shrink(group.transport().deadline())
}

/// Fails unless the group works, and consists of `survivors`.
fn works(shrunk: &Shrunk, survivors: &[u32]) {
    assert_eq!(shrunk.survivors, survivors.iter().copied().map(Rank).collect::<Vec<_>>());
    assert_eq!(shrunk.transport.world_size(), survivors.len());
    let seed = u64::from(survivors[0]);
    let exchange = Exchange::new(&Endpoint::new(std::sync::Arc::clone(&shrunk.transport)), seed).unwrap();
    for round in 1..=50 {
        assert_eq!(exchange.round(round, false).unwrap(), [], "round {round}");
    }
}

/// Waits for a signal of `from` that does not come.
fn wait_for(group: &Endpoint, from: Rank, timeout: Duration) -> TransportError {
    let transport = group.transport();
    let heap = transport.allocate(HeapSize { bytes: 0, words: 1 }, transport.deadline()).unwrap();
    heap.signal_wait_until(SymWord(0), Until::Eq(1), from, Deadline::after(timeout)).unwrap_err()
}

#[rstest]
#[case::one(&[2], &[0, 1, 3, 4])]
#[case::two(&[0, 4], &[1, 2, 3])]
#[case::all_but_one(&[0, 1, 2, 3], &[4])]
fn a_group_goes_on_without_those_that_left(#[case] leaving: &[u32], #[case] left: &[u32]) {
    let start = Instant::now();
    run_ranks(5, ThreadOptions::default(), |group| {
        let me = group.transport().rank();
        let lost = Rank(leaving[0]);
        if leaving.contains(&me.0) {
            let size = HeapSize { bytes: 0, words: 1 };
            group.transport().allocate(size, group.transport().deadline()).unwrap();
            return;
        }
        assert_eq!(wait_for(&group, lost, Duration::from_secs(30)).lost_rank(), Some(lost));
        works(&shrink(&group).unwrap(), left);
        assert_eq!(shrink(&group).unwrap_err(), TransportError::Superseded);
        assert_eq!(group.transport().barrier(group.transport().deadline()), Err(TransportError::Superseded));
    })
    .unwrap();
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
}

#[test]
fn a_loss_that_one_has_seen_reaches_all() {
    // Rank 3 leaves; only rank 0 waits for it, rank 1 for rank 0, and rank 2 for rank 1.
    let start = Instant::now();
    run_ranks(4, ThreadOptions::default(), |group| {
        let me = group.transport().rank();
        if me == Rank(3) {
            let size = HeapSize { bytes: 0, words: 1 };
            group.transport().allocate(size, group.transport().deadline()).unwrap();
            return;
        }
        let from = Rank((me.0 + 3) % 4);
        let silence = if me == Rank(0) { Silence::Departed } else { Silence::Shrinking };
        match wait_for(&group, from, Duration::from_secs(30)) {
            TransportError::PeerLost { rank, silence: it, .. } => assert_eq!((rank, it), (from, silence)),
            other => panic!("{other}"),
        }
        works(&shrink(&group).unwrap(), &[0, 1, 2]);
    })
    .unwrap();
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
}

#[test]
fn a_silent_rank_is_left_out_and_told_so() {
    let done = Barrier::new(4);
    run_ranks(4, ThreadOptions::default(), |group| {
        let silent = Rank(1);
        let lost = wait_for(&group, silent, Duration::from_millis(100));
        if group.transport().rank() == silent {
            done.wait();
            let error = shrink(&group).unwrap_err();
            assert!(matches!(error, TransportError::Excluded { rank, by } if rank == silent && by != silent));
            return;
        }
        assert!(matches!(lost, TransportError::PeerLost { silence: Silence::Deadline, .. }), "{lost}");
        let start = Instant::now();
        let shrunk = shrink(&group).unwrap();
        assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
        works(&shrunk, &[0, 2, 3]);
        done.wait();
    })
    .unwrap();
}

#[test]
fn a_suspect_that_comes_is_not_left_out() {
    run_ranks(3, ThreadOptions::default(), |group| {
        let suspect = Rank(1);
        if group.transport().rank() == suspect {
            wait_for(&group, Rank(0), Duration::from_secs(30));
        } else {
            wait_for(&group, suspect, Duration::from_millis(50));
        }
        works(&shrink(&group).unwrap(), &[0, 1, 2]);
    })
    .unwrap();
}

#[test]
fn who_does_not_come_is_not_waited_for_beyond_the_deadline() {
    let done = Barrier::new(3);
    let timeout = Duration::from_millis(400);
    run_ranks(3, ThreadOptions { timeout, ..ThreadOptions::default() }, |group| {
        if group.transport().rank() != Rank(2) {
            let start = Instant::now();
            let shrunk = shrink(&group).unwrap();
            assert_eq!(shrunk.survivors, [Rank(0), Rank(1)]);
            assert!(start.elapsed() < timeout, "took {:?}", start.elapsed());
        }
        done.wait();
    })
    .unwrap();
}

#[test]
fn groups_shrink_again_and_again() {
    run_ranks(6, ThreadOptions::default(), |group| {
        let me = group.transport().rank();
        let mut group = group;
        for lost in 0..5 {
            if me.0 == lost {
                return;
            }
            let gone = group.transport().barrier(group.transport().deadline()).unwrap_err();
            assert_eq!(gone.lost_rank(), Some(Rank(0)), "{gone}");
            let shrunk = shrink(&group).unwrap();
            works(&shrunk, &(1..6 - lost).collect::<Vec<_>>());
            group = Endpoint::new(shrunk.transport);
        }
        assert_eq!(me, Rank(5));
    })
    .unwrap();
}

#[test]
fn survivors_agree_whatever_they_have_seen() {
    let seed = rand::rng().next_u64();
    println!("survivors_agree_whatever_they_have_seen: seed {seed}");
    for round in 0..10 {
        let bits = (seed ^ round).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Each rank leaves, stays silent or survives; rank 7 survives.
        let fate = |rank: Rank| if rank == Rank(7) { 0 } else { (bits >> (2 * rank.0)) & 3 };
        let left: Vec<u32> = ranks(8).filter(|&rank| fate(rank) < 2).map(|rank| rank.0).collect();
        let done = Barrier::new(ranks(8).filter(|&rank| fate(rank) != 2).count());
        let timeout = Duration::from_millis(2000);
        let options = ThreadOptions { ranks_per_node: NonZeroUsize::new(4), timeout };
        run_ranks(8, options, |group| match fate(group.transport().rank()) {
            0 | 1 => {
                let me = group.transport().rank().0 as usize;
                let others = (1..8).map(|distance| Rank(((me + distance) % 8) as u32));
                // Some have noticed one of the losses, some another, some none.
                if let Some(lost) =
                    others.clone().find(|&rank| fate(rank) >= 2 && rank.0 % 3 == bits as u32 % 3)
                {
                    let missed = group.transport().barrier(Deadline::after(Duration::from_millis(1)));
                    assert!(missed.is_err(), "{lost} does not come");
                }
                let shrunk = shrink(&group).unwrap();
                assert_eq!(
                    shrunk.survivors.iter().map(|rank| rank.0).collect::<Vec<_>>(),
                    left,
                    "seed {seed}"
                );
                done.wait();
            }
            2 => {}
            _ => {
                done.wait();
                let error = shrink(&group).unwrap_err();
                assert!(matches!(error, TransportError::Excluded { .. }), "{error}");
            }
        })
        .unwrap();
    }
}

#[test]
fn two_shrinks_of_one_rank_at_once_are_refused() {
    let timeout = Duration::from_millis(300);
    let ranks =
        ep_transport::ThreadGroup::new(2, ThreadOptions { timeout, ..ThreadOptions::default() }).unwrap();
    let both = Barrier::new(2);
    let call = || {
        both.wait();
        ranks[0].shrink(ranks[0].deadline()).err()
    };
    let ends = std::thread::scope(|scope| {
        let other = scope.spawn(call);
        [call(), other.join().unwrap()]
    });
    let refused = [
        Some(TransportError::Overlapping { operation: Collective::Shrink }),
        Some(TransportError::Superseded),
    ];
    assert!(ends.iter().filter(|end| end.is_none()).count() == 1, "{ends:?}");
    assert!(ends.iter().all(|end| end.is_none() || refused.contains(end)), "{ends:?}");
}
