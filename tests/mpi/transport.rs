//! Groups and heaps of MPI ranks, over every layout of nodes that the job has room for.

use std::num::NonZeroUsize;
use std::time::Duration;

use ep_transport::{
    Heap, HeapLayout, HeapSize, MpiOptions, Payload, Signal, SymOffset, SymWord, Traffic, Transport,
    TransportError, Until,
};
use fused_moe_core::Rank;
use rand::{Rng, RngCore};

use crate::{Failure, Job};

const TIMEOUT: Duration = Duration::from_secs(60);

type Check = Result<(), Failure>;

/// An error with the values unless they are equal.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, want: T) -> Check {
    if got == want { Ok(()) } else { Err(format!("{what}: got {got:?}, wanted {want:?}").into()) }
}

/// All checks on all layouts.
pub fn run(job: &Job) -> Check {
    refusals(job)?;
    let size = job.world.size();
    let mut layouts = 0;
    for ranks_per_node in (1..=size).filter(|&node| size.is_multiple_of(node)) {
        let options =
            MpiOptions { ranks: None, ranks_per_node: NonZeroUsize::new(ranks_per_node), timeout: TIMEOUT };
        let group = match job.world.group(options) {
            Err(TransportError::Placement { .. }) if job.world.ranks_per_host().len() > 1 => continue,
            group => group?.ok_or("left out of a group of all")?,
        };
        same("ranks per node", group.ranks_per_node(), ranks_per_node)?;
        same("world size", group.world_size(), size)?;
        collectives(job, &*group)?;
        disagreements(&*group)?;
        puts(job, &*group)?;
        traffic(job, &*group)?;
        drops(&*group)?;
        layouts += 1;
    }
    job.say(format_args!("transport: {layouts} layouts"));
    if layouts == 0 { Err("no layout fits".into()) } else { Ok(()) }
}

/// Groups that cannot be had.
fn refusals(job: &Job) -> Check {
    let size = job.world.size();
    let ask = |ranks: usize, node: usize| {
        let [ranks, ranks_per_node] = [ranks, node].map(NonZeroUsize::new);
        job.world.group(MpiOptions { ranks, ranks_per_node, timeout: TIMEOUT }).map(|group| group.is_some())
    };
    let hosts = job.world.ranks_per_host();
    same("too many", ask(size + 1, 1), Err(TransportError::Placement { ranks: size + 1, hosts }))?;
    let uneven = TransportError::Topology { world_size: size + 1, ranks_per_node: size + 2 };
    same("a remainder", ask(size + 1, size + 2), Err(uneven))?;
    // Rank 0 of the job is in every group, and the last rank of several is in no group of one.
    same("a group of one", ask(1, 1), Ok(job.is_first()))
}

fn collectives(job: &Job, group: &dyn Transport) -> Check {
    for round in 0..30 {
        let gift = |rank: u32| {
            let mut rng = job.random(round << 8 | u64::from(rank));
            let mut bytes = vec![0; rng.random_range(0..5000)];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        let gathered = group.all_gather(&gift(group.rank().0), group.deadline())?;
        let want: Vec<_> = (0..group.world_size() as u32).map(gift).collect();
        same("all-gather", gathered == want, true)?;
        group.barrier(group.deadline())?;
    }
    Ok(())
}

/// Ranks that do not agree are all told so, and the group goes on.
fn disagreements(group: &dyn Transport) -> Check {
    if group.world_size() == 1 {
        return Ok(());
    }
    let is_first = group.rank() == Rank(0);
    let words = if is_first { 5 } else { 4 };
    let sizes = group.allocate(HeapSize { bytes: 64, words }, group.deadline()).err();
    same("sizes", matches!(sizes, Some(TransportError::Mismatch { field: "heap size", .. })), true)?;
    let calls = match is_first {
        true => group.barrier(group.deadline()).err(),
        false => group.all_gather(&[1], group.deadline()).err(),
    };
    same("calls", matches!(calls, Some(TransportError::Mismatch { field: "collective", .. })), true)?;
    let bytes = 1 << 60;
    let memory = group.allocate(HeapSize { bytes, words: 0 }, group.deadline()).err();
    same("memory", memory, Some(TransportError::OutOfMemory { bytes, rank: Rank(0) }))
}

/// Every rank writes to every rank, in all ways, and whoever sees a signal sees what came before it.
fn puts(job: &Job, group: &dyn Transport) -> Check {
    const MOST: usize = 100_000;
    let (me, size) = (group.rank(), group.world_size());
    let mut layout = HeapLayout::default();
    let rows = layout.region(size * MOST);
    let (arrived, taken, counter) = (layout.words(size), layout.words(size), layout.words(1));
    let heap = group.allocate(layout.size(), group.deadline())?;
    let row = |from: Rank| rows + from.index() * MOST;
    // SAFETY: the memory is new, and the peers write only after the barrier.
    unsafe { heap.local_mut(rows, size * MOST)? }.fill(0xee);
    group.barrier(group.deadline())?;

    for round in 1..=25 {
        let message = |from: Rank, to: Rank| {
            let mut rng = job.random(round << 16 | u64::from(from.0) << 8 | u64::from(to.0));
            let len = match rng.random_range(0..4) {
                0 => 0,
                1 => rng.random_range(1..100),
                2 => rng.random_range(1..10_000),
                _ => rng.random_range(1..=MOST),
            };
            let mut bytes = vec![0u8; len];
            rng.fill_bytes(&mut bytes);
            (bytes, rng.random_range(0..3))
        };
        let mut sent = Vec::new();
        for to in (0..size as u32).map(Rank) {
            let (bytes, way) = message(me, to);
            let payload = Payload { offset: row(me), bytes: &bytes };
            let signal = Signal { word: arrived + me.index(), value: round };
            // SAFETY: every rank has a row of its own in each heap, writes it again only when its reader has taken it,
            // and the bytes live until `quiet` below.
            unsafe {
                match way {
                    0 => heap.put_signal(to, payload, signal)?,
                    1 => {
                        heap.put_nbi(to, payload)?;
                        heap.fence();
                        heap.signal_set(to, signal)?;
                    }
                    _ => match heap.peer_slice_mut(to, row(me), bytes.len())? {
                        Some(direct) => {
                            direct.copy_from_slice(&bytes);
                            heap.signal_set(to, signal)?;
                        }
                        None => heap.put_signal(to, payload, signal)?,
                    },
                }
            }
            sent.push(bytes);
        }
        for from in (0..size as u32).map(Rank) {
            let word = arrived + from.index();
            let seen = heap.signal_wait_until(word, Until::Ge(round), from, group.deadline())?;
            same("signal", (seen, heap.signal_read(word)?), (round, round))?;
            let (want, _) = message(from, me);
            // SAFETY: the sender's last access is ordered before its signal, its next one after ours.
            let got = unsafe { heap.local(row(from), want.len())? };
            same(&format!("payload of {from} in round {round}"), got == want, true)?;
            let near = group.node_of(from) == group.node_of(me);
            // SAFETY: as above: the peer's own row is what it wrote to itself.
            let reach = unsafe { heap.peer_slice(from, row(me), 0)? }.is_some();
            same("reach", reach, near)?;
            let added = heap.atomic_fetch_add(from, counter, 1);
            same("atomics", matches!(added, Err(TransportError::OtherNode { .. })), !near)?;
            heap.signal_set(from, Signal { word: taken + me.index(), value: round })?;
        }
        for to in (0..size as u32).map(Rank) {
            heap.signal_wait_until(taken + to.index(), Until::Ge(round), to, group.deadline())?;
        }
        heap.quiet(group.deadline())?;
    }
    group.barrier(group.deadline())?;
    same("counter", heap.signal_read(counter)?, 25 * group.ranks_per_node() as u64)?;
    bounds(&*heap, layout.size())
}

/// What is not there is refused, whoever it belongs to.
fn bounds(heap: &dyn Heap, size: HeapSize) -> Check {
    let all = heap.size();
    same("size", all, size)?;
    for to in [heap.rank(), Rank(0)] {
        let (word, offset) = (SymWord(size.words), SymOffset(size.bytes));
        let no_word = Some(TransportError::NoSuchWord { word, size });
        same("word", heap.signal_set(to, Signal { word, value: 1 }).err(), no_word.clone())?;
        let out = Some(TransportError::OutOfBounds { offset, len: 1, size });
        // SAFETY: nothing is written.
        let put = unsafe { heap.put_nbi(to, Payload { offset, bytes: &[1] }) };
        same("range", put.err(), out)?;
        // SAFETY: nothing is written.
        let put = unsafe {
            let (offset, value) = (SymOffset(0), 1);
            heap.put_signal(to, Payload { offset, bytes: &[1] }, Signal { word, value })
        };
        same("word behind a put", put.err(), no_word)?;
    }
    let nobody = Rank(u32::MAX);
    let missing = heap.signal_set(nobody, Signal { word: SymWord(0), value: 1 }).err();
    same("rank", matches!(missing, Some(TransportError::NoSuchRank { .. })), true)
}

/// As over threads, to the byte.
fn traffic(job: &Job, group: &dyn Transport) -> Check {
    let (me, size) = (group.rank(), group.world_size());
    let heap = group.allocate(HeapSize { bytes: size * 256, words: size }, group.deadline())?;
    let (before, mut want) = (group.traffic(), Traffic::default());
    let offset = SymOffset(me.index() * 256);
    let mut rng = job.random(u64::from(me.0) << 32);
    for value in 0..200 {
        let to = Rank(rng.random_range(0..size as u32));
        let len = if rng.random_ratio(1, 6) { 0 } else { rng.random_range(1..=256) };
        let (bytes, signal) = (vec![7; len], Signal { word: SymWord(me.index()), value });
        let payload = Payload { offset, bytes: &bytes };
        // SAFETY: every rank writes its own 256 bytes of each heap, and no one reads them; `quiet` follows at once.
        let (moves, signals) = unsafe {
            match rng.random_range(0..5) {
                0 => (heap.put_nbi(to, payload).map(|()| true)?, false),
                1 => (heap.put_signal(to, payload, signal).map(|()| true)?, true),
                2 => (heap.signal_set(to, signal).map(|()| false)?, true),
                3 => (heap.peer_slice_mut(to, offset, len)?.is_some(), false),
                _ => (false, heap.atomic_fetch_add(to, SymWord(me.index()), 1).is_ok()),
            }
        };
        heap.quiet(group.deadline())?;
        let moved = if moves { len as u64 } else { 0 };
        if to == me {
            want.local_bytes += moved;
        } else {
            want.remote_bytes += moved;
            want.internode_bytes += if group.node_of(to) == group.node_of(me) { 0 } else { moved };
            want.remote_puts += u64::from(moved > 0);
            want.signals += u64::from(signals);
        }
    }
    same("traffic", group.traffic() - before, want)?;
    group.barrier(group.deadline())?;
    Ok(())
}

/// Heaps are dropped in another order on every rank, and new ones are zero.
fn drops(group: &dyn Transport) -> Check {
    let size = HeapSize { bytes: 10_000, words: 3 };
    let mut heaps = Vec::new();
    for round in 0..6 {
        let heap = group.allocate(size, group.deadline())?;
        // SAFETY: the heap is this rank's alone until the end of the round.
        let bytes = unsafe { heap.local_mut(SymOffset(0), size.bytes)? };
        same("new memory", bytes.iter().all(|&byte| byte == 0), true)?;
        same("new words", heap.signal_read(SymWord(2))?, 0)?;
        bytes.fill(0xee);
        heap.signal_set(group.rank(), Signal { word: SymWord(2), value: 9 })?;
        heaps.push(heap);
        if heaps.len() == 3 {
            heaps.remove((group.rank().index() + round) % 3);
        }
    }
    Ok(())
}
