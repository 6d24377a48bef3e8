//! FlashInfer's limits as refusals, each with its reason.

mod common;

use std::error::Error as _;

use common::*;
use fused_moe_core::QuantScheme::*;
use fused_moe_core::*;
use half::bf16;
use rstest::rstest;
use trtllm_experts::{ROUTING, SchemeLimits};

/// A layer that both forms take.
fn fine(quant: QuantScheme) -> MoeConfig {
    case(quant, 1).config()
}

fn routing(method: RoutingMethod) -> RoutingConfig {
    RoutingConfig { method, ..fine(Unquantized).routing.unwrap() }
}

/// With `experts` experts on one rank, in the routing too.
fn with_experts(config: MoeConfig, experts: usize, top_k: usize) -> MoeConfig {
    let placement = ExpertPlacement::linear(experts, 1).unwrap();
    let routing = config.routing.clone().map(|r| RoutingConfig { num_experts: experts, top_k, ..r });
    MoeConfig { placement, top_k, routing, ..config }
}

fn with_routing(routing: RoutingConfig) -> MoeConfig {
    let config = fine(Unquantized);
    let placement = ExpertPlacement::linear(routing.num_experts, 1).unwrap();
    MoeConfig { top_k: routing.top_k, placement, routing: Some(routing), ..config }
}

fn reasons(provider: &dyn ExpertsProvider, config: &MoeConfig) -> Vec<String> {
    match provider.supports(config) {
        Support::Supported(_) => vec![],
        Support::Unsupported(reasons) => {
            assert!(!reasons.is_empty());
            let plan_of = fine(Unquantized);
            let plan = plan(provider, &plan_of, 4);
            let built = provider.build(config, &plan, Rank(0)).map(drop).unwrap_err();
            assert_eq!(built.kind, ErrorKind::Contract, "what is refused cannot be built");
            assert_eq!(provider.workspace_bytes(config, &plan), 0);
            reasons.iter().map(ToString::to_string).collect()
        }
    }
}

/// The reasons of both forms, which must agree.
fn both(config: &MoeConfig) -> Vec<String> {
    let of_both = reasons(&monolithic(), config);
    assert_eq!(of_both, reasons(&routed(), config));
    of_both
}

#[test]
fn what_fits_is_supported() {
    for quant in SCHEMES {
        assert_eq!(both(&fine(quant)), [""; 0], "{quant}");
    }
    for limits in ROUTING {
        let &(experts, top_k) = limits.steps.last().unwrap();
        let routing = RoutingConfig { num_experts: experts, top_k, ..routing(limits.method) };
        assert_eq!(reasons(&monolithic(), &with_routing(routing)), [""; 0], "{}", limits.method);
    }
}

#[rstest]
#[case(
    Fp8PerTensor(FN),
    "a static scale of the activations, which is folded into those of the weights",
    "fp8-per-tensor"
)]
#[case(Fp8Ptpc(FN), "a scale per tensor or per 128x128 block, not per output channel", "fp8-ptpc")]
#[case(
    Fp8Block(Fp8Format::E4M3Fnuz),
    "none, fp8-block, fp8-per-tensor-static (e4m3fn) or nvfp4",
    "fp8-block (fp8_e4m3fnuz, max 240)"
)]
fn schemes_are_refused(#[case] quant: QuantScheme, #[case] wanted: &str, #[case] found: &str) {
    assert_eq!(both(&fine(quant)), [format!("quantisation: needs {wanted}, found {found}")]);
}

#[test]
fn mxfp4_is_refused() {
    let reasons = both(&fine(Mxfp4));
    assert!(reasons.contains(&"quantisation: needs E4M3 scales of FP4 weights (nvfp4), found mxfp4".into()));
}

#[rstest]
#[case(Unquantized, 96, 192, &["hidden of a multiple of 64, found 96", "intermediate of a multiple of 128, found 192"])]
#[case(Unquantized, 192, 128, &[])]
#[case(Fp8Block(FN), 192, 128, &["hidden of a multiple of 128, found 192"])]
#[case(Fp8Block(FN), 256, 704, &["intermediate of a multiple of 128, found 704"])]
#[case(Fp8PerTensorStatic(FN), 96, 704, &[])]
#[case(Fp8PerTensorStatic(FN), 80, 24, &["hidden of a multiple of 32, found 80", "intermediate of a multiple of 16, found 24"])]
#[case(Nvfp4, 128, 96, &["hidden of a multiple of 256, found 128", "intermediate of a multiple of 64, found 96"])]
fn sizes_are_refused(
    #[case] quant: QuantScheme,
    #[case] hidden: usize,
    #[case] intermediate: usize,
    #[case] wanted: &[&str],
) {
    let wanted: Vec<_> = wanted.iter().map(|reason| format!("shape: needs {reason}")).collect();
    assert_eq!(both(&MoeConfig { hidden, intermediate, ..fine(quant) }), wanted);
}

#[test]
fn limits_of_other_schemes_are_data() {
    let of = |quant| SchemeLimits::of(quant).unwrap();
    let fp8 = of(Fp8PerTensorStatic(FN));
    assert_eq!((fp8.hidden, fp8.intermediate, fp8.weight_on_input), (32, 16, true));
    let fp4 = of(Nvfp4);
    assert_eq!((fp4.hidden, fp4.intermediate, fp4.swiglu_and_bias), (256, 64, true));
}

#[test]
fn a_layer_is_refused_with_every_reason() {
    let fine = fine(Unquantized);
    let mut config = with_experts(fine.clone(), 13, 13);
    config.activation = Activation::SWIGLU_OAI;
    config.expert_bias = true;
    config.redundant_experts = 1;
    config.max_tokens_per_rank = 1 << 28;
    let found = reasons(&routed(), &config);
    let wanted = [
        "activation: needs silu (with nvfp4 also swiglu-oai and silu-clamped), found swiglu-oai(alpha 1.702, limit 7)",
        "weights: needs experts without biases (or nvfp4), found biases",
        "shape: needs a multiple of 4 experts, found 13",
        "shape: needs more than top_k 13 experts, found 13",
        "parallelism: needs no redundant experts (EPLB), found 1",
        "shape: needs at most 2147483647 slots over all ranks, found 3489660928",
    ];
    for reason in wanted {
        assert!(found.iter().any(|found| found == reason), "{reason} is not in {found:#?}");
    }
}

#[rstest]
#[case(ExpertPlacement::linear(16, 3))]
#[case(ExpertPlacement::from_owners(&[0, 1].repeat(8), 2))]
fn placements_are_refused(#[case] placement: std::result::Result<ExpertPlacement, PlacementError>) {
    let placement = placement.unwrap();
    let config = MoeConfig { ranks_per_node: placement.ep_size(), placement, ..fine(Unquantized) };
    let wanted = "parallelism: needs equally many experts on every rank, in the order of their ids, found \
                  another placement";
    assert_eq!(both(&config), [wanted]);
}

#[test]
fn routing_outside_is_for_the_routed_form() {
    let config = MoeConfig { routing: None, ..fine(Unquantized) };
    let wanted = "routing: needs a routing method, found routing outside of the experts";
    assert_eq!(reasons(&monolithic(), &config), [wanted]);
    assert_eq!(reasons(&routed(), &config), [""; 0]);
}

/// Everything about routing concerns the monolithic form alone.
#[rstest]
#[case::unknown(
    RoutingConfig { groups: Some(ExpertGroups { n_group: 4, topk_group: 2 }), ..routing(RoutingMethod::GroupLimitedSoftmax) },
    "routing: needs softmax, renormalize, renormalize-naive, deepseek-v3, llama4, topk, sigmoid, topk-sigmoid, \
     sigmoid-renorm, minimax2, found group-limited-softmax"
)]
#[case::softmax_experts(
    RoutingConfig { num_experts: 260, ..routing(RoutingMethod::Default) },
    "shape: needs at most 256 experts for softmax, found 260"
)]
#[case::sigmoid_top_k(
    RoutingConfig { top_k: 9, ..routing(RoutingMethod::Sigmoid) },
    "shape: needs top_k of at most 8 for sigmoid with 16 experts, found 9"
)]
#[case::llama4_experts(
    RoutingConfig { num_experts: 132, top_k: 1, ..routing(RoutingMethod::Llama4) },
    "shape: needs at most 128 experts for llama4, found 132"
)]
#[case::llama4_top_k(
    RoutingConfig { top_k: 2, ..routing(RoutingMethod::Llama4) },
    "shape: needs top_k of at most 1 for llama4 with 16 experts, found 2"
)]
#[case::deepseek_top_k(
    RoutingConfig { num_experts: 384, top_k: 9, ..routing(RoutingMethod::DeepSeekV3) },
    "shape: needs top_k of at most 8 for deepseek-v3 with 384 experts, found 9"
)]
#[case::deepseek_groups(
    RoutingConfig { groups: Some(ExpertGroups { n_group: 16, topk_group: 4 }), num_experts: 64, ..routing(RoutingMethod::DeepSeekV3) },
    "routing: needs n_group of at most 8, found 16"
)]
#[case::deepseek_topk_group(
    RoutingConfig { groups: Some(ExpertGroups { n_group: 8, topk_group: 5 }), ..routing(RoutingMethod::DeepSeekV3) },
    "routing: needs topk_group of at most 4, found 5"
)]
#[case::deepseek_group_size(
    RoutingConfig { groups: Some(ExpertGroups { n_group: 4, topk_group: 2 }), num_experts: 256, ..routing(RoutingMethod::DeepSeekV3) },
    "routing: needs groups of at most 32 experts, found 64"
)]
#[case::deepseek_all_of_the_groups(
    RoutingConfig { groups: Some(ExpertGroups { n_group: 4, topk_group: 1 }), ..routing(RoutingMethod::DeepSeekV3) },
    "routing: needs top_k below the 4 experts of 1 groups, found 4"
)]
#[case::deepseek_weights(
    RoutingConfig { renormalize: false, ..routing(RoutingMethod::DeepSeekV3) },
    "routing: needs weights divided by their sum, found weights as they are (renormalize false)"
)]
#[case::factor(
    RoutingConfig { routed_scaling_factor: 2.5, ..routing(RoutingMethod::SigmoidRenorm) },
    "routing: needs a routed_scaling_factor of 1 for sigmoid-renorm, found 2.5"
)]
fn routing_is_refused(#[case] routing: RoutingConfig, #[case] wanted: &str) {
    let config = with_routing(routing);
    let found = reasons(&monolithic(), &config);
    assert!(found.iter().any(|reason| reason == wanted), "{found:#?}");
    assert_eq!(reasons(&routed(), &config), [""; 0]);
}

#[test]
fn groups_of_methods_without_groups_are_refused() {
    let groups = Some(ExpertGroups { n_group: 4, topk_group: 2 });
    let found = reasons(
        &monolithic(),
        &with_routing(RoutingConfig { groups, ..routing(RoutingMethod::Renormalize) }),
    );
    let wanted = "routing: needs no expert groups for renormalize, found 2 of 4";
    assert!(found.contains(&wanted.into()), "{found:#?}");
}

/// The routed form is compiled for up to 2048 experts and 32 of them per row.
#[test]
fn the_routed_form_has_sizes_too() {
    let outside = MoeConfig { routing: None, ..fine(Unquantized) };
    let found = reasons(&routed(), &with_experts(outside.clone(), 2052, 4));
    assert_eq!(found, ["shape: needs at most 2048 experts for the routed form, found 2052"]);
    let found = reasons(&routed(), &with_experts(outside, 64, 33));
    assert_eq!(found, ["shape: needs top_k of at most 32 for the routed form with 64 experts, found 33"]);
}

/// Monolithic dispatch knows no routing weight, and only Llama 4 in FP8 per tensor has it inside of the experts.
#[test]
fn weights_on_the_input_need_a_side_that_applies_them() {
    let llama4 = with_routing(RoutingConfig { top_k: 1, ..routing(RoutingMethod::Llama4) });
    let config = MoeConfig { apply_router_weight_on_input: true, ..llama4 };
    let Support::Supported(caps) = monolithic().supports(&config) else { panic!("refused") };
    let wires = vec![WireFormat::unquantized(DType::Bf16)];
    let comm = PrepareCaps::host("test", KernelKind::Monolithic, wires, 4);
    let reasons = negotiate(&config, &comm, &caps).unwrap_err();
    assert_eq!(reasons[0].to_string(), "router weight: needs weight on input, found neither side applies it");
}

/// The error of a backend underneath, after a look at the frame around it.
fn cause<T>(backend: &str, result: Result<T>) -> String {
    let Err(error) = result else { panic!("was accepted") };
    assert_eq!(
        (error.kind.clone(), error.stage, error.backend),
        (ErrorKind::Contract, Stage::Experts, backend)
    );
    error.source().expect("has a source").to_string()
}

#[test]
fn foreign_plans_and_weights_are_refused() {
    let config = fine(Unquantized);
    let of_routed = plan(&routed(), &config, 4);
    let built = monolithic().build(&config, &of_routed, Rank(0));
    assert_eq!(cause("trtllm", built), "the plan is for the experts trtllm_routed, needs trtllm");

    let case = case(Unquantized, 1);
    let (config, batch, weights) = (case.config(), Batch::of(&case), case.weights());
    let all = weights.matrices();
    let mut built = Built::new(&monolithic(), &config, (&all, Rank(0)), batch.max_rows());
    built.weights = routed().pack(&config, Rank(0), &all).unwrap();
    let found = cause("trtllm", built.apply(&batch));
    assert!(found.starts_with("the weights were packed for backend trtllm_routed"), "{found}");
    let few = cause("trtllm_routed", routed().pack(&config, Rank(0), &all[1..]));
    assert_eq!(few, "rank 0 holds 16 experts, 15 were given");
}

#[test]
fn misfit_calls_are_refused() {
    let case = case(Unquantized, 1);
    let (config, batch, weights) = (case.config(), Batch::of(&case), case.weights());
    let all = weights.matrices();
    let built = |provider: &dyn ExpertsProvider| Built::new(provider, &config, (&all, Rank(0)), batch.rows);
    let (inside, outside) = (built(&monolithic()), built(&routed()));
    let mut many = Batch::of(&case);
    many.rows += 1;
    let wanted = format!("{} rows were received, at most {} are possible", many.rows, batch.rows);
    assert_eq!(cause("trtllm", inside.apply(&many)), wanted);
    assert_eq!(cause("trtllm_routed", outside.apply(&many)), wanted);

    let mut unknown = Batch::of(&case);
    unknown.ids[5] = 16;
    let found = cause("trtllm_routed", outside.apply(&unknown));
    assert_eq!(found, "expert id 16 of row 1 slot 1 is neither -1 nor below 16");

    let Experts::Monolithic(kernel) = &inside.experts else { panic!("not monolithic") };
    let apply = |logits: &[f32], experts: usize, bytes: usize| {
        let mut workspace = Workspace::new(DeviceKind::Host, bytes).unwrap();
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let (hidden, count) = (vec![bf16::ONE; config.hidden], [1]);
        let input = DispatchedMonolithic {
            hidden: TensorView::from_slice(&hidden, DType::Bf16, &[1, config.hidden]).unwrap(),
            scale: None,
            logits: TensorView::from_slice(logits, DType::F32, &[1, experts]).unwrap(),
            rows: ReceivedRows(TensorView::from_slice(&count, DType::I32, &[1]).unwrap()),
            output: None,
        };
        let mut out = vec![bf16::ONE; config.hidden];
        let out = TensorViewMut::from_slice(&mut out, DType::Bf16, &[1, config.hidden]).unwrap();
        kernel.apply(&mut cx, &inside.weights, &input, out)
    };
    let bytes = kernel.workspace_bytes();
    assert!(apply(&[0.0; 16], 16, bytes).is_ok());
    let found = cause("trtllm", apply(&[0.0; 15], 15, bytes));
    assert!(found.starts_with("the received logits is [1, 15] of f32, needs [1 or more, 16]"), "{found}");
    assert!(cause("trtllm", apply(&[0.0; 16], 16, bytes - 1024)).contains("the allocation holds"));
}
