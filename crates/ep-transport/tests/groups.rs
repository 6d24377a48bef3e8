//! Groups of threads: collectives, ranks that fail or leave, and the traffic count.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use ep_transport::{
    Awaited, Collective, Deadline, HeapSize, Payload, Result, Signal, Silence, SymOffset, SymWord,
    ThreadGroup, ThreadOptions, Traffic, Transport, TransportError, Until, run_ranks, transport_of,
};
use fused_moe_core::{ErrorKind, ProcessGroup, Rank, SingleRank};
use rand::{Rng, RngCore, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

/// A time that is nothing beside the timeout of 30 s.
const SOON: Duration = Duration::from_secs(5);

fn lost(rank: u32, operation: Collective, silence: Silence) -> TransportError {
    TransportError::PeerLost { rank: Rank(rank), awaited: Awaited::Collective(operation), silence }
}

#[rstest]
fn all_gather_returns_what_each_rank_gave(#[values(1, 2, 3, 8)] world_size: usize) {
    let seed = rand::rng().next_u64();
    println!("all_gather_returns_what_each_rank_gave: seed {seed}");
    let gift = |round: u64, rank: u32| {
        let mut rng = Pcg64::seed_from_u64(seed ^ (round << 8) ^ u64::from(rank));
        let mut bytes = vec![0; rng.random_range(0..40)];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    run_ranks(world_size, ThreadOptions::default(), |group| {
        for round in 0..300 {
            let mine = gift(round, ProcessGroup::rank(&group).0);
            let want: Vec<_> = (0..world_size as u32).map(|rank| gift(round, rank)).collect();
            assert_eq!(ProcessGroup::all_gather(&group, &mine).unwrap(), want, "seed {seed}, round {round}");
            group.transport().barrier(group.transport().deadline()).unwrap();
        }
    })
    .unwrap();
}

#[test]
fn all_gather_takes_more_than_fits_at_once() {
    // Longer than a posting on one rank, a whole number of postings on another, nothing on the third.
    let gifts = [vec![1; 200_001], vec![2; 2 << 16], Vec::new()];
    run_ranks(3, ThreadOptions::default(), |group| {
        for shift in 0..3 {
            let gift = |rank: usize| &gifts[(rank + shift) % 3];
            let gathered = group.all_gather(gift(group.rank().index())).unwrap();
            assert!((0..3).all(|rank| gathered[rank] == *gift(rank)), "shift {shift}");
        }
    })
    .unwrap();
}

#[test]
fn only_an_endpoint_has_a_transport() {
    assert!(transport_of(&SingleRank).is_none());
    let found = run_ranks(3, ThreadOptions::default(), |group| {
        let transport = transport_of(&group).unwrap();
        (transport.rank(), transport.world_size(), transport.ranks_per_node())
    });
    assert_eq!(found.unwrap(), [(Rank(0), 3, 3), (Rank(1), 3, 3), (Rank(2), 3, 3)]);
}

#[rstest]
#[case(0, None)]
#[case(3, Some(2))]
#[case(2, Some(4))]
fn ranks_must_fill_their_nodes(#[case] world_size: usize, #[case] ranks_per_node: Option<usize>) {
    let ranks_per_node = ranks_per_node.and_then(NonZeroUsize::new);
    let error =
        ThreadGroup::new(world_size, ThreadOptions { ranks_per_node, ..ThreadOptions::default() }).err();
    let ranks_per_node = ranks_per_node.map_or(world_size, NonZeroUsize::get);
    assert_eq!(error, Some(TransportError::Topology { world_size, ranks_per_node }));
}

#[test]
fn heaps_of_different_size_are_refused_everywhere_and_the_group_goes_on() {
    let outcomes = run_ranks(4, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let words = if transport.rank() == Rank(2) { 5 } else { 4 };
        let refused = transport.allocate(HeapSize { bytes: 64, words }, transport.deadline()).err();
        transport.allocate(HeapSize { bytes: 64, words: 4 }, transport.deadline()).unwrap();
        refused.unwrap()
    });
    for (rank, error) in outcomes.unwrap().into_iter().enumerate() {
        let mismatch = |mine: &str, theirs: &str, rank| TransportError::Mismatch {
            field: "heap size",
            mine: mine.to_owned(),
            theirs: theirs.to_owned(),
            rank: Rank(rank),
        };
        let (usual, odd) = ("64 bytes and 4 words", "64 bytes and 5 words");
        assert_eq!(error, if rank == 2 { mismatch(odd, usual, 0) } else { mismatch(usual, odd, 2) });
    }
}

#[test]
fn different_collectives_are_refused_everywhere_and_the_group_goes_on() {
    let outcomes = run_ranks(3, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let (deadline, size) = (transport.deadline(), HeapSize { bytes: 1, words: 0 });
        let refused = match transport.rank().0 {
            0 => transport.barrier(deadline).err(),
            1 => transport.all_gather(&[], deadline).err(),
            _ => transport.allocate(size, deadline).err(),
        };
        transport.allocate(size, deadline).unwrap();
        match refused {
            Some(TransportError::Mismatch { field: "collective", mine, theirs, rank }) => {
                (mine, theirs, rank.0)
            }
            other => panic!("{other:?}"),
        }
    });
    let outcomes = outcomes.unwrap();
    let found: Vec<_> = outcomes.iter().map(|(mine, theirs, rank)| (&**mine, &**theirs, *rank)).collect();
    assert_eq!(
        found,
        [("barrier", "all-gather", 1), ("all-gather", "barrier", 0), ("allocate", "barrier", 0)]
    );
}

#[test]
fn memory_that_cannot_be_had_is_an_error_everywhere_and_the_group_goes_on() {
    let bytes = 1 << 60;
    let outcomes = run_ranks(2, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let error = transport.allocate(HeapSize { bytes, words: 0 }, transport.deadline()).err();
        transport.barrier(transport.deadline()).unwrap();
        error
    });
    let want = Some(TransportError::OutOfMemory { bytes, rank: Rank(0) });
    assert_eq!(outcomes.unwrap(), [want.clone(), want]);
}

#[test]
fn a_collective_ends_at_its_deadline_and_is_the_last() {
    let timeout = Duration::from_millis(50);
    let ranks = ThreadGroup::new(2, ThreadOptions { timeout, ..ThreadOptions::default() }).unwrap();
    let start = Instant::now();
    let first = ranks[0].barrier(ranks[0].deadline());
    let took = start.elapsed();
    assert_eq!(first, Err(lost(1, Collective::Barrier, Silence::Deadline)));
    assert!(took >= timeout && took < 10 * timeout, "took {took:?}");
    // Out of step for good: at once, whatever the deadline, on both sides.
    let late = Deadline::after(Duration::from_secs(30));
    assert_eq!(ranks[0].all_gather(&[], late), Err(lost(1, Collective::AllGather, Silence::Deadline)));
    assert_eq!(ranks[1].barrier(late), Ok(()), "rank 0 did post to the first collective");
    assert_eq!(ranks[1].barrier(late), Err(lost(0, Collective::Barrier, Silence::GaveUp)));
    assert!(start.elapsed() < SOON);
}

#[test]
fn a_dropped_endpoint_is_noticed_at_once() {
    let mut ranks = ThreadGroup::new(3, ThreadOptions::default()).unwrap();
    drop(ranks.remove(1));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for rank in &ranks {
            scope.spawn(|| {
                let gathered = rank.all_gather(&[1], rank.deadline());
                assert_eq!(gathered, Err(lost(1, Collective::AllGather, Silence::Departed)));
            });
        }
    });
    assert!(start.elapsed() < SOON);
}

#[test]
fn a_group_reports_a_lost_peer_in_the_terms_of_the_core() {
    let outcomes = run_ranks(2, ThreadOptions::default(), |group| {
        (ProcessGroup::rank(&group) == Rank(0)).then(|| ProcessGroup::all_gather(&group, &[]).unwrap_err())
    });
    let error = outcomes.unwrap().remove(0).unwrap();
    assert_eq!(error.kind, ErrorKind::PeerLost { rank: Rank(1), round: 0 });
}

#[rstest]
#[case::in_a_barrier(false)]
#[case::in_a_wait(true)]
fn a_panicking_rank_strands_no_one(#[case] in_a_wait: bool) {
    let start = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        run_ranks(4, ThreadOptions::default(), |group| {
            let transport = group.transport();
            let heap = transport.allocate(HeapSize { bytes: 0, words: 1 }, transport.deadline()).unwrap();
            if transport.rank() == Rank(2) {
                panic!("rank 2 fails");
            }
            if in_a_wait {
                heap.signal_wait_until(SymWord(0), Until::Eq(1), Rank(2), transport.deadline()).unwrap();
            } else {
                transport.barrier(transport.deadline()).unwrap();
            }
        })
    }));
    // The panics that the others answer with come later and are not the one reported.
    assert_eq!(outcome.unwrap_err().downcast_ref::<&str>(), Some(&"rank 2 fails"));
    assert!(start.elapsed() < SOON);
}

#[test]
fn two_collectives_of_one_rank_at_once_are_refused() {
    let timeout = Duration::from_millis(300);
    let ranks = ThreadGroup::new(2, ThreadOptions { timeout, ..ThreadOptions::default() }).unwrap();
    let both = Barrier::new(2);
    let call = || {
        both.wait();
        ranks[0].barrier(ranks[0].deadline()).unwrap_err()
    };
    let mut errors = std::thread::scope(|scope| {
        let other = scope.spawn(call);
        [call(), other.join().unwrap()]
    });
    errors.sort_by_key(|error| error.lost_rank());
    let overlapping = TransportError::Overlapping { operation: Collective::Barrier };
    assert_eq!(errors, [overlapping, lost(1, Collective::Barrier, Silence::Deadline)]);
}

#[test]
fn traffic_is_counted_to_the_byte() {
    let seed = rand::rng().next_u64();
    println!("traffic_is_counted_to_the_byte: seed {seed}");
    let options = ThreadOptions { ranks_per_node: NonZeroUsize::new(2), ..ThreadOptions::default() };
    run_ranks(4, options, |group| -> Result<()> {
        let transport = group.transport();
        let me = transport.rank();
        let size = HeapSize { bytes: 4 * 256, words: 4 };
        let heap = transport.allocate(size, transport.deadline())?;
        let offset = SymOffset(me.index() * 256);
        let mut rng = Pcg64::seed_from_u64(seed ^ u64::from(me.0));
        let mut want = Traffic::default();
        assert_eq!(transport.traffic(), want, "setting up is not counted");
        for value in 0..2000 {
            let to = Rank(rng.random_range(0..4));
            let len = if rng.random_ratio(1, 6) { 0 } else { rng.random_range(1..=256) };
            let (bytes, signal) = (vec![7; len], Signal { word: SymWord(me.index()), value });
            let payload = Payload { offset, bytes: &bytes };
            let near = transport.node_of(to) == transport.node_of(me);
            // SAFETY: every rank writes its own 256 bytes of each heap, and no one reads them.
            let (moves, signals) = unsafe {
                match rng.random_range(0..6) {
                    0 => (heap.put_nbi(to, payload).map(|()| true)?, false),
                    1 => (heap.put_signal(to, payload, signal).map(|()| true)?, true),
                    2 => (heap.signal_set(to, signal).map(|()| false)?, true),
                    3 => (heap.peer_slice_mut(to, offset, len)?.is_some(), false),
                    4 => (heap.peer_slice(to, offset, len)?.is_some(), false),
                    _ => (false, heap.atomic_fetch_add(to, SymWord(me.index()), 1).is_ok()),
                }
            };
            let moved = if moves { len as u64 } else { 0 };
            if to == me {
                want.local_bytes += moved;
            } else {
                want.remote_bytes += moved;
                want.internode_bytes += if near { 0 } else { moved };
                want.remote_puts += u64::from(moved > 0);
                want.signals += u64::from(signals);
            }
        }
        heap.quiet(transport.deadline())?;
        assert_eq!(transport.traffic(), want, "seed {seed}");
        assert_eq!(transport.traffic() - want, Traffic::default());
        transport.barrier(transport.deadline())
    })
    .unwrap()
    .into_iter()
    .for_each(|outcome| assert_eq!(outcome, Ok(())));
}
