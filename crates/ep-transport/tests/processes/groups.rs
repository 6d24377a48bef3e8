//! The tests, and what their ranks do.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ep_transport::{
    Awaited, Collective, Deadline, Endpoint, HeapSize, Payload, ProcessOptions, RendezvousError, Signal,
    Silence, SymOffset, SymWord, Token, Transport, TransportError, Until, join_processes,
};
use fused_moe_core::Rank;
use libtest_mimic::{Arguments, Failed, Trial};

use crate::common::{Exchange, ranks};
use crate::ranks::{Place, Ranks, meet, meet_within};
use crate::shrinks;

/// A time that is nothing beside the timeout of 30 s.
const SOON: Duration = Duration::from_secs(5);

/// Runs the tests, or is a rank of one.
pub fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some("rank") {
        return be_a_rank(&args.collect::<Vec<_>>());
    }
    let tests: [(&str, fn()); 12] = [
        ("payloads_are_seen_with_their_signals", payloads_are_seen_with_their_signals),
        ("collectives_carry_what_was_given", collectives_carry_what_was_given),
        ("memory_is_as_announced_and_needs_no_descriptors", memory_is_as_announced_and_needs_no_descriptors),
        ("a_node_boundary_is_simulated", a_node_boundary_is_simulated),
        (
            "memory_that_cannot_be_had_is_an_error_everywhere",
            memory_that_cannot_be_had_is_an_error_everywhere,
        ),
        ("a_killed_rank_is_noticed_at_once", a_killed_rank_is_noticed_at_once),
        ("a_stopped_rank_is_lost_at_the_deadline", a_stopped_rank_is_lost_at_the_deadline),
        ("survivors_of_kills_go_on", shrinks::survivors_of_kills_go_on),
        ("a_stopped_rank_that_wakes_reaches_nothing", shrinks::a_stopped_rank_that_wakes_reaches_nothing),
        ("strangers_are_sent_away", strangers_are_sent_away),
        ("a_rank_that_does_not_come_is_named", a_rank_that_does_not_come_is_named),
        ("a_rank_that_dies_on_the_way_is_named", a_rank_that_dies_on_the_way_is_named),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            test();
            Ok::<(), Failed>(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

/// Runs `body` on all ranks, which must end well.
fn run(body: &str, world_size: usize, ranks_per_node: usize) {
    let (place, held) = meet(world_size, ranks_per_node);
    Ranks::start(body, &place).end(None);
    held.join().unwrap().unwrap();
}

/// What a rank does, by its name.
fn be_a_rank(args: &[String]) -> ExitCode {
    let [body, rank, world_size, ranks_per_node, address, token, seed] = args else {
        panic!("wrong arguments {args:?}")
    };
    let place = Place {
        world_size: world_size.parse().unwrap(),
        ranks_per_node: ranks_per_node.parse().unwrap(),
        address: address.parse().unwrap(),
        token: token.parse().unwrap(),
        seed: seed.parse().unwrap(),
    };
    let options = place.options(rank.parse().unwrap());
    if body == "hang_up" && options.rank == Rank(1) {
        return ExitCode::SUCCESS;
    }
    let joined = join_processes(&options);
    if body == "hang_up" {
        let reason = RendezvousError::Missing(Rank(1));
        assert_eq!(joined.err(), Some(TransportError::Rendezvous { address: place.address, reason }));
        return ExitCode::SUCCESS;
    }
    let group = Endpoint::new(joined.unwrap());
    let body: fn(&Endpoint, u64) = match body.as_str() {
        "exchange" => exchange,
        "collectives" => collectives,
        "memory" => memory,
        "boundary" => boundary,
        "too_much" => too_much,
        "wait" => wait,
        "wait_briefly" => wait_briefly,
        other => shrinks::body(other).unwrap_or_else(|| panic!("nothing is called {other:?}")),
    };
    body(&group, place.seed);
    ExitCode::SUCCESS
}

fn payloads_are_seen_with_their_signals() {
    run("exchange", 1, 1);
    run("exchange", 2, 2);
    run("exchange", 5, 5);
}

/// Rounds that must be right; and, as the negative control, rounds in which rank 1 sends signals without payloads.
fn exchange(group: &Endpoint, seed: u64) {
    let exchange = Exchange::new(group, seed).unwrap();
    let saboteur = group.transport().rank() == Rank(1);
    for round in 1..=1000 {
        assert_eq!(exchange.round(round, false).unwrap(), [], "seed {seed}, round {round}");
    }
    let caught = (1001..=1040).filter(|&round| {
        let wrong = exchange.round(round, saboteur).unwrap();
        assert!(wrong.iter().all(|&rank| rank == Rank(1)), "seed {seed}, round {round}: {wrong:?}");
        !wrong.is_empty()
    });
    // One payload in eight is empty, and right without a put.
    assert!(caught.count() > 20 || group.transport().world_size() == 1, "seed {seed}");
}

fn collectives_carry_what_was_given() {
    run("collectives", 1, 1);
    run("collectives", 4, 4);
}

fn collectives(group: &Endpoint, seed: u64) {
    let transport = group.transport();
    let deadline = transport.deadline();
    let gift = |round: u64, rank: Rank| {
        // Up to three postings long.
        let len = (seed ^ (round * 7919 + u64::from(rank.0) * 104_729)) % (200 << 10);
        (0..len).map(|at| (at ^ round ^ u64::from(rank.0)) as u8).collect::<Vec<_>>()
    };
    for round in 0..30 {
        let want: Vec<_> = ranks(transport.world_size()).map(|rank| gift(round, rank)).collect();
        assert_eq!(
            transport.all_gather(&gift(round, transport.rank()), deadline).unwrap(),
            want,
            "seed {seed}"
        );
        transport.barrier(deadline).unwrap();
    }
    if transport.world_size() > 1 {
        let odd = transport.rank() == Rank(1);
        let refused = transport.allocate(HeapSize { bytes: 64, words: usize::from(odd) }, deadline).err();
        assert!(matches!(refused, Some(TransportError::Mismatch { field: "heap size", .. })), "{refused:?}");
        let refused =
            if odd { transport.barrier(deadline) } else { transport.all_gather(&[], deadline).map(drop) };
        assert!(matches!(refused, Err(TransportError::Mismatch { field: "collective", .. })), "{refused:?}");
    }
    transport.barrier(deadline).unwrap();
}

fn memory_is_as_announced_and_needs_no_descriptors() {
    run("memory", 3, 3);
}

/// Bytes of this process that are mapped from heaps' files.
fn mapped_bytes() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ours = maps.lines().filter(|line| line.contains("/memfd:fused-moe"));
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(usize::from_str_radix(end, 16).ok()? - usize::from_str_radix(start, 16).ok()?)
    };
    ours.map(|line| range(line).unwrap()).sum()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn memory(group: &Endpoint, _seed: u64) {
    let transport = group.transport();
    let before = (mapped_bytes(), descriptors());
    let size = HeapSize { bytes: 3_000_000, words: 1000 };
    let heap = transport.allocate(size, transport.deadline()).unwrap();
    // SAFETY: no rank writes before the barrier.
    assert!(unsafe { heap.local(SymOffset(0), size.bytes) }.unwrap().iter().all(|&byte| byte == 0));
    transport.barrier(transport.deadline()).unwrap();
    assert_eq!(mapped_bytes() - before.0, transport.world_size() * size.required_bytes());
    assert_eq!(descriptors(), before.1);
    drop(heap);
    assert_eq!((mapped_bytes(), descriptors()), before);
    transport.barrier(transport.deadline()).unwrap();
}

fn a_node_boundary_is_simulated() {
    run("boundary", 4, 2);
}

fn boundary(group: &Endpoint, _seed: u64) {
    let transport = group.transport();
    let me = transport.rank();
    let size = HeapSize { bytes: 4 * 64, words: 4 };
    let heap = transport.allocate(size, transport.deadline()).unwrap();
    let word = SymWord(me.index());
    for to in ranks(4) {
        let near = transport.node_of(to) == transport.node_of(me);
        assert_eq!(heap.peer_ptr(to, SymOffset(0), 1).unwrap().is_some(), near);
        assert_eq!(heap.atomic_fetch_add(to, word, 0).is_ok(), near);
        let payload = Payload { offset: SymOffset(64 * me.index()), bytes: &[1 + me.0 as u8; 64] };
        // SAFETY: the range is this rank's alone to write, and is read after the signal.
        unsafe { heap.put_signal(to, payload, Signal { word, value: 1 }).unwrap() };
    }
    for from in ranks(4) {
        heap.signal_wait_until(SymWord(from.index()), Until::Eq(1), from, transport.deadline()).unwrap();
        // SAFETY: the only write is ordered before the signal.
        assert_eq!(unsafe { heap.local(SymOffset(64 * from.index()), 64) }.unwrap(), [1 + from.0 as u8; 64]);
    }
    let traffic = transport.traffic();
    assert_eq!((traffic.remote_bytes, traffic.internode_bytes, traffic.local_bytes), (192, 128, 64));
    transport.barrier(transport.deadline()).unwrap();
}

fn memory_that_cannot_be_had_is_an_error_everywhere() {
    run("too_much", 2, 2);
}

fn too_much(group: &Endpoint, _seed: u64) {
    let (transport, bytes) = (group.transport(), 1 << 60);
    let error = transport.allocate(HeapSize { bytes, words: 0 }, transport.deadline()).err();
    assert_eq!(error, Some(TransportError::OutOfMemory { bytes, rank: Rank(0) }));
    transport.allocate(HeapSize { bytes: 100, words: 0 }, transport.deadline()).unwrap();
}

/// Waits for a signal of rank 1 that never comes, and for a barrier to which it never comes.
fn lose_rank_1(group: &Endpoint, timeout: Duration) -> [Silence; 2] {
    let transport = group.transport();
    let heap = transport.allocate(HeapSize { bytes: 0, words: 1 }, transport.deadline()).unwrap();
    println!("ready");
    let deadline = Deadline::after(timeout);
    if transport.rank() == Rank(1) {
        // Until it is killed, or nobody is left.
        let _ = heap.signal_wait_until(SymWord(0), Until::Eq(1), Rank(0), transport.deadline());
        std::process::exit(3);
    }
    let silence_of = |error: Option<TransportError>, operation: &str| match error {
        Some(TransportError::PeerLost { rank: Rank(1), silence, .. }) => silence,
        other => panic!("{operation} ends with {other:?}"),
    };
    let waited = heap.signal_wait_until(SymWord(0), Until::Eq(1), Rank(1), deadline).err();
    let in_wait = silence_of(waited, "the wait");
    let error = transport.barrier(Deadline::after(timeout)).unwrap_err();
    let awaited = Awaited::Collective(Collective::Barrier);
    assert!(matches!(&error, TransportError::PeerLost { awaited: it, .. } if *it == awaited), "{error}");
    [in_wait, silence_of(Some(error), "the barrier")]
}

fn a_killed_rank_is_noticed_at_once() {
    let (place, held) = meet(3, 3);
    let mut all = Ranks::start("wait", &place);
    held.join().unwrap().unwrap();
    (0..3).for_each(|rank| all.hear(rank, "ready"));
    let start = Instant::now();
    all.signal(1, "-KILL");
    all.end(Some(1));
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
}

fn wait(group: &Endpoint, _seed: u64) {
    assert_eq!(lose_rank_1(group, Duration::from_secs(30)), [Silence::Died; 2]);
}

fn a_stopped_rank_is_lost_at_the_deadline() {
    let (place, held) = meet(3, 3);
    let mut all = Ranks::start("wait_briefly", &place);
    held.join().unwrap().unwrap();
    (0..3).for_each(|rank| all.hear(rank, "ready"));
    all.signal(1, "-STOP");
    all.end(Some(1));
}

fn wait_briefly(group: &Endpoint, _seed: u64) {
    assert_eq!(lose_rank_1(group, Duration::from_millis(300)), [Silence::Deadline; 2]);
}

fn strangers_are_sent_away() {
    let (place, held) = meet(1, 1);
    let refused = |options: ProcessOptions| match join_processes(&options) {
        Err(TransportError::Rendezvous { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let good = place.options(0);
    let foreign = ProcessOptions { token: Token::random().unwrap(), ..good };
    assert_eq!(refused(foreign), RendezvousError::Token);
    let (mine, theirs) = ((2, 1), (1, 1));
    let of_another = ProcessOptions { world_size: 2, ranks_per_node: NonZeroUsize::new(1), ..good };
    assert_eq!(refused(of_another), RendezvousError::Topology { rank: Rank(0), mine, theirs });
    let beyond = ProcessOptions { rank: Rank(1), ..good };
    let (mine, theirs) = ((1, 1), (1, 1));
    assert_eq!(refused(beyond), RendezvousError::Topology { rank: Rank(1), mine, theirs });
    // One that says nothing, and one that says something else, are in nobody's way.
    let silent = std::net::TcpStream::connect(place.address).unwrap();
    let mut other = std::net::TcpStream::connect(place.address).unwrap();
    std::io::Write::write_all(&mut other, &[b'x'; 200]).unwrap();
    let joined = join_processes(&good).unwrap();
    joined.barrier(joined.deadline()).unwrap();
    held.join().unwrap().unwrap();
    drop(silent);
}

fn a_rank_that_does_not_come_is_named() {
    let (place, held) = meet_within(Duration::from_millis(300), 2, 2);
    let missing = |rank| {
        let reason = RendezvousError::Missing(Rank(rank));
        Some(TransportError::Rendezvous { address: place.address, reason })
    };
    assert_eq!(join_processes(&place.options(0)).err(), missing(1));
    assert_eq!(held.join().unwrap().err(), missing(1));
    // And there is no one to come to afterwards.
    let late = ProcessOptions { timeout: Duration::from_millis(50), ..place.options(1) };
    let reason = RendezvousError::Address(std::io::ErrorKind::ConnectionRefused);
    let refused = TransportError::Rendezvous { address: place.address, reason };
    assert_eq!(join_processes(&late).err(), Some(refused));
}

/// Rank 1 ends before it has said anything.
fn a_rank_that_dies_on_the_way_is_named() {
    let (place, held) = meet_within(Duration::from_secs(2), 2, 2);
    Ranks::start("hang_up", &place).end(None);
    assert!(held.join().unwrap().is_err());
}
