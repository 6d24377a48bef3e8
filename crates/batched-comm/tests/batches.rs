//! Where rows go, and which groups are served.

use std::num::NonZeroUsize;

use batched_comm::Batched;
use ep_transport::{Endpoint, ThreadOptions, run_ranks};
use fused_moe_core::*;
use half::bf16;

const HIDDEN: usize = 4;

fn config(placement: ExpertPlacement, top_k: usize) -> MoeConfig {
    MoeConfig {
        hidden: HIDDEN,
        intermediate: 8,
        top_k,
        max_tokens_per_rank: 3,
        in_dtype: DType::Bf16,
        quant: QuantScheme::Unquantized,
        activation: Activation::Silu,
        apply_router_weight_on_input: false,
        expert_bias: false,
        padding: Default::default(),
        redundant_experts: 0,
        max_received_rows: None,
        combine_wire: Default::default(),
        routing: None,
        placement,
        ranks_per_node: 1,
        device: DeviceKind::Host,
    }
}

fn experts() -> ExpertsCaps {
    let mut experts = ExpertsCaps::host("none", vec![WireFormat::unquantized(DType::Bf16)]);
    experts.format = ActivationFormat::BatchedExperts;
    experts.weight_and_reduce = TopKWeightAndReduce::delegate();
    experts
}

fn handle(config: &MoeConfig, group: &dyn ProcessGroup) -> (Plan, Box<dyn PrepareAndFinalizeModular>) {
    match maybe_make_prepare_finalize(&[&Batched], config, &experts(), group) {
        Ok((plan, PrepareFinalize::Modular(comm))) => (plan, comm),
        other => panic!("{other:?}"),
    }
}

/// Runs a round in which expert `e` multiplies by `e + 1`. Every element of a token is `value(token)`. Returns the
/// first elements of the valid rows of each local expert, and those of the output.
fn round(
    config: &MoeConfig,
    group: &dyn ProcessGroup,
    (value, ids): (impl Fn(usize) -> f32, &[i32]),
) -> (Vec<Vec<f32>>, Vec<f32>) {
    let (plan, mut comm) = handle(config, group);
    let mut workspace = Workspace::new(DeviceKind::Host, 0).unwrap();
    let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
    let tokens = ids.len() / config.top_k;
    let hidden: Vec<_> = (0..tokens).flat_map(|token| [bf16::from_f32(value(token)); HIDDEN]).collect();
    let weights = vec![0.5f32; ids.len()];
    let topk = TopK {
        ids: TensorView::from_slice(ids, DType::I32, &[tokens, config.top_k]).unwrap(),
        weights: TensorView::from_slice(&weights, DType::F32, &[tokens, config.top_k]).unwrap(),
    };
    let hidden = TensorView::from_slice(&hidden, DType::Bf16, &[tokens, HIDDEN]).unwrap();
    let sent =
        comm.prepare_send(&mut cx, PrepareInput { hidden, topk, input_scale: None, fault: None }).unwrap();
    let (dispatched, routed) = comm.prepare_recv(&mut cx, sent).unwrap();

    let Arrived::Batched { tokens: counts } = dispatched.arrived else { panic!("not batched") };
    let counts = counts.0.as_slice::<i32>().unwrap().to_vec();
    let dims = dispatched.hidden.dims().to_vec();
    let mine: Vec<_> = config.placement.experts_of(group.rank()).collect();
    assert_eq!((counts.len(), &*dims), (mine.len(), &[mine.len(), plan.max_rows(), HIDDEN][..]));
    let rows = dispatched.hidden.as_slice::<bf16>().unwrap();
    // Outputs behind an expert's count must not be read.
    let mut outputs = vec![bf16::NAN; rows.len()];
    let mut arrived = Vec::new();
    for ((expert, id), &count) in mine.iter().enumerate().zip(&counts) {
        let valid = expert * plan.max_rows() * HIDDEN..(expert * plan.max_rows() + count as usize) * HIDDEN;
        arrived.push(rows[valid.clone()].chunks(HIDDEN).map(|row| row[0].to_f32()).collect());
        for (out, x) in outputs[valid.clone()].iter_mut().zip(&rows[valid]) {
            *out = bf16::from_f32(x.to_f32() * (id.0 + 1) as f32);
        }
    }
    let outputs = ExpertOut::Lent(TensorView::from_slice(&outputs, DType::Bf16, &dims).unwrap());
    let sent = comm.finalize_send(&mut cx, routed, outputs).unwrap();
    let mut sums = vec![f32::NAN; tokens * HIDDEN];
    let out = TensorViewMut::from_slice(&mut sums, DType::F32, &[tokens, HIDDEN]).unwrap();
    comm.finalize_recv(&mut cx, sent, out).unwrap();
    (arrived, sums.chunks(HIDDEN).map(|row| row[0]).collect())
}

/// Three ranks on nodes of their own; rank 1 holds no expert, and rank 2 has no token.
#[test]
fn rows_of_an_expert_are_in_the_order_of_ranks_and_tokens() {
    let config = config(ExpertPlacement::from_owners(&[2, 0, 2, 0], 3).unwrap(), 2);
    let ids: [&[i32]; 3] = [&[1, 0, 3, 1, 0, -1], &[0, 1, -1, -1, 2, 1], &[]];
    let options = ThreadOptions { ranks_per_node: NonZeroUsize::new(1), ..ThreadOptions::default() };
    let ends = run_ranks(3, options, |group: Endpoint| {
        let rank = group.rank();
        let value = |token: usize| (10 * (rank.0 + 1) + token as u32) as f32;
        round(&config, &group, (value, ids[rank.index()]))
    });
    let [first, second, third] = ends.unwrap().try_into().unwrap();
    assert_eq!(first.0, [vec![10.0, 11.0, 20.0, 22.0], vec![11.0]]);
    assert_eq!(second.0, [[0.0; 0]; 0]);
    assert_eq!(third.0, [vec![10.0, 12.0, 20.0], vec![22.0]]);
    // Half of the sum over slots of value · (expert + 1); a row of padding is zero.
    assert_eq!(first.1, [15.0, 33.0, 6.0]);
    assert_eq!(second.1, [30.0, 0.0, 55.0]);
    assert_eq!(third.1, [0.0; 0]);
}

#[test]
fn a_rank_alone_needs_no_transport() {
    let config = config(ExpertPlacement::linear(2, 1).unwrap(), 1);
    let (arrived, sums) = round(&config, &SingleRank, (|token| (token + 1) as f32, &[1, 0, 1]));
    assert_eq!(arrived, [vec![2.0], vec![1.0, 3.0]]);
    assert_eq!(sums, [1.0, 1.0, 3.0]);
}

#[test]
fn a_group_of_another_size_is_refused() {
    let config = config(ExpertPlacement::linear(2, 2).unwrap(), 1);
    let Support::Supported(caps) = Batched.supports(&config, KernelKind::Modular) else { panic!("refused") };
    let plan = negotiate(&config, &caps, &experts()).unwrap();
    let refused = Batched.build(&config, &plan, &SingleRank).unwrap_err();
    let why = std::error::Error::source(&refused).unwrap().to_string();
    assert_eq!(
        (refused.kind.clone(), &*why),
        (ErrorKind::Contract, "the transport has 1 ranks, the placement 2")
    );
}

/// What slots are expected to move between ranks, over all tokens of a rank, is what the transport counts.
#[test]
fn the_bytes_of_a_token_are_those_that_are_counted() {
    let config = config(ExpertPlacement::linear(4, 2).unwrap(), 2);
    let moved = run_ranks(2, ThreadOptions::default(), |group: Endpoint| {
        // One slot of each token stays on its rank, as is expected of two ranks.
        round(&config, &group, (|_| 1.0, &[0, 2, 3, 1, 2, 1]));
        group.transport().traffic().remote_bytes
    });
    let Support::Supported(caps) = Batched.supports(&config, KernelKind::Modular) else { panic!("refused") };
    let plan = negotiate(&config, &caps, &experts()).unwrap();
    let token = Batched.wire_bytes_per_token(&config, &plan);
    // Two counts of four bytes go to the other rank.
    let wanted = (3.0 * (token.dispatch + token.combine)) as u64 + 8;
    assert_eq!(moved.unwrap(), [wanted; 2]);
}
