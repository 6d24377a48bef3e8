//! Whether two backends fit, and every reason why not.

use fused_moe_core::{
    ActivationFormat, Axis, CombineKind, CombineWire, Contiguous, DType, DeviceKind, ExpertGroups,
    ExpertsCaps, Fp8Format, KernelKind, MoeConfig, NaiveBatched, Plan, PrepareCaps, QuantScheme,
    RouterWeight, RoutingConfig, RoutingMethod, Support, TopKWeightAndReduce, Unsupported, WireFormat,
    negotiate,
};
use rstest::rstest;

use crate::layer::{EXPERTS, MAX_TOKENS, TOP_K, config};

const BF16: WireFormat = WireFormat::unquantized(DType::Bf16);

fn fp8(scheme: fn(fused_moe_core::Fp8Format) -> QuantScheme) -> WireFormat {
    scheme(fused_moe_core::Fp8Format::E4M3Fn).quantized_wire(DType::Bf16)
}

fn pair() -> (MoeConfig, PrepareCaps, ExpertsCaps) {
    let prepare = PrepareCaps::host("comm", KernelKind::Modular, vec![BF16], MAX_TOKENS);
    (config(2), prepare, ExpertsCaps::host("experts", vec![BF16]))
}

fn axes(result: Result<Plan, Vec<Unsupported>>) -> Vec<Axis> {
    result.map_or_else(|why| why.iter().map(|reason| reason.axis).collect(), |_| Vec::new())
}

type Change = fn(&mut MoeConfig, &mut PrepareCaps, &mut ExpertsCaps);

/// Gives a closure its type.
fn with(change: Change) -> Change {
    change
}

/// Gives a closure its type.
fn set(change: fn(&mut MoeConfig)) -> fn(&mut MoeConfig) {
    change
}

#[rstest]
#[case::nothing(&[], with(|_, _, _| {}))]
#[case::kind(&[Axis::KernelKind], with(|_, _, e| e.kind = KernelKind::Monolithic))]
#[case::format(&[Axis::Format], with(|_, p, _| p.format = ActivationFormat::BatchedExperts))]
#[case::ids(&[Axis::DType], with(|_, p, _| p.topk_id = DType::U8))]
#[case::comm_device(&[Axis::Device], with(|_, p, _| p.devices.clear()))]
#[case::experts_device(&[Axis::Device], with(|_, _, e| e.devices = vec![DeviceKind::Cuda]))]
#[case::both_devices(&[Axis::Device, Axis::Device], with(|c, _, _| c.device = DeviceKind::Hip))]
#[case::quantised_combine(&[Axis::Quant], with(|c, _, _| c.combine_wire = CombineWire::Fp8Block(Fp8Format::E4M3Fn)))]
#[case::too_many_rows(&[Axis::Shape], with(|c, p, _| c.max_received_rows = Some(p.max_rows - 1)))]
#[case::enough_rows(&[], with(|c, p, _| c.max_received_rows = Some(p.max_rows)))]
#[case::combine_weights_too(&[Axis::Reduction], with(|_, p, _| p.combine = CombineKind::WeightAndReduce))]
#[case::wire(&[Axis::Quant], with(|_, _, e| e.accepts = vec![fp8(QuantScheme::Fp8Block)]))]
#[case::scales(&[Axis::Quant], with(|_, p, e| {
    p.wires = vec![fp8(QuantScheme::Fp8Ptpc)];
    e.accepts = vec![fp8(QuantScheme::Fp8PerTensor)];
}))]
#[case::no_wires(&[Axis::Quant], with(|_, p, _| p.wires.clear()))]
#[case::weight_on_input(&[Axis::RouterWeight], with(|c, _, _| c.apply_router_weight_on_input = true))]
#[case::nobody_reduces_batches(&[Axis::Reduction], with(|_, p, e| {
    (p.format, e.format) = (ActivationFormat::BatchedExperts, ActivationFormat::BatchedExperts);
    e.weight_and_reduce = NaiveBatched.into();
}))]
#[case::batched_reduction_of_rows(&[Axis::Reduction], with(|_, _, e| e.weight_and_reduce = NaiveBatched.into()))]
#[case::delegate_of_rows(&[Axis::Reduction], with(|_, p, e| {
    p.combine = CombineKind::WeightAndReduce;
    e.weight_and_reduce = TopKWeightAndReduce::delegate();
}))]
#[case::unreduced_monolithic(&[Axis::Reduction], with(|_, p, e| {
    (p.kind, e.kind) = (KernelKind::Monolithic, KernelKind::Monolithic);
    e.weight_and_reduce = Contiguous.into();
}))]
#[case::monolithic_with_replicas(&[Axis::KernelKind], with(|c, p, e| {
    (p.kind, e.kind) = (KernelKind::Monolithic, KernelKind::Monolithic);
    c.redundant_experts = 1;
}))]
#[case::replicas(&[], with(|c, _, _| c.redundant_experts = 1))]
#[case::batched_delegate(&[], with(|_, p, e| {
    (p.format, e.format) = (ActivationFormat::BatchedExperts, ActivationFormat::BatchedExperts);
    p.combine = CombineKind::WeightAndReduce;
    e.weight_and_reduce = TopKWeightAndReduce::delegate();
}))]
#[case::contiguous(&[], with(|_, _, e| e.weight_and_reduce = Contiguous.into()))]
#[case::everything(
    &[
        Axis::KernelKind,
        Axis::Format,
        Axis::DType,
        Axis::Device,
        Axis::Device,
        Axis::Reduction,
        Axis::RouterWeight,
        Axis::Quant,
    ],
    with(|c, p, e| {
        c.device = DeviceKind::Cuda;
        c.apply_router_weight_on_input = true;
        p.kind = KernelKind::Monolithic;
        p.format = ActivationFormat::BatchedExperts;
        p.topk_id = DType::U8;
        p.combine = CombineKind::WeightAndReduce;
        e.accepts.clear();
    })
)]
fn every_reason_is_given(#[case] wanted: &[Axis], #[case] change: Change) {
    let (mut config, mut prepare, mut experts) = pair();
    change(&mut config, &mut prepare, &mut experts);
    let result = negotiate(&config, &prepare, &experts);
    println!("{result:?}");
    assert_eq!(axes(result), wanted);
}

#[test]
fn a_reason_says_what_is_needed_and_what_there_is() {
    let (config, mut prepare, mut experts) = pair();
    prepare.wires = vec![BF16, fp8(QuantScheme::Fp8Ptpc)];
    experts.accepts = vec![fp8(QuantScheme::Fp8Block), fp8(QuantScheme::Fp8PerTensor)];
    let why = negotiate(&config, &prepare, &experts).unwrap_err();
    assert_eq!(
        why[0].to_string(),
        "quantisation: needs wire fp8_e4m3fn + dynamic f32 scale per 1x128 | fp8_e4m3fn + dynamic f32 scale per \
         tensor, found bf16 | fp8_e4m3fn + dynamic f32 scale per token"
    );
}

#[rstest]
#[case(&[fp8(QuantScheme::Fp8Block), BF16], &[BF16, fp8(QuantScheme::Fp8Block)], fp8(QuantScheme::Fp8Block))]
#[case(&[BF16, fp8(QuantScheme::Fp8Block)], &[fp8(QuantScheme::Fp8Block), BF16], BF16)]
#[case(&[fp8(QuantScheme::Fp8Ptpc), BF16], &[fp8(QuantScheme::Fp8Block), BF16], BF16)]
fn the_experts_order_of_preference_decides(
    #[case] accepts: &[WireFormat],
    #[case] wires: &[WireFormat],
    #[case] wanted: WireFormat,
) {
    let (config, mut prepare, mut experts) = pair();
    (prepare.wires, experts.accepts) = (wires.to_vec(), accepts.to_vec());
    assert_eq!(negotiate(&config, &prepare, &experts).unwrap().wire(), wanted);
}

#[rstest]
#[case(false, true, true, Some(RouterWeight::OnOutput))]
#[case(true, true, true, Some(RouterWeight::OnInputByPrepare))]
#[case(true, true, false, Some(RouterWeight::OnInputByPrepare))]
#[case(true, false, true, Some(RouterWeight::OnInputByExperts))]
#[case(true, false, false, None)]
fn the_router_weight_is_applied_once(
    #[case] on_input: bool,
    #[case] by_prepare: bool,
    #[case] by_experts: bool,
    #[case] wanted: Option<RouterWeight>,
) {
    let (mut config, mut prepare, mut experts) = pair();
    (config.apply_router_weight_on_input, prepare.weight_on_input) = (on_input, by_prepare);
    experts.weight_on_input = by_experts;
    assert_eq!(negotiate(&config, &prepare, &experts).ok().map(|plan| plan.router_weight()), wanted);
}

#[test]
fn a_plan_says_what_was_agreed() {
    let (config, mut prepare, mut experts) = pair();
    prepare.in_place_output = true;
    let plan = negotiate(&config, &prepare, &experts).unwrap();
    assert_eq!((plan.comm(), plan.experts(), plan.max_rows()), ("comm", "experts", MAX_TOKENS));
    assert_eq!((plan.kind(), plan.format()), (KernelKind::Modular, ActivationFormat::Standard));
    assert!(plan.in_place_output() && plan.weight_and_reduce().is_no_op());
    // The backend's buffer holds reduced rows, so unreduced outputs do not go there.
    experts.weight_and_reduce = Contiguous.into();
    assert!(!negotiate(&config, &prepare, &experts).unwrap().in_place_output());
}

#[test]
fn support_is_the_absence_of_reasons() {
    assert!(matches!(Support::unless(vec![], 3), Support::Supported(3)));
    let why = vec![Unsupported::new(Axis::Library, "libcuda", "nothing")];
    assert!(matches!(Support::unless(why.clone(), 3), Support::Unsupported(found) if found == why));
}

#[test]
fn names_of_axes_differ() {
    use Axis::*;
    let all = [
        Device,
        Library,
        KernelKind,
        Format,
        Quant,
        DType,
        Shape,
        Parallel,
        Routing,
        Reduction,
        RouterWeight,
        Activation,
        Capture,
    ];
    let names: std::collections::HashSet<_> = all.into_iter().map(Axis::name).collect();
    assert_eq!(names.len(), all.len());
}

fn routing() -> RoutingConfig {
    RoutingConfig {
        method: RoutingMethod::DeepSeekV3,
        num_experts: EXPERTS,
        top_k: TOP_K,
        groups: Some(ExpertGroups { n_group: 1, topk_group: 1 }),
        renormalize: true,
        routed_scaling_factor: 2.5,
        correction_bias: None,
    }
}

#[rstest]
#[case::nothing(&[], set(|_| {}))]
#[case::hidden(&["shape: needs hidden of at least 1, found 0"], set(|c| c.hidden = 0))]
#[case::intermediate(&["shape: needs intermediate of at least 1, found 0"], set(|c| c.intermediate = 0))]
#[case::top_k(&["shape: needs top_k of at least 1, found 0"], set(|c| c.top_k = 0))]
#[case::tokens(&["shape: needs max_tokens_per_rank of at least 1, found 0"], set(|c| c.max_tokens_per_rank = 0))]
#[case::node(&["shape: needs ranks_per_node of at least 1, found 0"], set(|c| c.ranks_per_node = 0))]
#[case::rows(&["shape: needs max_received_rows of at least 1, found 0"], set(|c| c.max_received_rows = Some(0)))]
#[case::experts(&["shape: needs top_k of at most 5 (the number of experts), found 6"], set(|c| c.top_k = 6))]
#[case::weight(
    &["router weight: needs top_k 1 (apply_router_weight_on_input), found top_k 3"],
    set(|c| c.apply_router_weight_on_input = true)
)]
#[case::weight_of_one(&[], set(|c| (c.apply_router_weight_on_input, c.top_k) = (true, 1)))]
#[case::routing(&[], set(|c| c.routing = Some(routing())))]
#[case::routing_top_k(
    &["routing: needs routing for top-3 of 5 experts, found top-2 of 5"],
    set(|c| c.routing = Some(RoutingConfig { top_k: 2, ..routing() }))
)]
#[case::routing_experts(
    &["routing: needs routing for top-3 of 5 experts, found top-3 of 9"],
    set(|c| c.routing = Some(RoutingConfig { num_experts: 9, ..routing() }))
)]
#[case::replicas(
    &["shape: needs top_k of at most 2 (the number of experts), found 3"],
    set(|c| c.redundant_experts = 3)
)]
#[case::only_replicas(
    &["shape: needs redundant_experts of at most 4 in 5 experts, found 5"],
    set(|c| c.redundant_experts = 5)
)]
#[case::routing_knows_logical_experts(
    &["routing: needs routing for top-3 of 4 experts, found top-3 of 5"],
    set(|c| (c.redundant_experts, c.routing) = (1, Some(routing())))
)]
#[case::several(
    &["shape: needs hidden of at least 1, found 0", "shape: needs top_k of at most 5 (the number of experts), found 7",
      "router weight: needs top_k 1 (apply_router_weight_on_input), found top_k 7",
      "routing: needs routing for top-7 of 5 experts, found top-3 of 5"],
    set(|c| {
        (c.hidden, c.top_k, c.apply_router_weight_on_input) = (0, 7, true);
        c.routing = Some(routing());
    })
)]
fn a_configuration_contradicts_itself(#[case] wanted: &[&str], #[case] change: fn(&mut MoeConfig)) {
    let mut config = config(2);
    change(&mut config);
    let found: Vec<String> = config.contradictions().iter().map(ToString::to_string).collect();
    assert_eq!(found, wanted);
}

#[test]
fn a_node_may_hold_all_ranks_or_not() {
    let mut config = config(2);
    assert!(config.is_single_node());
    config.ranks_per_node = 1;
    assert!(!config.is_single_node());
}
