//! The handshake under a model checker, with negative controls.
//!
//! `loom` runs a check in every interleaving of its threads up to a number of preemptions, and lets every load
//! return every value that the memory model allows. Payload is in cells that fail the run if two accesses race.
//! There is one check per kind of flag, each of two ranks and two rounds over the same memory; every [`Mutant`]
//! has to fail the check of its flag.

mod heap;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fused_moe_core::Rank;
use rstest::rstest;

use self::heap::{CELL, Memory, ModelFutex, ModelHeap, ModelWord, Mutant};
use crate::chunk::Chunk;
use crate::cursor::RowCursor;
use crate::deadline::Deadline;
use crate::doorbell::{Cause, DoorbellOf};
use crate::error::{Silence, TransportError};
use crate::heap::{Heap, Payload, Signal, Until};
use crate::status::{Status, StatusBoard};
use crate::symmetric::{HeapLayout, SymOffset};

/// The first of the two rounds. What the two before it left in the words is there.
const FIRST: u64 = 3;

/// Looks that a wait of a peer that comes may take in vain; the checker never needs so many.
const PATIENT: u32 = 1000;

/// Runs `check` in all interleavings with at most `preemptions` of them; the message of the first that fails.
fn explore(preemptions: usize, check: impl Fn() + Sync + Send + 'static) -> std::result::Result<(), String> {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    let run = std::panic::AssertUnwindSafe(|| builder.check(check));
    std::panic::catch_unwind(run).map_err(|panic| match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic.downcast_ref::<&str>().unwrap_or(&"a panic without a message").to_string(),
    })
}

/// Holds `outcome` to what `mutant` deserves.
fn judge(mutant: Mutant, outcome: std::result::Result<(), String>) {
    match (mutant, outcome) {
        (Mutant::Sound, outcome) => outcome.expect("the handshake is sound"),
        (mutant, Ok(())) => panic!("{mutant:?} is not caught"),
        (mutant, Err(message)) => println!("{mutant:?} is caught: {message}"),
    }
}

/// Runs `rank` on two threads, as ranks 0 and 1.
fn two_ranks(memory: &Arc<Memory>, looks: u32, rank: impl Fn(&ModelHeap) + Clone + Send + 'static) {
    let (other, body) = (ModelHeap::new(memory, 1, looks), rank.clone());
    let thread = loom::thread::spawn(move || body(&other));
    rank(&ModelHeap::new(memory, 0, looks));
    thread.join().expect("the thread has not panicked");
}

fn peer_of(heap: &ModelHeap) -> Rank {
    Rank(1 - heap.rank().0)
}

/// What `from` sends in `round`.
fn message(from: Rank, round: u64) -> [u8; CELL] {
    (round << 8 | u64::from(from.0)).to_ne_bytes()
}

fn never() -> Deadline {
    Deadline::after(std::time::Duration::MAX)
}

/// A row and its flag in one operation, and a flag back that says that the row may be written again.
fn window(mutant: Mutant) {
    let mut layout = HeapLayout::default();
    let (row, arrived, free) = (layout.region(CELL), layout.words(1), layout.words(1));
    let memory = Memory::new(2, layout.size(), mutant);
    two_ranks(&memory, PATIENT, move |heap| {
        let peer = peer_of(heap);
        for round in [1, 2] {
            if round > 1 && mutant != Mutant::EarlyReuse {
                heap.signal_wait_until(free, Until::Ge(round - 1), peer, never()).unwrap();
            }
            let bytes = message(heap.rank(), round);
            let (payload, signal) =
                (Payload { offset: row, bytes: &bytes }, Signal { word: arrived, value: round });
            // SAFETY: the checker verifies the access rule.
            unsafe { heap.put_signal(peer, payload, signal).unwrap() };
            heap.signal_wait_until(arrived, Until::Ge(round), peer, never()).unwrap();
            assert_eq!(heap.row(row), message(peer, round));
            heap.signal_set(peer, Signal { word: free, value: round }).unwrap();
        }
    });
}

#[rstest]
fn a_window_is_handed_over_and_back(
    #[values(Mutant::Sound, Mutant::RelaxedSet, Mutant::RelaxedLook, Mutant::AnyEpoch, Mutant::EarlyReuse)]
    mutant: Mutant,
) {
    judge(mutant, explore(5, move || window(mutant)));
}

/// The exchange of statuses: a count in words of their own, valid by the epoch, and a row per peer that was put
/// before. One board says that rows have come, the other that they have been read.
fn board(mutant: Mutant) {
    let mut layout = HeapLayout::default();
    let row = layout.region(CELL);
    let (dispatched, ready) = (StatusBoard::reserve(&mut layout, 2), StatusBoard::reserve(&mut layout, 2));
    let memory = Memory::new(2, layout.size(), mutant);
    // The boards as rounds 1 and 2 left them.
    for (rank, round) in [(0, FIRST - 2), (1, FIRST - 2), (0, FIRST - 1), (1, FIRST - 1)] {
        let heap = ModelHeap::new(&memory, rank, PATIENT);
        for board in [dispatched, ready] {
            board.post(&heap, peer_of(&heap), round, Status::done(round)).unwrap();
        }
    }
    two_ranks(&memory, PATIENT, move |heap| {
        let peer = peer_of(heap);
        for round in [FIRST, FIRST + 1] {
            let bytes = message(heap.rank(), round);
            // SAFETY: the checker verifies the access rule.
            unsafe { heap.put_nbi(peer, Payload { offset: row, bytes: &bytes }).unwrap() };
            dispatched.post(heap, peer, round, Status::done(round)).unwrap();
            let status = dispatched.wait(heap, peer, round, never()).unwrap();
            assert_eq!(status, Status::done(round));
            assert_eq!(heap.row(row), message(peer, round));
            ready.post(heap, peer, round, Status::done(0)).unwrap();
            if mutant != Mutant::EarlyReuse {
                ready.wait(heap, peer, round, never()).unwrap();
            }
        }
    });
}

#[rstest]
fn statuses_hand_over_what_was_put_before(
    #[values(Mutant::Sound, Mutant::RelaxedSet, Mutant::RelaxedLook, Mutant::AnyEpoch, Mutant::EarlyReuse)]
    mutant: Mutant,
) {
    judge(mutant, explore(4, move || board(mutant)));
}

/// Chunks into windows by the parity of the round, three rounds so that one window is used again: what a rank waits for
/// before it writes is its reader's status of the round between.
fn chunks(mutant: Mutant) {
    let mut layout = HeapLayout::default();
    let windows = layout.region(2 * CELL);
    let flags = layout.words(2);
    let dispatched = StatusBoard::reserve(&mut layout, 2);
    let memory = Memory::new(2, layout.size(), mutant);
    two_ranks(&memory, PATIENT, move |heap| {
        let peer = peer_of(heap);
        for round in [1, 2, 3] {
            let window = if mutant == Mutant::EarlyReuse { 0 } else { (round % 2) as usize };
            let (flag, offset) = (flags + window, SymOffset(windows.0 + window * CELL));
            let chunk = Chunk { round, rows: 1, last: true };
            // SAFETY: the checker verifies the access rule.
            unsafe {
                chunk.put(heap, peer, Payload { offset, bytes: &message(heap.rank(), round) }, flag).unwrap();
            }
            dispatched.post(heap, peer, round, Status::done(1)).unwrap();
            assert_eq!(Chunk::wait(heap, flag, round, peer, never()).unwrap(), chunk);
            assert_eq!(Chunk::look(heap, flag, round).unwrap(), Some(chunk));
            assert_eq!(heap.row(offset), message(peer, round));
            dispatched.wait(heap, peer, round, never()).unwrap();
        }
    });
}

#[rstest]
fn a_chunk_tells_of_its_round(
    #[values(Mutant::Sound, Mutant::RelaxedSet, Mutant::RelaxedLook, Mutant::AnyEpoch, Mutant::EarlyReuse)]
    mutant: Mutant,
) {
    judge(mutant, explore(4, move || chunks(mutant)));
}

/// Rows of a rank that both ranks take and write, every round anew from the first.
fn rows(mutant: Mutant) {
    let mut layout = HeapLayout::default();
    let start = layout.region(2 * CELL);
    let cursor = RowCursor::reserve(&mut layout);
    let (dispatched, ready) = (StatusBoard::reserve(&mut layout, 2), StatusBoard::reserve(&mut layout, 2));
    let memory = Memory::new(2, layout.size(), mutant);
    two_ranks(&memory, PATIENT, move |heap| {
        let (me, peer) = (heap.rank(), peer_of(heap));
        for round in [1, 2] {
            cursor.rearm(heap, if mutant == Mutant::EarlyRearm { round + 1 } else { round }).unwrap();
            // All rows are of rank 0, so that two ranks take from one cursor.
            let row = cursor.take(heap, Rank(0), round, 1).unwrap();
            assert!(row < 2, "row {row} of two in round {round}");
            let offset = SymOffset(start.0 + row as usize * CELL);
            // SAFETY: the checker verifies the access rule.
            unsafe { heap.put_nbi(Rank(0), Payload { offset, bytes: &message(me, round) }).unwrap() };
            dispatched.post(heap, peer, round, Status::done(1)).unwrap();
            dispatched.wait(heap, peer, round, never()).unwrap();
            if me == Rank(0) {
                let mut received = [heap.row(start), heap.row(start + CELL)];
                received.sort_unstable();
                assert_eq!(received, [message(me, round), message(peer, round)]);
            }
            ready.post(heap, peer, round, Status::done(0)).unwrap();
            ready.wait(heap, peer, round, never()).unwrap();
        }
    });
}

#[rstest]
fn no_two_ranks_take_the_same_row(#[values(Mutant::Sound, Mutant::EarlyRearm)] mutant: Mutant) {
    judge(mutant, explore(4, move || rows(mutant)));
}

/// Waits that found a status, and that gave up.
#[derive(Default)]
struct Endings {
    found: AtomicU64,
    gave_up: AtomicU64,
}

/// A rank gives up after one look, or finds its peer gone. What it has by then is right, and it never calls a
/// status lost that was posted before its peer left.
fn giving_up(mutant: Mutant, endings: &Arc<Endings>) {
    let mut layout = HeapLayout::default();
    let row = layout.region(CELL);
    let board = StatusBoard::reserve(&mut layout, 2);
    let memory = Memory::new(2, layout.size(), mutant);
    let endings = Arc::clone(endings);
    two_ranks(&memory, 0, move |heap| {
        let peer = peer_of(heap);
        let bytes = message(heap.rank(), 1);
        // SAFETY: the checker verifies the access rule.
        unsafe { heap.put_nbi(peer, Payload { offset: row, bytes: &bytes }).unwrap() };
        board.post(heap, peer, 1, Status::done(7)).unwrap();
        let ending = match board.wait(heap, peer, 1, never()) {
            Ok(status) => {
                assert_eq!((status, heap.row(row)), (Status::done(7), message(peer, 1)));
                &endings.found
            }
            Err(TransportError::PeerLost { silence, .. }) => {
                assert_eq!(silence, Silence::Deadline, "the peer posted before it left");
                &endings.gave_up
            }
            Err(error) => panic!("{error}"),
        };
        ending.fetch_add(1, Ordering::Relaxed);
        heap.depart();
    });
}

#[rstest]
fn a_wait_ends_with_the_right_answer(
    #[values(Mutant::Sound, Mutant::OneLook, Mutant::RelaxedSet, Mutant::RelaxedLook)] mutant: Mutant,
) {
    let endings = Arc::new(Endings::default());
    let seen = Arc::clone(&endings);
    judge(mutant, explore(8, move || giving_up(mutant, &endings)));
    if mutant == Mutant::Sound {
        assert!(seen.found.load(Ordering::Relaxed) > 0 && seen.gave_up.load(Ordering::Relaxed) > 0);
    }
}

/// A rank sleeps until a word has changed, twice; its peer changes it and rings.
fn bell(mutant: Mutant) {
    struct Ringing {
        bell: DoorbellOf<ModelFutex, ModelWord>,
        word: ModelWord,
    }
    let new = || DoorbellOf::new(ModelFutex::default(), ModelWord::new(mutant));
    let shared = Arc::new(Ringing { bell: new(), word: ModelWord::new(mutant) });
    let ringer = Arc::clone(&shared);
    let thread = loom::thread::spawn(move || {
        for value in [1, 2] {
            super::set(&ringer.word, value);
            ringer.bell.ring(Cause::ANY);
        }
    });
    for value in [1, 2] {
        let see = || super::see(&shared.word, Until::Ge(value));
        let for_ever = || Some(std::time::Duration::MAX);
        assert!(shared.bell.sleep_until(Cause::ANY, for_ever, see).is_some());
    }
    thread.join().expect("the thread has not panicked");
}

#[rstest]
fn no_ring_is_missed(#[values(Mutant::Sound, Mutant::NoFence)] mutant: Mutant) {
    judge(mutant, explore(6, move || bell(mutant)));
}
