//! The monolithic form against the modular path, on what has gone wrong with routing inside of kernels: rows of
//! negative logits (flashinfer #2822), ties, logits of -inf, biases that make scores negative, NaN.

mod common;

use common::*;
use fused_moe_core::*;
use half::bf16;
use moe_conformance::{Case, reference, relative_l2};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_pcg::Pcg64Mcg;
use router::HostRouter;
use rstest::rstest;
use trtllm_experts::ROUTING;

/// Largest relative L2 distance of two computations of one layer: outputs are bf16, and sums of other order may put an
/// activation into the next code.
const APART: f64 = 1e-2;

/// A random configuration of `method` for the experts of `case`, and its `top_k`.
fn routing(method: RoutingMethod, num_experts: usize, rng: &mut Pcg64Mcg) -> RoutingConfig {
    let limits = ROUTING.iter().find(|limits| limits.method == method).unwrap();
    let grouped = method == RoutingMethod::DeepSeekV3 && rng.random();
    let top_k = match method {
        RoutingMethod::Llama4 => 1,
        _ => *[1, 2, 5, 7].choose(rng).unwrap(),
    };
    let biased = matches!(method, RoutingMethod::DeepSeekV3 | RoutingMethod::MiniMax2) && rng.random();
    RoutingConfig {
        method,
        num_experts,
        top_k,
        groups: grouped.then_some(ExpertGroups { n_group: 4, topk_group: 2 }),
        renormalize: true,
        routed_scaling_factor: if limits.scales && rng.random() { 2.5 } else { 1.0 },
        // Scores are below 1, so that most biased ones are negative.
        correction_bias: biased.then(|| (0..num_experts).map(|_| rng.random_range(-2.0..0.5)).collect()),
    }
}

/// A row of logits of kind `kind`.
fn row(kind: usize, num_experts: usize, rng: &mut Pcg64Mcg) -> Vec<f32> {
    let logit = |rng: &mut Pcg64Mcg| match kind % 5 {
        0 => rng.random_range(-8.0..8.0),
        1 => rng.random_range(-2i8..3).into(),
        2 => rng.random_range(-30.0..-20.0),
        3 if rng.random_bool(0.3) => f32::NEG_INFINITY,
        3 => rng.random_range(-3.0..3.0),
        _ => f32::NEG_INFINITY,
    };
    (0..num_experts).map(|_| logit(rng)).collect()
}

/// What the host router chooses for the valid rows of `batch`.
fn choose(config: &MoeConfig, batch: &mut Batch) {
    let router = HostRouter::new(config.routing.clone().unwrap()).unwrap();
    let (rows, top_k, experts) = (batch.rows, config.top_k, config.num_experts());
    let logits = &batch.logits[..rows * experts];
    let out = TopKMut {
        ids: TensorViewMut::from_slice(&mut batch.ids[..rows * top_k], DType::I32, &[rows, top_k]).unwrap(),
        weights: TensorViewMut::from_slice(&mut batch.weights[..rows * top_k], DType::F32, &[rows, top_k])
            .unwrap(),
    };
    let mut nothing = [0u8; 0];
    let workspace = Arena::new(TensorViewMut::from_slice(&mut nothing, DType::U8, &[0]).unwrap());
    let logits = TensorView::from_slice(logits, DType::F32, &[rows, experts]).unwrap();
    router.route(&mut ExecCx { stream: Stream::Host, workspace }, logits, out).unwrap();
}

/// A case and a batch of rows whose logits are of all kinds.
fn layer_of(method: RoutingMethod, quant: QuantScheme, rng: &mut Pcg64Mcg) -> (Case, MoeConfig, Batch) {
    let plain = case(quant, 1);
    let routing = routing(method, plain.num_experts, rng);
    println!("{routing:?}");
    let case = Case { top_k: routing.top_k, ..plain };
    let mut batch = Batch::of(&case);
    for (kind, logits) in batch.logits.chunks_mut(case.num_experts).take(batch.rows).enumerate() {
        logits.copy_from_slice(&row(kind, case.num_experts, rng));
    }
    let config = MoeConfig { routing: Some(routing), ..case.config() };
    choose(&config, &mut batch);
    (case, config, batch)
}

#[rstest]
fn monolithic_is_router_and_routed(#[values(0, 1, 2, 3)] scheme: usize) {
    let rng = &mut fresh_rng();
    for limits in ROUTING {
        let (case, config, batch) = layer_of(limits.method, SCHEMES[scheme], rng);
        let weights = case.weights();
        let all = (&*weights.matrices(), Rank(0));
        let inside = Built::new(&monolithic(), &config, all, batch.max_rows()).apply(&batch).unwrap();
        let outside = Built::new(&routed(), &config, all, batch.max_rows()).apply(&batch).unwrap();
        assert_eq!(bits(&inside), bits(&outside), "{}", limits.method);

        // And another implementation of the modular path, whose garbage rows would fail its own checks.
        let experts = Built::new(&reference::ReferenceExperts, &config, all, batch.max_rows());
        let reference = experts.apply(&batch).unwrap();
        let wide = |values: &[bf16]| values.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        let found: Vec<f32> = inside.iter().map(|x| x.to_f32()).collect();
        let apart = relative_l2(&found, &wide(&reference));
        assert!(apart <= APART, "{}: {apart:.2e} from the reference", limits.method);
        // A row that no expert may be weighed for is zero, unless weights are made equal or raw.
        let last = &inside[4 * case.hidden..][..case.hidden];
        assert!(last.iter().all(|x| x.is_finite()), "{}", limits.method);
    }
}

/// The test sees a router that takes one other expert.
#[test]
fn another_expert_is_seen() {
    let rng = &mut fresh_rng();
    let (case, config, mut batch) = layer_of(RoutingMethod::RenormalizeNaive, SCHEMES[0], rng);
    let weights = case.weights();
    let all = (&*weights.matrices(), Rank(0));
    let inside = Built::new(&monolithic(), &config, all, batch.max_rows()).apply(&batch).unwrap();
    let other = (0..16).find(|id| !batch.ids[..case.top_k].contains(id)).unwrap();
    batch.ids[0] = other;
    let outside = Built::new(&routed(), &config, all, batch.max_rows()).apply(&batch).unwrap();
    assert_ne!(bits(&inside[..case.hidden]), bits(&outside[..case.hidden]));
    assert_eq!(bits(&inside[case.hidden..]), bits(&outside[case.hidden..]));
}

#[rstest]
#[case(f32::NAN)]
#[case(f32::INFINITY)]
fn logits_without_a_softmax_are_refused(#[case] bad: f32) {
    let rng = &mut fresh_rng();
    for limits in ROUTING {
        let (case, config, mut batch) = layer_of(limits.method, SCHEMES[0], rng);
        let weights = case.weights();
        let built = Built::new(&monolithic(), &config, (&weights.matrices(), Rank(0)), batch.max_rows());
        batch.logits[2 * case.num_experts + 5] = bad;
        let error = built.apply(&batch).unwrap_err();
        let fault = Fault::NonFiniteLogit { token: 2, expert: 5 };
        assert_eq!(
            (error.kind, error.stage),
            (ErrorKind::BadInput(fault), Stage::Router),
            "{}",
            limits.method
        );
        // The kernel goes on.
        batch.logits[2 * case.num_experts + 5] = 0.0;
        assert!(built.apply(&batch).is_ok());
    }
}

/// Ranks that route by the same global logits compute parts of one sum.
#[rstest]
fn partial_sums_make_the_whole(#[values(1, 4)] top_k: usize, #[values(2, 4, 16)] ep_size: usize) {
    for quant in SCHEMES {
        let whole_case = Case { top_k, ..case(quant, 1) };
        let weights = whole_case.weights();
        let all = weights.matrices();
        let batch = Batch::of(&whole_case);
        let whole_config = whole_case.config();
        let built = Built::new(&monolithic(), &whole_config, (&all, Rank(0)), batch.max_rows());
        let whole = built.apply(&batch).unwrap();

        let placement = ExpertPlacement::linear(16, ep_size).unwrap();
        let config = MoeConfig { placement, ranks_per_node: ep_size, ..whole_case.config() };
        let mut sum = vec![0.0f32; whole.len()];
        let mut parts_with_values = 0;
        for rank in (0..ep_size as u32).map(Rank) {
            let part =
                Built::new(&monolithic(), &config, (&all, rank), batch.max_rows()).apply(&batch).unwrap();
            parts_with_values += usize::from(part.iter().any(|x| x.to_f32() != 0.0));
            sum.iter_mut().zip(&part).for_each(|(sum, x)| *sum += x.to_f32());
        }
        assert!(parts_with_values > 1, "all rows went to one rank");
        if top_k == 1 {
            // One rank has the row, the others add zeros.
            let sum: Vec<bf16> = sum.iter().map(|&x| bf16::from_f32(x)).collect();
            let zero = |x: &bf16| if x.to_f32() == 0.0 { 0 } else { x.to_bits() };
            assert_eq!(sum.iter().map(zero).collect::<Vec<_>>(), whole.iter().map(zero).collect::<Vec<_>>());
        } else {
            let want: Vec<f64> = whole.iter().map(|x| x.to_f64()).collect();
            let apart = relative_l2(&sum, &want);
            assert!(apart <= APART, "{apart:.2e} from the whole");
        }
    }
}

/// Llama 4 in FP8 per tensor: the routing weight multiplies what gemm1 gives. A weight of 1 does so in both places.
#[test]
fn llama4_weighs_the_input() {
    let rng = &mut fresh_rng();
    let (case, on_output, mut batch) =
        layer_of(RoutingMethod::Llama4, QuantScheme::Fp8PerTensorStatic(FN), rng);
    let on_input = MoeConfig { apply_router_weight_on_input: true, ..on_output.clone() };
    let weights = case.weights();
    let all = (&*weights.matrices(), Rank(0));
    let run = |config: &MoeConfig, batch: &Batch| {
        Built::new(&monolithic(), config, all, batch.max_rows()).apply(batch).unwrap()
    };
    for (at, logits) in batch.logits.chunks_mut(case.num_experts).take(batch.rows).enumerate() {
        logits.fill(-9.0);
        logits[at % case.num_experts] = 40.0;
    }
    let of_ones = run(&on_input, &batch);
    assert_eq!(bits(&of_ones), bits(&run(&on_output, &batch)));
    // σ(-1.5) inside of the activation is another function than outside.
    batch.logits.iter_mut().filter(|logit| **logit == 40.0).for_each(|logit| *logit = -1.5);
    let (inside, outside) = (run(&on_input, &batch), run(&on_output, &batch));
    choose(&on_input, &mut batch);
    let reference = Built::new(&reference::ReferenceExperts, &on_input, all, batch.max_rows());
    let want: Vec<f64> = reference.apply(&batch).unwrap().iter().map(|x| x.to_f64()).collect();
    let wide = |values: &[bf16]| values.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (right, wrong) = (relative_l2(&wide(&inside), &want), relative_l2(&wide(&outside), &want));
    assert!(right <= 3e-2 && wrong > 0.1, "{right:.2e}, on the output {wrong:.2e}");
}
