//! Replicas: the choice among them, what is recorded, and what is proposed.

use fused_moe_core::{ExpertPlacement, SingleRank};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;
use router::eplb::{
    Balance, Demand, Fallback, LoadError, LoadRecorder, LoadShape, MapError, Method, ProposalError,
    ReplicaTable, Strategy, TableError, propose, sum_over_ranks,
};
use router::simulate::{Distribution, Simulator};
use rstest::rstest;

/// A new seed in every run, printed so that a failure can be had again.
fn fresh() -> Pcg64Mcg {
    let seed = rand::random();
    println!("seed {seed}");
    Pcg64Mcg::seed_from_u64(seed)
}

/// Every expert once, and random ones in the redundant slots, all in random order.
fn random_table(rng: &mut impl Rng, experts: usize, redundant: usize) -> ReplicaTable {
    let mut slots: Vec<u32> = (0..experts as u32).collect();
    slots.extend((0..redundant).map(|_| rng.random_range(0..experts as u32)));
    for at in (1..slots.len()).rev() {
        slots.swap(at, rng.random_range(0..=at));
    }
    ReplicaTable::new(experts, slots).unwrap()
}

fn rows(exponent: f64, experts: usize, tokens: usize, seed: u64) -> Vec<i32> {
    Simulator::new(Distribution::Zipf { exponent }, experts, TOP_K, seed).unwrap().draw(tokens).ids
}

const TOP_K: usize = 4;

#[test]
fn a_token_goes_to_the_replica_of_the_formula() {
    let mut rng = fresh();
    for _ in 0..50 {
        let (experts, redundant) = (rng.random_range(1..20), rng.random_range(0..20));
        let table = random_table(&mut rng, experts, redundant);
        let logical: Vec<i32> = (0..300).map(|_| rng.random_range(-1..experts as i32)).collect();
        let mut physical = vec![i32::MIN; 300];
        table.map(3, &logical, &mut physical).unwrap();
        for (at, (&logical, &physical)) in logical.iter().zip(&physical).enumerate() {
            if logical == -1 {
                assert_eq!(physical, -1);
                continue;
            }
            let holders = table.physical_to_logical().iter().enumerate();
            let replicas: Vec<usize> =
                holders.filter(|(_, held)| **held == logical as u32).map(|(slot, _)| slot).collect();
            let token = (at / 3) as u64;
            let replica = ((token * 2_654_435_769) & 0xFFFF_FFFF) % replicas.len() as u64;
            assert_eq!(physical, replicas[replica as usize] as i32, "token {token} to {replicas:?}");
        }
        let mut in_place = logical.clone();
        table.map_in_place(3, &mut in_place).unwrap();
        assert_eq!(in_place, physical);
    }
}

#[test]
fn a_token_index_of_more_than_32_bits_counts_by_its_lower_ones() {
    let table = ReplicaTable::identity(1, 6).unwrap();
    for token in [0usize, 1, 5, 1 << 20, u32::MAX as usize] {
        assert_eq!(table.physical(token + (1 << 32), 0), table.physical(token, 0));
        assert_eq!(
            table.physical(token, 0),
            Some((((token as u128 * 2_654_435_769) & 0xFFFF_FFFF) % 7) as i32)
        );
    }
}

#[rstest]
fn replicas_share_the_tokens_of_their_expert(#[values(2, 3, 4, 5, 7, 8)] replicas: usize) {
    let table = ReplicaTable::identity(1, replicas - 1).unwrap();
    let mut ids = vec![0; 4096];
    table.map_in_place(1, &mut ids).unwrap();
    for slot in 0..replicas as i32 {
        let share = ids.iter().filter(|&&id| id == slot).count() as f64 / 4096.0;
        assert!((share * replicas as f64 - 1.0).abs() < 0.02, "slot {slot} of {replicas}: {share}");
    }
}

#[test]
fn experts_of_a_row_stay_distinct() {
    let mut rng = fresh();
    let table = random_table(&mut rng, 16, 16);
    let mut ids = rows(0.0, 16, 500, rng.random());
    table.map_in_place(TOP_K, &mut ids).unwrap();
    for row in ids.chunks(TOP_K) {
        assert!((1..TOP_K).all(|slot| !row[..slot].contains(&row[slot])), "{row:?}");
    }
}

#[rstest]
#[case(&[0, 1, 2], 2, "3 ids are not rows of 2")]
#[case(&[0, 1], 0, "2 ids are not rows of 0")]
#[case(&[0, 1, -1, 3], 2, "expert id 3 of token 1 in slot 1 is neither -1 nor in 0..3")]
#[case(&[-2, 1], 2, "expert id -2 of token 0 in slot 0 is neither -1 nor in 0..3")]
fn rows_that_cannot_be_mapped_are_untouched(#[case] ids: &[i32], #[case] top_k: usize, #[case] why: &str) {
    let table = ReplicaTable::identity(3, 1).unwrap();
    let mut out = vec![77; ids.len()];
    assert_eq!(table.map(top_k, ids, &mut out).unwrap_err().to_string(), why);
    assert!(out.iter().all(|&id| id == 77));
    let mut in_place = ids.to_vec();
    assert!(table.map_in_place(top_k, &mut in_place).is_err());
    assert_eq!(in_place, ids);
    let short = table.map(1, &[0, 1], &mut out[..1]);
    assert_eq!(short, Err(MapError::Output { output: 1, input: 2 }));
}

#[rstest]
#[case(0, vec![], TableError::Empty)]
#[case(2, vec![0, 1, 2], TableError::NoSuchExpert { slot: 2, expert: 2, num_logical: 2 })]
#[case(1, vec![u32::MAX], TableError::NoSuchExpert { slot: 0, expert: u32::MAX, num_logical: 1 })]
#[case(3, vec![0, 2, 0, 2], TableError::NoReplica { expert: 1, slots: 4 })]
fn tables_are_validated(#[case] experts: usize, #[case] slots: Vec<u32>, #[case] why: TableError) {
    assert_eq!(ReplicaTable::new(experts, slots), Err(why));
}

#[test]
fn a_table_is_read_in_every_form() {
    let table = ReplicaTable::new(3, vec![2, 0, 2, 1, 2]).unwrap();
    assert_eq!((table.num_logical(), table.num_physical(), table.max_replicas()), (3, 5, 3));
    assert_eq!(table.replicas_of(2), [0, 2, 4]);
    assert_eq!(table.replicas_of(3), [0i32; 0]);
    assert_eq!(table.replicas_of(usize::MAX), [0i32; 0]);
    assert_eq!(table.to_rows(3).unwrap(), [1, -1, -1, 3, -1, -1, 0, 2, 4]);
    assert_eq!(table.to_rows(2), Err(TableError::TooManyReplicas { expert: 2, replicas: 3, columns: 2 }));
    assert_eq!(table.logical_load(&[1, 2, 4, 8, 16]), [2, 8, 21]);
    let identity = ReplicaTable::identity(3, 2).unwrap();
    assert_eq!(identity.physical_to_logical(), [0, 1, 2, 0, 1]);
    assert_eq!(identity.changed_slots(&table).collect::<Vec<_>>(), [0, 1, 3, 4]);
    assert_eq!(identity.changed_slots(&identity).count(), 0);
}

#[test]
fn a_recorder_keeps_the_last_steps() {
    let shape = LoadShape { layers: 2, physical: 3, window: 2 };
    let mut recorder = LoadRecorder::new(shape).unwrap();
    recorder.record(1, &[0, 0, -1, 2]).unwrap();
    recorder.record(1, &[0]).unwrap();
    recorder.end_step();
    recorder.record(1, &[1]).unwrap();
    assert_eq!((recorder.load(0), recorder.load(1)), (vec![0; 3], vec![3, 1, 1]));
    assert_eq!(recorder.steps(1).collect::<Vec<_>>(), [[3, 0, 1], [0, 1, 0]]);
    recorder.end_step();
    assert_eq!(recorder.load(1), [0, 1, 0]);
    recorder.set_recording(false);
    recorder.record(1, &[2, 2]).unwrap();
    recorder.end_step();
    assert_eq!(recorder.load(1), [0, 1, 0], "recording is off");
    recorder.set_recording(true);
    recorder.record(0, &[2]).unwrap();
    recorder.clear(1);
    assert_eq!((recorder.load(0), recorder.load(1)), (vec![0, 0, 1], vec![0; 3]));
    assert_eq!((recorder.load(2), recorder.steps(2).count()), (vec![], 0));

    let error = recorder.record(2, &[0]).unwrap_err();
    assert!(matches!(error, LoadError::NoSuchLayer { layer: 2, layers: 2 }), "{error}");
    let error = recorder.record(1, &[0, 3]).unwrap_err();
    assert!(matches!(error, LoadError::NoSuchExpert { position: 1, id: 3, physical: 3 }), "{error}");
    assert_eq!(recorder.load(1), [0; 3], "a refused row counts nothing");
    assert!(matches!(LoadRecorder::new(LoadShape { window: 0, ..shape }), Err(LoadError::EmptyWindow)));
    assert_eq!(sum_over_ranks(&SingleRank, &[1, u64::MAX]).unwrap(), [1, u64::MAX]);
}

fn demand(load: &[u64]) -> Demand<'_> {
    let strategy = Strategy::Auto;
    Demand { load, ranks: 4, slots_per_rank: 3, nodes: 1, groups: 1, strategy, current: None }
}

/// Loads over some orders of magnitude, many of them equal, some 0.
fn loads() -> impl proptest::strategy::Strategy<Value = Vec<u64>> {
    prop::collection::vec(prop_oneof![Just(0), Just(7), 0..100u64, 0..1_000_000u64], 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn proposals_are_whole_fair_and_the_same_again(load in loads(), ranks in 1usize..9, more in 0usize..4) {
        let slots_per_rank = load.len().div_ceil(ranks) + more;
        let slots = ranks * slots_per_rank;
        let demand = Demand { ranks, slots_per_rank, strategy: Strategy::Greedy, ..demand(&load) };
        let proposal = propose(&demand).unwrap();
        prop_assert_eq!((proposal.table.num_logical(), proposal.table.num_physical()), (load.len(), slots));
        prop_assert!((0..load.len()).all(|expert| !proposal.table.replicas_of(expert).is_empty()));
        prop_assert!(proposal.after.max() <= proposal.before.max());
        prop_assert_eq!(&proposal, &propose(&demand).unwrap());

        let placement = ExpertPlacement::linear(slots, ranks).unwrap();
        prop_assert_eq!(&proposal.after, &Balance::predicted(&load, &proposal.table, &placement));
        let total: u64 = load.iter().sum();
        let spread: f64 = proposal.after.per_rank().iter().sum();
        prop_assert!((spread - total as f64).abs() <= 1e-6 * total as f64, "{spread} of {total}");
        // Whatever is in use, the next proposal is no worse than it nor than the identity, and what is best stays.
        let current = Some(&proposal.table);
        let again = propose(&Demand { current, ..demand }).unwrap();
        prop_assert!(again.after.max() <= proposal.after.max());
        let settled = propose(&Demand { current: Some(&again.table), ..demand }).unwrap();
        prop_assert_eq!((settled.method, &settled.table), (Method::Kept, &again.table));
    }

    #[test]
    fn hierarchical_proposals_keep_groups_on_nodes(
        load in prop::collection::vec(0..10_000u64, 24..=24),
        more in 0usize..3,
        groups in prop::sample::select(vec![4usize, 8, 12, 24]),
    ) {
        let (ranks, nodes, slots_per_rank) = (8, 4, 3 + more);
        let strategy = Strategy::Hierarchical;
        let proposal = propose(&Demand { ranks, slots_per_rank, nodes, groups, strategy, ..demand(&load) }).unwrap();
        prop_assert!(proposal.fallback.is_empty());
        let (per_node, per_group) = (2 * slots_per_rank, 24 / groups);
        let mut node_of = vec![None; groups];
        for (slot, &expert) in proposal.table.physical_to_logical().iter().enumerate() {
            let node = node_of[expert as usize / per_group].get_or_insert(slot / per_node);
            prop_assert_eq!(*node, slot / per_node);
        }
        // Without redundancy the identity keeps groups together, so it is the bar.
        prop_assert!(more > 0 || proposal.after.max() <= proposal.before.max());
    }

    #[test]
    fn experts_keep_their_slots_inside_a_rank(load in loads(), other in any::<u64>()) {
        let (ranks, slots_per_rank) = (3, load.len().div_ceil(3) + 1);
        let mut rng = Pcg64Mcg::seed_from_u64(other);
        let current = random_table(&mut rng, load.len(), ranks * slots_per_rank - load.len());
        let next = propose(&Demand { ranks, slots_per_rank, current: Some(&current), ..demand(&load) }).unwrap();
        for rank in 0..ranks {
            let slots = rank * slots_per_rank..(rank + 1) * slots_per_rank;
            let before = &current.physical_to_logical()[slots.clone()];
            let mut after = next.table.physical_to_logical()[slots].to_vec();
            let stayed = before.iter().zip(&after).filter(|(a, b)| a == b).count();
            let mut is_there_still = |expert: &&u32| {
                let at = after.iter().position(|a| a == *expert);
                at.map(|at| after.swap_remove(at)).is_some()
            };
            let common = before.iter().filter(|expert| is_there_still(expert)).count();
            prop_assert_eq!(stayed, common);
        }
    }
}

#[test]
fn the_balance_of_a_published_kind_of_load_is_known() {
    // 12 experts of two groups of different weight, 16 slots on 8 ranks of 2 nodes.
    let load = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86];
    let demand = Demand { ranks: 8, slots_per_rank: 2, nodes: 2, groups: 4, ..demand(&load) };
    let hierarchical = propose(&demand).unwrap();
    assert_eq!((hierarchical.method, hierarchical.fallback.len()), (Method::Hierarchical, 0));
    let greedy = propose(&Demand { strategy: Strategy::Greedy, ..demand }).unwrap();
    for proposal in [&hierarchical, &greedy] {
        // The heaviest experts have the replicas.
        assert_eq!(proposal.table.replicas_of(10).len(), 2);
        assert_eq!(proposal.table.replicas_of(7).len(), 1);
        assert!(proposal.after.max_over_mean() < proposal.before.max_over_mean());
    }
    assert!(greedy.after.max() <= hierarchical.after.max(), "greedy is free to use all ranks");
    assert!(greedy.after.max_over_mean() < 1.15, "{:?}", greedy.after);
}

#[test]
fn a_hierarchy_that_does_not_fit_falls_back_with_reasons() {
    let load = [5; 10];
    let demand = Demand { ranks: 5, slots_per_rank: 3, nodes: 2, groups: 3, ..demand(&load) };
    let wanted = [
        Fallback::Groups { groups: 3, nodes: 2 },
        Fallback::Experts { experts: 10, groups: 3 },
        Fallback::Ranks { ranks: 5, nodes: 2 },
    ];
    for strategy in [Strategy::Auto, Strategy::Hierarchical] {
        let proposal = propose(&Demand { strategy, ..demand }).unwrap();
        assert_eq!(proposal.fallback, wanted);
        assert_ne!(proposal.method, Method::Hierarchical);
    }
    let greedy = propose(&Demand { strategy: Strategy::Greedy, ..demand }).unwrap();
    assert!(greedy.fallback.is_empty());
    assert_eq!(wanted[0].to_string(), "3 expert groups do not divide over 2 nodes");
}

#[rstest]
#[case::no_experts(&[], 1, 1, "the number of experts is 0")]
#[case::no_ranks(&[1], 0, 1, "the number of ranks is 0")]
#[case::no_slots(&[1], 1, 0, "the number of slots per rank is 0")]
#[case::too_few(&[1, 1, 1], 1, 2, "1 ranks with 2 slots each do not hold 3 experts")]
#[case::too_many(&[1], usize::MAX, 2, "slots are more than 2147483647")]
fn impossible_demands_are_refused(
    #[case] load: &[u64],
    #[case] ranks: usize,
    #[case] slots_per_rank: usize,
    #[case] why: &str,
) {
    let error = propose(&Demand { ranks, slots_per_rank, ..demand(load) }).unwrap_err().to_string();
    assert!(error.ends_with(why), "{error}");
}

#[test]
fn a_table_of_another_layer_is_refused() {
    let other = ReplicaTable::identity(5, 7).unwrap();
    let error = propose(&Demand { current: Some(&other), ..demand(&[1; 6]) }).unwrap_err();
    assert_eq!(error, ProposalError::Current { found: [5, 12], wanted: [6, 12] });
}

#[test]
fn an_idle_layer_is_balanced_and_kept() {
    let proposal = propose(&demand(&[0; 8])).unwrap();
    assert_eq!((proposal.method, proposal.after.max_over_mean()), (Method::Kept, 1.0));
}

/// What the ranks measure when skewed rows are mapped by `table`.
fn measured(table: &ReplicaTable, ids: &[i32], placement: &ExpertPlacement) -> (Vec<u64>, Balance) {
    let shape = LoadShape { layers: 1, physical: table.num_physical(), window: 1 };
    let mut recorder = LoadRecorder::new(shape).unwrap();
    let mut physical = vec![-1; ids.len()];
    table.map(TOP_K, ids, &mut physical).unwrap();
    recorder.record(0, &physical).unwrap();
    let load = recorder.load(0);
    let balance = Balance::measured(&load, placement);
    (load, balance)
}

#[rstest]
#[case::skewed(1.0, 1.3)]
#[case::very_skewed(1.5, 1.3)]
fn recorded_load_is_balanced_by_what_is_proposed_for_it(#[case] exponent: f64, #[case] at_most: f64) {
    let mut rng = fresh();
    let (experts, ranks, slots_per_rank) = (64, 8, 12);
    let placement = ExpertPlacement::linear(ranks * slots_per_rank, ranks).unwrap();
    let identity = ReplicaTable::identity(experts, ranks * slots_per_rank - experts).unwrap();
    let (load, before) = measured(&identity, &rows(exponent, experts, 4000, rng.random()), &placement);
    let load = identity.logical_load(&load);
    let strategy = Strategy::Greedy;
    let proposal =
        propose(&Demand { load: &load, ranks, slots_per_rank, nodes: 1, groups: 1, strategy, current: None });
    let table = proposal.unwrap().table;
    // Other tokens of the same kind: what was proposed for the past holds for the future.
    let (_, after) = measured(&table, &rows(exponent, experts, 4000, rng.random()), &placement);
    let (before, after) = (before.max_over_mean(), after.max_over_mean());
    println!("max/mean {before:.3} before, {after:.3} after");
    assert!(before > 1.5 && after < at_most, "max/mean {before} before, {after} after");
}
