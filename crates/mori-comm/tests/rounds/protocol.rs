//! Every copy arrives once, whole, at every rank that needs it and nowhere else; every sum has its order and its
//! roundings.

use std::collections::HashSet;
use std::sync::Barrier;

use ep_transport::Traffic;
use fused_moe_core::{DType, ErrorKind, Fault, NO_EXPERT, PrepareFinalizeProvider, ProcessGroup, WireFormat};
use half::bf16;
use mori_comm::MoriBackend;
use proptest::prelude::*;

use crate::world::{Rank, Round, World, hash};

/// The order in which a sum goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Forward,
    Backward,
}

impl Order {
    fn of<T: Copy>(self, items: &[T]) -> Vec<T> {
        let mut items = items.to_vec();
        if self == Order::Backward {
            items.reverse();
        }
        items
    }
}

/// The sum for an element of a token: over slots inside a node, rounded to bf16 if there are several, over nodes.
fn sum(world: &World, source: (usize, usize), column: usize, (slots, nodes): (Order, Order)) -> f32 {
    let ranks = world.ranks_of(source);
    let all: Vec<usize> = (0..world.nodes).collect();
    let of_node = |node: usize| {
        let ranks: Vec<_> =
            ranks.iter().copied().filter(|rank| rank / world.ranks_per_node == node).collect();
        let outputs = slots.of(&ranks).into_iter().map(|rank| world.output(rank, source, column).to_f32());
        let sum = outputs.fold(0.0, |sum, x| sum + x);
        if world.nodes > 1 { bf16::from_f32(sum).to_f32() } else { sum }
    };
    nodes.of(&all).into_iter().map(of_node).fold(0.0, |sum, x| sum + x)
}

/// Elements of all ranks whose bits are not those of the sums in this order.
fn differing(world: &World, rounds: &[Round], order: (Order, Order)) -> usize {
    let elements = rounds.iter().enumerate().flat_map(|(rank, round)| {
        round.out.iter().enumerate().map(move |(at, &got)| {
            let source = (rank, at / world.hidden);
            got.to_bits() != sum(world, source, at % world.hidden, order).to_bits()
        })
    });
    elements.filter(|&differs| differs).count()
}

fn check(world: &World, rounds: &[Round]) {
    let mut arrived = 0;
    for (rank, round) in rounds.iter().enumerate() {
        let sources: HashSet<_> = round.rows.iter().map(|row| row.source).collect();
        assert_eq!(sources.len(), round.rows.len(), "a token came twice to rank {rank}");
        for row in &round.rows {
            assert!(row.source.1 < world.tokens(row.source.0), "{row:?} is nobody's token");
            assert_eq!(*row, world.row(row.source), "on rank {rank}");
            assert!(world.ranks_of(row.source).contains(&rank), "{row:?} has no business on rank {rank}");
        }
        arrived += round.rows.len();
    }
    let tokens = (0..world.ranks()).flat_map(|rank| (0..world.tokens(rank)).map(move |token| (rank, token)));
    let sent: usize = tokens.map(|source| world.ranks_of(source).len()).sum();
    assert_eq!(arrived, sent, "rows in all");
    assert_eq!(differing(world, rounds, (Order::Forward, Order::Forward)), 0, "elements off");
}

fn run(world: &World, backend: MoriBackend, rounds: usize) -> Vec<Vec<Round>> {
    let by_rank = world.run(|group| {
        let mut rank = Rank::new(world, backend, &group);
        (0..rounds).map(|_| rank.round().unwrap()).collect::<Vec<_>>()
    });
    (0..rounds).map(|number| by_rank.iter().map(|rounds| rounds[number].clone()).collect()).collect()
}

/// Experts anywhere, tokens up to three chunks, padding in some slots; idle ranks and ranks without experts.
fn worlds() -> impl Strategy<Value = World> {
    let nodes =
        prop_oneof![Just((1, 3)), Just((2, 1)), Just((2, 2)), Just((3, 2)), Just((2, 3)), Just((4, 2))];
    let counts = prop_oneof![Just(0usize), Just(1), Just(63), Just(64), Just(65), 2usize..40, 100usize..150];
    (nodes, 2usize..24, 1usize..9, prop::collection::vec(counts, 8), any::<u32>()).prop_map(
        |((nodes, ranks_per_node), hidden, top_k, counts, seed)| {
            let ranks = nodes * ranks_per_node;
            let experts = top_k + 5;
            let draw = |parts: &[usize]| hash(&[&[seed as usize], parts].concat()) as usize;
            let owners = (0..experts).map(|expert| draw(&[expert]) % ranks).collect();
            let ids = (0..ranks).map(|rank| {
                let token = |token: usize| {
                    // A random rotation of the experts, then of the slots: distinct ids.
                    let (first, stride) =
                        (draw(&[rank, token, 1]), 1 + draw(&[rank, token, 2]) % (experts - 1));
                    let coprime =
                        (stride..).find(|stride| (2..=experts).all(|d| experts % d != 0 || stride % d != 0));
                    let stride = coprime.unwrap_or(1);
                    (0..top_k).map(move |slot| match draw(&[rank, token, slot, 3]) % 5 {
                        0 => NO_EXPERT,
                        _ => ((first % experts + slot * stride) % experts) as i32,
                    })
                };
                (0..counts[rank]).flat_map(token).collect()
            });
            let ids = ids.collect();
            World { nodes, ranks_per_node, hidden, top_k, max_received_rows: None, owners, ids }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn what_is_sent_arrives_and_is_summed(world in worlds(), backend in prop::sample::select(&MoriBackend::ALL)) {
        for rounds in run(&world, backend, 2) {
            check(&world, &rounds);
        }
    }
}

/// A kernel that sums slots or nodes in another order, or rounds elsewhere, is found by these very rounds.
#[test]
fn another_order_gives_other_bits() {
    let world = World::everywhere();
    for backend in MoriBackend::ALL {
        let rounds = &run(&world, backend, 1)[0];
        check(&world, rounds);
        assert!(differing(&world, rounds, (Order::Backward, Order::Forward)) > 0);
        let unrounded = World { nodes: 1, ranks_per_node: 8, ..world.clone() };
        assert!(differing(&unrounded, rounds, (Order::Forward, Order::Forward)) > 0);
    }
    // Huge outputs of neighbours cancel each other between nodes of one rank.
    let world = World { nodes: 8, ranks_per_node: 1, ..world };
    let rounds = &run(&world, MoriBackend::HighThroughput, 1)[0];
    check(&world, rounds);
    assert!(differing(&world, rounds, (Order::Forward, Order::Backward)) > 0);
}

/// A rank sends while its peers have not even begun, and computes something else before it receives.
#[test]
fn a_send_waits_for_nobody() {
    let world = World::everywhere();
    for backend in MoriBackend::ALL {
        let sent = Barrier::new(world.ranks());
        world.run(|group| {
            let mut rank = Rank::new(&world, backend, &group);
            if group.rank().0 == 0 {
                drop(rank.prepare_send().unwrap());
                sent.wait();
            } else {
                sent.wait();
                drop(rank.prepare_send().unwrap());
            }
            // The dropped ticket ends with the next round, in which all goes well.
            assert!(rank.round().is_ok());
        });
    }
}

/// More rows than fit are the same error on all ranks, wherever they were too many: sent by a rank of the node, or
/// forwarded by one. The next round is right.
#[test]
fn more_rows_than_fit_are_an_error_everywhere() {
    let full = World::everywhere();
    // The tokens of three ranks, of either node.
    for (nodes, senders) in [(1, [0, 3, 6]), (2, [1, 2, 3]), (2, [4, 6, 7]), (4, [0, 5, 7])] {
        let world = World { nodes, ranks_per_node: 8 / nodes, max_received_rows: Some(200), ..full.clone() };
        let of = |rank: usize, tokens: usize| match senders.contains(&rank) {
            true => full.ids[rank][..tokens * full.top_k].to_vec(),
            false => Vec::new(),
        };
        let many = World { ids: (0..8).map(|rank| of(rank, 67)).collect(), ..world.clone() };
        let few = World { ids: (0..8).map(|rank| of(rank, 66)).collect(), ..world.clone() };
        for backend in MoriBackend::ALL {
            let ends = world.run(|group| {
                let mut rank = Rank::new(&world, backend, &group);
                rank.bring(&many);
                let failed = rank.round().unwrap_err().kind;
                rank.bring(&few);
                (failed, rank.round().unwrap())
            });
            let (failed, rounds): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
            assert!(failed.iter().all(|kind| *kind == failed[0]), "{failed:?}");
            let ErrorKind::RankFailed { fault, .. } = failed[0] else { panic!("{failed:?}") };
            assert!(matches!(fault, Fault::TooManyReceivedRows { rows: 201.., max: 200, .. }), "{fault:?}");
            check(&few, &rounds);
        }
    }
}

/// The bytes that a backend says a token moves over each link are those that the transport counts.
#[test]
fn bytes_are_those_that_were_announced() {
    for (nodes, backend) in
        [(1, MoriBackend::HighThroughput), (2, MoriBackend::HighThroughput), (4, MoriBackend::LowLatency)]
    {
        let world = World { nodes, ranks_per_node: 8 / nodes, ..World::everywhere() };
        let moved = world.run(|group| {
            let mut rank = Rank::new(&world, backend, &group);
            let before = group.transport().traffic();
            rank.round().unwrap();
            group.transport().traffic() - before
        });
        let config = world.config();
        let announced = backend.traffic(&config, &WireFormat::unquantized(DType::Bf16)).unwrap();
        let (dispatch, combine) = (announced.dispatch, announced.combine);
        let tokens: usize = (0..8).map(|rank| world.tokens(rank)).sum();
        let total = |link: fn(&Traffic) -> u64| moved.iter().map(link).sum::<u64>() as f64 / tokens as f64;
        let network = total(|traffic| traffic.internode_bytes);
        let scale_up = total(|traffic| traffic.remote_bytes) - network;
        for (counted, announced) in
            [(network, dispatch.network + combine.network), (scale_up, dispatch.scale_up + combine.scale_up)]
        {
            assert!(
                (counted - announced).abs() <= 1e-6 * announced,
                "{nodes} nodes: {counted} of {announced}"
            );
        }
    }
}
