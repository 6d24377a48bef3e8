//! Payload, signals and waits over threads: what is seen, when a wait ends, and what is refused.

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Exchange, ranks};
use ep_transport::{
    Awaited, Deadline, HeapSize, Payload, Result, Signal, Silence, SymOffset, SymWord, ThreadOptions,
    Transport, TransportError, Until, run_ranks,
};
use fused_moe_core::Rank;
use rand::RngCore;
use rstest::rstest;

fn fresh_seed(test: &str) -> u64 {
    let seed = rand::rng().next_u64();
    println!("{test}: seed {seed}");
    seed
}

#[rstest]
fn a_signal_shows_its_payload(#[values(1, 2, 3, 8)] world_size: usize) {
    let seed = fresh_seed("a_signal_shows_its_payload");
    let wrong = run_ranks(world_size, ThreadOptions::default(), |group| -> Result<_> {
        let exchange = Exchange::new(&group, seed)?;
        for round in 1..=3000 {
            let wrong = exchange.round(round, false)?;
            if !wrong.is_empty() {
                return Ok(Some((round, wrong)));
            }
        }
        Ok(None)
    });
    assert_eq!(wrong.unwrap(), vec![Ok(None); world_size], "seed {seed}");
}

#[test]
fn a_signal_without_its_payload_is_noticed() {
    // The negative control of the test above: rank 1 omits its puts in one round.
    let seed = fresh_seed("a_signal_without_its_payload_is_noticed");
    let wrong = run_ranks(3, ThreadOptions::default(), |group| -> Result<_> {
        let exchange = Exchange::new(&group, seed)?;
        let me = group.transport().rank();
        let rounds = 1..=40;
        rounds.map(|round| exchange.round(round, me == Rank(1) && round > 20)).collect::<Result<Vec<_>>>()
    });
    for wrong in wrong.unwrap() {
        let (honest, sabotaged) = wrong.as_ref().unwrap().split_at(20);
        assert!(honest.iter().all(Vec::is_empty), "seed {seed}");
        // Empty payloads are right without a put.
        assert!(sabotaged.iter().flatten().all(|&rank| rank == Rank(1)), "seed {seed}");
        assert!(sabotaged.iter().flatten().count() > 5, "seed {seed}: {sabotaged:?}");
    }
}

#[test]
fn many_ranks_on_few_cores_do_not_starve_each_other() {
    let start = Instant::now();
    let rounds = 2000;
    let outcome = run_ranks(8, ThreadOptions::default(), |group| -> Result<()> {
        let transport = group.transport();
        let heap = transport.allocate(HeapSize { bytes: 0, words: 8 }, transport.deadline())?;
        let me = transport.rank();
        for value in 1..=rounds {
            for to in ranks(8) {
                heap.signal_set(to, Signal { word: SymWord(me.index()), value })?;
            }
            for from in ranks(8) {
                heap.signal_wait_until(SymWord(from.index()), Until::Ge(value), from, transport.deadline())?;
            }
        }
        Ok(())
    });
    assert_eq!(outcome.unwrap(), vec![Ok(()); 8]);
    let round = start.elapsed() / rounds as u32;
    println!("8 ranks, all to all: {round:?} a round");
    // Time slices of a starved rank are milliseconds each.
    assert!(round < Duration::from_millis(4), "{round:?} a round");
}

#[rstest]
#[case(1, Until::Eq(1))]
#[case(2, Until::Ge(1))]
#[case(8, Until::Ge(7))]
fn a_wait_that_no_one_answers_ends_at_its_deadline(#[case] world_size: usize, #[case] until: Until) {
    let timeout = Duration::from_millis(50);
    let outcomes = run_ranks(world_size, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let heap = transport.allocate(HeapSize { bytes: 0, words: 3 }, transport.deadline()).unwrap();
        let start = Instant::now();
        let outcome = heap.signal_wait_until(SymWord(2), until, Rank(0), Deadline::after(timeout));
        let took = start.elapsed();
        transport.barrier(transport.deadline()).unwrap();
        (outcome, took)
    });
    for (outcome, took) in outcomes.unwrap() {
        let awaited = Awaited::Signal { word: SymWord(2), until, last_seen: 0 };
        let silence = Silence::Deadline;
        assert_eq!(outcome, Err(TransportError::PeerLost { rank: Rank(0), awaited, silence }));
        assert!(took >= timeout && took < 10 * timeout, "took {took:?}");
    }
}

#[test]
fn what_a_rank_signalled_before_it_left_still_counts() {
    let outcomes = run_ranks(2, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let heap = transport.allocate(HeapSize { bytes: 0, words: 2 }, transport.deadline()).unwrap();
        if transport.rank() == Rank(1) {
            heap.signal_set(Rank(0), Signal { word: SymWord(0), value: 9 }).unwrap();
            return None;
        }
        let start = Instant::now();
        let wait = |word| heap.signal_wait_until(word, Until::Ge(9), Rank(1), transport.deadline());
        Some((wait(SymWord(0)), wait(SymWord(1)), start.elapsed()))
    });
    let (signalled, missing, took) = outcomes.unwrap().remove(0).unwrap();
    assert_eq!(signalled, Ok(9));
    let awaited = Awaited::Signal { word: SymWord(1), until: Until::Ge(9), last_seen: 0 };
    let silence = Silence::Departed;
    assert_eq!(missing, Err(TransportError::PeerLost { rank: Rank(1), awaited, silence }));
    assert!(took < Duration::from_secs(5), "took {took:?} of a timeout of 30 s");
}

#[test]
fn a_rank_that_left_does_not_disturb_the_others() {
    // Rank 2 is done at once; ranks 0 and 1 go on, and may still write to its memory.
    let outcomes = run_ranks(3, ThreadOptions::default(), |group| -> Result<()> {
        let transport = group.transport();
        let heap = transport.allocate(HeapSize { bytes: 8, words: 1 }, transport.deadline())?;
        let me = transport.rank();
        if me == Rank(2) {
            return Ok(());
        }
        let peer = Rank(1 - me.0);
        for value in 1..1000 {
            if me == Rank(0) {
                // SAFETY: no one reads or writes this range but rank 0.
                unsafe { heap.put_nbi(Rank(2), Payload { offset: SymOffset(0), bytes: &[1; 8] })? };
            }
            heap.signal_set(peer, Signal { word: SymWord(0), value })?;
            heap.signal_wait_until(SymWord(0), Until::Ge(value), peer, transport.deadline())?;
        }
        Ok(())
    });
    assert_eq!(outcomes.unwrap(), vec![Ok(()); 3]);
}

#[test]
fn concurrent_additions_hand_out_every_number_once() {
    let (world_size, additions) = (8, 2000);
    let outcomes = run_ranks(world_size, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let heap = transport.allocate(HeapSize { bytes: 0, words: 1 }, transport.deadline()).unwrap();
        let mine: Vec<u64> =
            (0..additions).map(|_| heap.atomic_fetch_add(Rank(0), SymWord(0), 1).unwrap()).collect();
        transport.barrier(transport.deadline()).unwrap();
        (mine, heap.signal_read(SymWord(0)).unwrap())
    });
    let outcomes = outcomes.unwrap();
    let mut numbers: Vec<u64> = outcomes.iter().flat_map(|(mine, _)| mine).copied().collect();
    numbers.sort_unstable();
    let total = world_size as u64 * additions;
    assert_eq!(numbers, (0..total).collect::<Vec<_>>());
    assert_eq!(outcomes[0].1, total);
    assert!(outcomes[1..].iter().all(|&(_, word)| word == 0));
}

#[test]
fn an_addition_wakes_who_waits_for_it() {
    let outcomes = run_ranks(3, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let heap = transport.allocate(HeapSize { bytes: 0, words: 1 }, transport.deadline()).unwrap();
        if transport.rank() == Rank(0) {
            let total = heap.signal_wait_until(SymWord(0), Until::Ge(2), Rank(1), transport.deadline());
            return total.map(Some);
        }
        heap.atomic_fetch_add(Rank(0), SymWord(0), 1).unwrap();
        // Stay until rank 0 is done, or it would take this rank's departure for the end of its additions.
        transport.barrier(transport.deadline()).map(|()| None)
    });
    assert_eq!(outcomes.unwrap()[0], Ok(Some(2)));
}

#[test]
fn what_does_not_exist_is_refused() {
    run_ranks(2, ThreadOptions::default(), |group| {
        let transport = group.transport();
        let size = HeapSize { bytes: 10, words: 2 };
        let heap = transport.allocate(size, transport.deadline()).unwrap();
        let (no_rank, no_word) = (
            TransportError::NoSuchRank { rank: Rank(2), world_size: 2 },
            TransportError::NoSuchWord { word: SymWord(2), size },
        );
        let out_of_bounds =
            |offset, len| TransportError::OutOfBounds { offset: SymOffset(offset), len, size };
        let payload = |offset, bytes| Payload { offset: SymOffset(offset), bytes };
        let signal = |word| Signal { word: SymWord(word), value: 7 };
        // SAFETY: none of these is carried out, but for the empty one, which touches nothing.
        unsafe {
            assert_eq!(heap.put_nbi(Rank(2), payload(0, &[1])), Err(no_rank.clone()));
            assert_eq!(heap.put_nbi(Rank(1), payload(9, &[1, 2])), Err(out_of_bounds(9, 2)));
            assert_eq!(heap.put_nbi(Rank(1), payload(usize::MAX, &[1])), Err(out_of_bounds(usize::MAX, 1)));
            assert_eq!(heap.put_nbi(Rank(1), payload(11, &[])), Err(out_of_bounds(11, 0)));
            assert_eq!(heap.put_nbi(Rank(1), payload(10, &[])), Ok(()));
            assert_eq!(heap.put_signal(Rank(1), payload(0, &[1]), signal(2)), Err(no_word.clone()));
            assert_eq!(heap.put_signal(Rank(1), payload(10, &[1]), signal(0)), Err(out_of_bounds(10, 1)));
            assert_eq!(heap.local(SymOffset(0), 11), Err(out_of_bounds(0, 11)));
            assert_eq!(heap.peer_slice(Rank(1), SymOffset(3), 8), Err(out_of_bounds(3, 8)));
        }
        assert_eq!(heap.signal_set(Rank(2), signal(0)), Err(no_rank.clone()));
        assert_eq!(heap.signal_set(Rank(1), signal(2)), Err(no_word.clone()));
        assert_eq!(heap.atomic_fetch_add(Rank(1), SymWord(2), 1), Err(no_word.clone()));
        assert_eq!(heap.signal_read(SymWord(2)), Err(no_word));
        let wait = heap.signal_wait_until(SymWord(0), Until::Eq(0), Rank(2), transport.deadline());
        assert_eq!(wait, Err(no_rank));
        transport.barrier(transport.deadline()).unwrap();
        assert_eq!(heap.signal_read(SymWord(0)), Ok(0), "a refused put must not signal");
        assert_eq!(transport.traffic(), Default::default());
    })
    .unwrap();
}

#[test]
fn a_simulated_node_boundary_lets_only_puts_and_signals_through() {
    let options = ThreadOptions { ranks_per_node: NonZeroUsize::new(2), ..ThreadOptions::default() };
    run_ranks(4, options, |group| {
        let transport: &Arc<dyn Transport> = group.transport();
        let me = transport.rank();
        let heap = transport.allocate(HeapSize { bytes: 64, words: 8 }, transport.deadline()).unwrap();
        assert_eq!(ranks(4).map(|rank| transport.node_of(rank)).collect::<Vec<_>>(), [0, 0, 1, 1]);
        let before = transport.traffic();
        for to in ranks(4) {
            let near = transport.node_of(to) == transport.node_of(me);
            assert_eq!(heap.peer_ptr(to, SymOffset(0), 8).unwrap().is_some(), near);
            let added = heap.atomic_fetch_add(to, SymWord(4 + me.index()), 1);
            assert_eq!(added, if near { Ok(0) } else { Err(TransportError::OtherNode { rank: to }) });
            let payload = Payload { offset: SymOffset(me.index() * 8), bytes: &[me.0 as u8 + 1; 8] };
            // SAFETY: each rank writes its own 8 bytes of each rank once; they are read after the signal.
            unsafe { heap.put_signal(to, payload, Signal { word: SymWord(me.index()), value: 1 }).unwrap() };
        }
        for from in ranks(4) {
            let word = SymWord(from.index());
            heap.signal_wait_until(word, Until::Eq(1), from, transport.deadline()).unwrap();
            // SAFETY: written once, before the signal.
            assert_eq!(unsafe { heap.local(SymOffset(from.index() * 8), 8) }.unwrap(), [from.0 as u8 + 1; 8]);
        }
        let moved = transport.traffic() - before;
        assert_eq!((moved.remote_bytes, moved.internode_bytes, moved.local_bytes), (24, 16, 8));
        // Three signals and one addition on other ranks.
        assert_eq!((moved.remote_puts, moved.signals), (3, 4));
    })
    .unwrap();
}
