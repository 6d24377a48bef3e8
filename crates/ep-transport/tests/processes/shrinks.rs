//! Groups that go on without processes that were killed or stopped.

use std::sync::Arc;
use std::time::Duration;

use ep_transport::{
    Deadline, Endpoint, Heap, HeapSize, Payload, Silence, SymOffset, SymWord, Transport, TransportError,
    Until,
};
use fused_moe_core::Rank;
use rand::Rng;

use crate::common::Exchange;
use crate::ranks::{Ranks, meet};

/// What ranks of these tests do, by its name.
pub fn body(name: &str) -> Option<fn(&Endpoint, u64)> {
    Some(match name {
        "survive" => survive,
        "copy_without_end" => copy_without_end,
        _ => return None,
    })
}

/// Exchanges payloads without end; returns at the first loss.
fn exchange_until_a_loss(group: &Endpoint, seed: u64) -> TransportError {
    let exchange = match Exchange::new(group, seed) {
        Ok(exchange) => exchange,
        Err(error) => return error,
    };
    println!("ready");
    (1..)
        .find_map(|round| match exchange.round(round, false) {
            Ok(wrong) => {
                assert_eq!(wrong, [], "round {round}, seed {seed}");
                None
            }
            Err(error) => Some(error),
        })
        .expect("the loop ends with an error only")
}

/// Exchanges payloads, and after every loss among those that are left, until but two are left; these say so.
fn survive(group: &Endpoint, seed: u64) {
    let mut group = group.clone();
    while group.transport().world_size() > 2 {
        let error = exchange_until_a_loss(&group, seed);
        assert!(error.lost_rank().is_some(), "{error}");
        let shrunk = group.transport().shrink(group.transport().deadline()).unwrap();
        group = Endpoint::new(shrunk.transport);
    }
    let exchange = Exchange::new(&group, seed).unwrap();
    for round in 1..=200 {
        assert_eq!(exchange.round(round, false).unwrap(), [], "round {round}, seed {seed}");
    }
    println!("two are left");
}

/// Every rank but the last two is killed, in any order and at any distance, while all exchange payloads or are
/// busy with an earlier loss.
pub fn survivors_of_kills_go_on() {
    for _ in 0..4 {
        let (place, held) = meet(5, 5);
        let mut all = Ranks::start("survive", &place);
        held.join().unwrap().unwrap();
        (0..5).for_each(|rank| all.hear(rank, "ready"));
        let mut rng = rand::rng();
        let mut alive: Vec<usize> = (0..5).collect();
        while alive.len() > 2 {
            let victim = alive.remove(rng.random_range(0..alive.len()));
            all.signal(victim, "-KILL");
            spin_for(Duration::from_micros(rng.random_range(0..4000)));
        }
        let said = all.end_of(&alive);
        assert!(said.iter().all(|said| said.ends_with("two are left\n")), "{said:?}");
    }
}

fn spin_for(time: Duration) {
    let until = Deadline::after(time);
    while until.remaining().is_some() {
        std::hint::spin_loop();
    }
}

/// Bytes of the heap that is copied into.
const BYTES: usize = 1 << 20;

/// What the rank that is stopped writes.
const ALIEN: u8 = 0xee;

/// Rank 1 writes to all heaps without end, until it sees that it is left out. The others lose it by a deadline, go
/// on without it, and find nothing that it wrote in the memory of the new group, though it writes on.
fn copy_without_end(group: &Endpoint, _seed: u64) {
    let transport = group.transport();
    let allocate = |transport: &Arc<dyn Transport>| -> Arc<dyn Heap> {
        transport.allocate(HeapSize { bytes: BYTES, words: 1 }, transport.deadline()).unwrap()
    };
    let heap = allocate(transport);
    let source = vec![ALIEN; BYTES];
    if transport.rank() == Rank(1) {
        println!("ready");
        let until = Deadline::after(Duration::from_secs(3));
        while until.remaining().is_some() {
            for to in [0, 2].map(Rank) {
                // SAFETY: nobody reads or writes the payload of this heap but this rank.
                unsafe { heap.put_nbi(to, Payload { offset: SymOffset(0), bytes: &source }).unwrap() };
            }
        }
        let error = transport.shrink(transport.deadline()).unwrap_err();
        assert!(matches!(error, TransportError::Excluded { rank: Rank(1), .. }), "{error}");
        println!("left out");
        return;
    }
    println!("ready");
    let deadline = Deadline::after(Duration::from_millis(500));
    let error = heap.signal_wait_until(SymWord(0), Until::Eq(1), Rank(1), deadline).unwrap_err();
    assert!(
        matches!(error, TransportError::PeerLost { rank: Rank(1), silence: Silence::Deadline, .. }),
        "{error}"
    );
    let shrunk = transport.shrink(transport.deadline()).unwrap();
    assert_eq!(shrunk.survivors, [Rank(0), Rank(2)]);
    let ours = allocate(&shrunk.transport);
    println!("shrunk");
    // Rank 1 goes on now, and writes for seconds.
    let until = Deadline::after(Duration::from_secs(4));
    while until.remaining().is_some() {
        // SAFETY: no rank of the new group writes it.
        let bytes = unsafe { ours.local(SymOffset(0), BYTES) }.unwrap();
        assert_eq!(bytes.iter().position(|&byte| byte != 0), None, "alien bytes");
    }
    shrunk.transport.barrier(shrunk.transport.deadline()).unwrap();
    println!("untouched");
}

pub fn a_stopped_rank_that_wakes_reaches_nothing() {
    let (place, held) = meet(3, 3);
    let mut all = Ranks::start("copy_without_end", &place);
    held.join().unwrap().unwrap();
    (0..3).for_each(|rank| all.hear(rank, "ready"));
    all.signal(1, "-STOP");
    [0, 2].iter().for_each(|&rank| all.hear(rank, "shrunk"));
    all.signal(1, "-CONT");
    let said = all.end_of(&[0, 1, 2]);
    assert_eq!(said, ["untouched\n", "left out\n", "untouched\n"]);
}
