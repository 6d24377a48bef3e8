//! Where experts are after a loss, and what becomes of the tokens of those that are gone, against brute force.

use fused_moe_core::{ExpertPlacement, Fault, GlobalExpertId, MoeConfig, Rank};
use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use router::eplb::{MapError, ReplicaTable};
use router::survivors::{
    Dropped, LostExpert, LostExpertPolicy, SurvivingExperts, SurvivorMapError, Survivors, SurvivorsError,
};

fn config(owners: &[usize], ranks: usize, num_logical: usize, top_k: usize) -> MoeConfig {
    MoeConfig {
        hidden: 8,
        intermediate: 8,
        top_k,
        max_tokens_per_rank: 16,
        redundant_experts: owners.len() - num_logical,
        ..MoeConfig::new(ExpertPlacement::from_owners(owners, ranks).unwrap())
    }
}

/// A group with replicas anywhere, some ranks that survive, in any order, and top-k rows.
#[derive(Clone, Debug)]
struct Loss {
    owners: Vec<usize>,
    ranks: usize,
    logical: Vec<u32>,
    num_logical: usize,
    survivors: Vec<Rank>,
    top_k: usize,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

impl Loss {
    fn draw(seed: u64) -> Self {
        let mut rng = Pcg64::seed_from_u64(seed);
        let (ranks, num_logical) = (rng.random_range(1..7), rng.random_range(1..12usize));
        let slots = num_logical + rng.random_range(0..6);
        let mut logical: Vec<u32> = (0..num_logical as u32).collect();
        logical.extend((num_logical..slots).map(|_| rng.random_range(0..num_logical as u32)));
        logical.shuffle(&mut rng);
        let owners = (0..slots).map(|_| rng.random_range(0..ranks)).collect();
        let mut survivors: Vec<Rank> = (0..ranks as u32).map(Rank).collect();
        survivors.shuffle(&mut rng);
        survivors.truncate(rng.random_range(1..=ranks));
        let top_k = rng.random_range(1..=num_logical.min(4));
        let mut ids = Vec::new();
        for _ in 0..rng.random_range(0..20) {
            let row = rand::seq::index::sample(&mut rng, num_logical, top_k);
            ids.extend(row.into_iter().map(|id| if rng.random_bool(0.1) { -1 } else { id as i32 }));
        }
        let weights = ids.iter().map(|_| rng.random_range(0.0..2.0)).collect();
        Self { owners, ranks, logical, num_logical, survivors, top_k, ids, weights }
    }

    fn holders(&self, expert: u32) -> impl Iterator<Item = Rank> + '_ {
        let slots = self.logical.iter().zip(&self.owners).filter(move |&(&held, _)| held == expert);
        slots.map(|(_, &owner)| Rank(owner as u32))
    }

    fn is_lost(&self, id: i32) -> bool {
        id >= 0 && !self.holders(id as u32).any(|rank| self.survivors.contains(&rank))
    }

    fn survive(&self) -> Result<SurvivingExperts, SurvivorsError> {
        let config = config(&self.owners, self.ranks, self.num_logical, self.top_k);
        let table = ReplicaTable::new(self.num_logical, self.logical.clone()).unwrap();
        let left = Survivors { ranks: &self.survivors, ranks_per_node: self.survivors.len() };
        SurvivingExperts::new(&config, &table, left)
    }
}

proptest! {
    #[test]
    fn ranks_keep_their_experts_in_order(seed: u64) {
        let loss = Loss::draw(seed);
        let lost: Vec<u32> = (0..loss.num_logical as u32).filter(|&e| loss.is_lost(e as i32)).collect();
        let after = match loss.survive() {
            Ok(after) => after,
            Err(SurvivorsError::NoLayer { reasons, .. }) => {
                prop_assert!(loss.num_logical - lost.len() < loss.top_k, "{reasons:?}");
                return Ok(());
            }
            Err(error) => panic!("{error}"),
        };
        prop_assert_eq!(after.lost().iter().map(|lost| lost.expert).collect::<Vec<_>>(), lost);
        for &LostExpert { expert, rank } in after.lost() {
            prop_assert!(loss.holders(expert).any(|holder| holder == rank));
        }
        let placement = &after.config().placement;
        prop_assert_eq!(after.config().contradictions(), []);
        prop_assert_eq!(after.config().num_logical_experts(), loss.num_logical - after.lost().len());
        for (new, &old) in loss.survivors.iter().enumerate() {
            prop_assert_eq!(after.new_rank(old), Some(Rank(new as u32)));
            let slots = placement.experts_of(Rank(new as u32));
            let now: Vec<u32> = slots.map(|slot| after.physical_to_logical()[slot.0 as usize]).collect();
            let held = loss.logical.iter().zip(&loss.owners).filter(|&(_, &owner)| owner == old.index());
            prop_assert_eq!(now, held.map(|(&expert, _)| expert).collect::<Vec<_>>());
        }
        for (slot, &old) in after.old_slots().iter().enumerate() {
            let now = placement.rank_of(GlobalExpertId(slot as u32)).unwrap();
            prop_assert_eq!(after.old_ranks()[now.index()].index(), loss.owners[old as usize]);
        }
    }

    #[test]
    fn tokens_of_lost_experts_are_treated_as_asked(seed: u64) {
        let loss = Loss::draw(seed);
        let Ok(after) = loss.survive() else { return Ok(()) };
        let mut wanted = Dropped::default();
        for row in loss.ids.chunks(loss.top_k) {
            let slots = row.iter().filter(|&&id| loss.is_lost(id)).count();
            wanted.slots += slots;
            wanted.tokens += usize::from(slots > 0);
            wanted.empty_tokens += usize::from(slots > 0 && row.iter().all(|&id| id == -1 || loss.is_lost(id)));
        }
        for policy in LostExpertPolicy::ALL {
            let (mut ids, mut weights) = (loss.ids.clone(), loss.weights.clone());
            let mapped = after.map(policy, loss.top_k, &mut ids, &mut weights);
            if policy == LostExpertPolicy::Fail && wanted.slots > 0 {
                let Err(SurvivorMapError::Lost(lost)) = &mapped else { panic!("{mapped:?}") };
                prop_assert_eq!((lost.dropped, &ids, &weights), (wanted, &loss.ids, &loss.weights));
                prop_assert!(loss.ids[lost.token * loss.top_k..][..loss.top_k].contains(&(lost.first.expert as i32)));
                prop_assert!(!loss.ids[..lost.token * loss.top_k].iter().any(|&id| loss.is_lost(id)));
                prop_assert!(lost.experts.iter().all(|lost| loss.is_lost(lost.expert as i32)));
                let named = |id: &&i32| lost.experts.iter().any(|lost| lost.expert as i32 == **id);
                prop_assert_eq!(loss.ids.iter().filter(named).count(), wanted.slots);
                let LostExpert { expert, rank } = lost.first;
                prop_assert_eq!(lost.fault(), Fault::ExpertLost { token: lost.token as u32, expert, rank: rank.0 });
                prop_assert!(lost.to_string().contains(&format!("expert {expert} of lost {rank}")), "{}", lost);
                continue;
            }
            prop_assert_eq!(mapped.unwrap(), wanted);
            for (token, row) in loss.ids.chunks(loss.top_k).enumerate() {
                let at = token * loss.top_k..(token + 1) * loss.top_k;
                let (ids, weights, before) = (&ids[at.clone()], &weights[at.clone()], &loss.weights[at]);
                for (&now, &then) in ids.iter().zip(row) {
                    prop_assert_eq!(now == -1, then == -1 || loss.is_lost(then));
                    if now >= 0 {
                        prop_assert_eq!(after.physical_to_logical()[now as usize] as i32, then);
                    }
                }
                if policy != LostExpertPolicy::DropAndRenormalise || !row.iter().any(|&id| loss.is_lost(id)) {
                    prop_assert_eq!(weights, before);
                    continue;
                }
                let sum = |weights: &[f32], ids: &[i32]| -> f64 {
                    weights.iter().zip(ids).filter(|&(_, &id)| id != -1).map(|(&w, _)| f64::from(w)).sum()
                };
                if ids.iter().any(|&id| id != -1) {
                    let (now, then) = (sum(weights, ids), sum(before, row));
                    prop_assert!((now - then).abs() <= 1e-6 * then, "{now} of {then}");
                    let factor = then / (then - row.iter().zip(before).filter(|&(&id, _)| loss.is_lost(id))
                        .map(|(_, &w)| f64::from(w)).sum::<f64>());
                    for ((&now, &then), &id) in weights.iter().zip(before).zip(ids) {
                        let wanted = f64::from(then) * factor;
                        prop_assert!(id == -1 || (f64::from(now) - wanted).abs() <= 1e-6 * wanted);
                    }
                }
                for (&weight, &then) in weights.iter().zip(row) {
                    prop_assert!(!loss.is_lost(then) || weight == 0.0);
                }
            }
        }
    }

    #[test]
    fn two_losses_are_one(seed: u64) {
        let loss = Loss::draw(seed);
        let whole = Loss { survivors: (0..loss.ranks as u32).map(Rank).collect(), ..loss.clone() };
        let Ok(at_once) = loss.survive() else { return Ok(()) };
        // Through any group between the two.
        let mut rng = Pcg64::seed_from_u64(!seed);
        let mut between: Vec<Rank> = whole.survivors.clone();
        between.retain(|rank| loss.survivors.contains(rank) || rng.random());
        between.shuffle(&mut rng);
        let first = Loss { survivors: between.clone(), ..loss.clone() }.survive().unwrap();
        let last: Vec<Rank> = loss.survivors.iter().map(|&rank| first.new_rank(rank).unwrap()).collect();
        let after = first.shrink(Survivors { ranks: &last, ranks_per_node: last.len() }).unwrap();
        prop_assert_eq!(&after.config().placement.owners().len(), &at_once.config().placement.owners().len());
        let experts = |after: &SurvivingExperts| after.lost().iter().map(|lost| lost.expert).collect::<Vec<_>>();
        prop_assert_eq!(experts(&after), experts(&at_once));
        for rank in (0..last.len() as u32).map(Rank) {
            let held = |after: &SurvivingExperts| {
                let slots: Vec<_> = after.config().placement.experts_of(rank).collect();
                let mut held: Vec<_> = slots.iter().map(|slot| after.physical_to_logical()[slot.0 as usize]).collect();
                held.sort_unstable();
                held
            };
            prop_assert_eq!(held(&after), held(&at_once));
        }
    }
}

#[test]
fn survivors_that_make_no_layer_are_refused() {
    let config = config(&[0, 0, 1, 1, 2, 2], 3, 6, 3);
    let table = ReplicaTable::identity(6, 0).unwrap();
    let survive = |ranks: &[u32]| {
        let ranks: Vec<Rank> = ranks.iter().copied().map(Rank).collect();
        SurvivingExperts::new(&config, &table, Survivors { ranks: &ranks, ranks_per_node: 1 })
    };
    assert_eq!(survive(&[0, 3]).unwrap_err(), SurvivorsError::NoSuchRank { rank: Rank(3), ep_size: 3 });
    assert_eq!(survive(&[1, 1]).unwrap_err(), SurvivorsError::RankTwice { rank: Rank(1) });
    assert!(matches!(survive(&[]).unwrap_err(), SurvivorsError::Placement(_)));
    let error = survive(&[2]).unwrap_err();
    assert!(error.to_string().contains("top_k of at most 2"), "{error}");
    let other = ReplicaTable::identity(6, 1).unwrap();
    let left = Survivors { ranks: &[Rank(0)], ranks_per_node: 1 };
    let error = SurvivingExperts::new(&config, &other, left).unwrap_err();
    assert_eq!(error, SurvivorsError::Slots { table: 7, config: 6 });
}

#[test]
fn nothing_is_written_if_rows_cannot_be_mapped() {
    let config = config(&[0, 0, 1, 1], 2, 4, 2);
    let table = ReplicaTable::identity(4, 0).unwrap();
    let left = Survivors { ranks: &[Rank(1)], ranks_per_node: 1 };
    let after = SurvivingExperts::new(&config, &table, left).unwrap();
    assert_eq!(after.whole_table(), None);
    for (ids, weights, bad) in [(vec![0, 4], 2, 4), (vec![0, 1, 2], 3, 3), (vec![0, 1], 3, 2)] {
        let (mut written, mut weights) = (ids.clone(), vec![0.5; weights]);
        let error =
            after.map(LostExpertPolicy::DropAndRenormalise, 2, &mut written, &mut weights).unwrap_err();
        match error {
            SurvivorMapError::Map(MapError::NoSuchExpert { id, .. }) => assert_eq!(id, bad),
            SurvivorMapError::Map(MapError::Rows { len, .. }) => assert_eq!(len as i32, bad),
            SurvivorMapError::Weights { ids, .. } => assert_eq!(ids as i32, bad),
            other => panic!("{other}"),
        }
        assert_eq!(written, ids);
        assert!(weights.iter().all(|&weight| weight == 0.5));
    }
}

#[test]
fn a_loss_of_replicas_alone_loses_nothing() {
    let config = config(&[0, 0, 1, 1], 2, 2, 2);
    let table = ReplicaTable::identity(2, 2).unwrap();
    let left = Survivors { ranks: &[Rank(1)], ranks_per_node: 1 };
    let after = SurvivingExperts::new(&config, &table, left).unwrap();
    assert_eq!(after.whole_table(), Some(&ReplicaTable::identity(2, 0).unwrap()));
    let (mut ids, mut weights) = ([1, 0, -1, 1], [0.5; 4]);
    let dropped = after.map(LostExpertPolicy::Fail, 2, &mut ids, &mut weights).unwrap();
    assert_eq!((dropped, ids), (Dropped::default(), [1, 0, -1, 1]));
}
