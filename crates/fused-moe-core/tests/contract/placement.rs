//! The placement table and its two encodings.

use fused_moe_core::{
    ExpertMap, ExpertMask, ExpertPlacement, GlobalExpertId, LocalExpertId, NO_EXPERT, PlacementError, Rank,
};
use proptest::prelude::*;
use rstest::rstest;

#[rstest]
#[case(8, 4, &[0, 0, 1, 1, 2, 2, 3, 3])]
#[case(8, 3, &[0, 0, 0, 1, 1, 1, 2, 2])]
#[case(2, 4, &[0, 1])]
#[case(3, 1, &[0, 0, 0])]
#[case(0, 2, &[])]
fn linear_gives_the_first_ranks_one_more(
    #[case] experts: usize,
    #[case] ranks: usize,
    #[case] owners: &[u32],
) {
    let placement = ExpertPlacement::linear(experts, ranks).unwrap();
    assert_eq!(placement.owners().iter().map(|r| r.0).collect::<Vec<_>>(), owners);
    assert_eq!((placement.num_experts(), placement.ep_size()), (experts, ranks));
}

#[test]
fn placements_that_describe_no_group_are_refused() {
    assert_eq!(ExpertPlacement::linear(4, 0).unwrap_err(), PlacementError::EmptyGroup);
    assert_eq!(ExpertPlacement::from_owners(&[], 0).unwrap_err(), PlacementError::EmptyGroup);
    let error = ExpertPlacement::from_owners(&[0, 1, 2], 2).unwrap_err();
    assert_eq!(error, PlacementError::NoSuchRank { expert: 2, rank: 2, ep_size: 2 });
    assert_eq!(error.to_string(), "expert 2 is placed on rank 2, the group has 2 ranks");
}

#[rstest]
#[case(NO_EXPERT)]
#[case(-2)]
#[case(i32::MIN)]
#[case(3)]
#[case(i32::MAX)]
fn ids_that_name_no_expert_have_no_rank(#[case] id: i32) {
    // One expert per rank: dividing before looking would turn -1 into expert 0.
    let placement = ExpertPlacement::linear(3, 3).unwrap();
    assert_eq!(placement.rank_of_slot(id), None);
    assert!((0..3).all(|rank| ExpertMap::new(&placement, Rank(rank)).local(id).is_none()));
    assert_eq!(placement.rank_of_slot(2), Some(Rank(2)), "the control is found");
}

#[test]
fn ranks_outside_the_group_hold_nothing() {
    let placement = ExpertPlacement::linear(3, 2).unwrap();
    assert_eq!(placement.num_local_experts(Rank(2)), 0);
    assert_eq!(placement.experts_of(Rank(2)).count(), 0);
    assert_eq!(placement.rank_of(GlobalExpertId(3)), None);
    assert_eq!(placement.local_id(GlobalExpertId(3)), None);
}

#[test]
fn a_map_and_a_mask_are_what_kernels_read() {
    let placement = ExpertPlacement::from_owners(&[1, 0, 1, 1], 2).unwrap();
    assert_eq!(ExpertMap::new(&placement, Rank(1)).as_slice(), [0, -1, 1, 2]);
    assert_eq!(ExpertMask::new(&placement, Rank(1)).as_slice(), [1, 0, 1, 1, 0]);
}

proptest! {
    #[test]
    fn map_and_mask_say_the_same(owners in prop::collection::vec(0_usize..4, 0..20)) {
        let placement = ExpertPlacement::from_owners(&owners, 4).unwrap();
        for rank in (0..4).map(Rank) {
            let (map, mask) = (ExpertMap::new(&placement, rank), ExpertMask::new(&placement, rank));
            prop_assert_eq!(&mask.to_map(), &map);
            prop_assert_eq!(mask.as_slice().last(), Some(&0));
            prop_assert_eq!(mask.as_slice().iter().sum::<i32>() as usize, placement.num_local_experts(rank));
        }
    }

    #[test]
    fn every_expert_is_where_the_table_says(owners in prop::collection::vec(0_usize..4, 1..20)) {
        let placement = ExpertPlacement::from_owners(&owners, 4).unwrap();
        let held: usize = (0..4).map(|rank| placement.num_local_experts(Rank(rank))).sum();
        prop_assert_eq!(held, owners.len());
        for (id, &owner) in owners.iter().enumerate() {
            let (global, owner) = (GlobalExpertId(id as u32), Rank(owner as u32));
            prop_assert_eq!(placement.rank_of_slot(id as i32), Some(owner));
            let local = placement.local_id(global).unwrap();
            prop_assert_eq!(placement.experts_of(owner).nth(local.0 as usize), Some(global));
            for rank in (0..4).map(Rank) {
                let found: Option<LocalExpertId> = ExpertMap::new(&placement, rank).local(id as i32);
                prop_assert_eq!(found, (rank == owner).then_some(local));
            }
        }
    }
}
