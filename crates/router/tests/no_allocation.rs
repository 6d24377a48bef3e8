//! `route` allocates nothing, whatever the method, for 1024 experts; neither does what EPLB adds to a call.

use counting_alloc::allocations;
use fused_moe_core::{
    Arena, DType, ExecCx, ExpertGroups, ExpertPlacement, MoeConfig, Rank, Router, RoutingConfig,
    RoutingMethod, Stream, TensorView, TensorViewMut, TopKMut,
};
use router::HostRouter;
use router::eplb::{LoadRecorder, LoadShape, ReplicaTable};
use router::survivors::{Dropped, LostExpertPolicy, SurvivingExperts, Survivors};

#[global_allocator]
static ALLOCATOR: counting_alloc::Counting = counting_alloc::Counting;

#[test]
fn route_allocates_nothing() {
    const TOKENS: usize = 5;
    const EXPERTS: usize = 1024;
    const TOP_K: usize = 32;
    let logits: Vec<f32> = (0..TOKENS * EXPERTS).map(|i| (i * 7919 % 1013) as f32 / 100.0).collect();
    for method in RoutingMethod::ALL {
        let groups = |n_group| Some(ExpertGroups { n_group, topk_group: n_group - 1 });
        let top_k = if method == RoutingMethod::Llama4 { 1 } else { TOP_K };
        let router = HostRouter::new(RoutingConfig {
            method,
            num_experts: EXPERTS,
            top_k,
            groups: match method {
                RoutingMethod::GroupLimitedSoftmax | RoutingMethod::GroupLimitedSigmoid => groups(EXPERTS),
                RoutingMethod::DeepSeekV3 => groups(EXPERTS / 2),
                _ => None,
            },
            renormalize: true,
            routed_scaling_factor: 2.5,
            correction_bias: match method {
                RoutingMethod::DeepSeekV3
                | RoutingMethod::GroupLimitedSoftmax
                | RoutingMethod::BiasedSoftmax
                | RoutingMethod::MiniMax2
                | RoutingMethod::SqrtSoftplus => Some(vec![0.25; EXPERTS]),
                _ => None,
            },
        })
        .unwrap();
        let (mut ids, mut weights) = (vec![0; TOKENS * top_k], vec![0.0; TOKENS * top_k]);
        let dims = [TOKENS, top_k];
        let out = TopKMut {
            ids: TensorViewMut::from_slice(&mut ids, DType::I32, &dims).unwrap(),
            weights: TensorViewMut::from_slice(&mut weights, DType::F32, &dims).unwrap(),
        };
        let mut nothing = [0u8; 0];
        let workspace = Arena::new(TensorViewMut::from_slice(&mut nothing, DType::U8, &[0]).unwrap());
        let mut cx = ExecCx { stream: Stream::Host, workspace };
        let view = TensorView::from_slice(&logits, DType::F32, &[TOKENS, EXPERTS]).unwrap();
        let allocated = allocations(|| router.route(&mut cx, view, out).unwrap());
        assert_eq!(allocated, 0, "{method}");
    }
}

#[test]
fn replicas_are_chosen_and_counted_without_allocating() {
    let table = ReplicaTable::identity(60, 12).unwrap();
    let mut recorder = LoadRecorder::new(LoadShape { layers: 2, physical: 72, window: 3 }).unwrap();
    let logical: Vec<i32> = (0..400).map(|i| i * 17 % 61 - 1).collect();
    let mut physical = vec![0; logical.len()];
    let allocated = allocations(|| {
        for _ in 0..5 {
            table.map(8, &logical, &mut physical).unwrap();
            recorder.record(1, &physical).unwrap();
            recorder.end_step();
        }
    });
    assert_eq!(allocated, 0);
}

#[test]
fn tokens_of_lost_experts_are_dropped_without_allocating() {
    let config = MoeConfig {
        hidden: 8,
        intermediate: 8,
        top_k: 8,
        max_tokens_per_rank: 50,
        redundant_experts: 12,
        ..MoeConfig::new(ExpertPlacement::linear(72, 8).unwrap())
    };
    let left = Survivors { ranks: &[Rank(0), Rank(1), Rank(3), Rank(6)], ranks_per_node: 4 };
    let table = ReplicaTable::identity(60, 12).unwrap();
    let after = SurvivingExperts::new(&config, &table, left).unwrap();
    for policy in [LostExpertPolicy::DropAndRenormalise, LostExpertPolicy::DropRaw] {
        let mut ids: Vec<i32> = (0..400).map(|i| i * 17 % 61 - 1).collect();
        let mut weights = vec![0.25; 400];
        let mut dropped = Dropped::default();
        let allocated = allocations(|| dropped += after.map(policy, 8, &mut ids, &mut weights).unwrap());
        assert_eq!(allocated, 0, "{policy}");
        assert!(dropped.slots > 100, "{dropped:?}");
    }
}
