//! Choosing a pair, agreeing on it, and every refusal.

use std::sync::Arc;

use fused_moe_core::{
    Axis, Contiguous, DType, DeviceKind, Error, ErrorKind, ExpertPlacement, ExpertsCaps, ExpertsProvider,
    Fp8Format, FusedMoEKernel, KernelKind, MakeError, Mismatch, MoeConfig, Plan, PrepareFinalizeProvider,
    ProcessGroup, QuantScheme, Rank, Registry, RoutingConfig, RoutingMethod, Selection, SingleRank,
    Unsupported, WireFormat, maybe_make_prepare_finalize,
};
use rstest::rstest;

use crate::groups;
use crate::layer::{EXPERTS, TOP_K, config};
use crate::providers::{CommProvider, ToyProvider, comm, experts};
use crate::workspace::Pretended;

const BF16: WireFormat = WireFormat::unquantized(DType::Bf16);
const ANY: Selection<'static> = Selection { comm: None, experts: None };

fn fp8() -> WireFormat {
    QuantScheme::Fp8Block(Fp8Format::E4M3Fn).quantized_wire(DType::Bf16)
}

fn registry() -> Registry {
    Registry::new()
        .with_comm(comm("mori_high_throughput"))
        .with_comm(comm("mori_low_latency"))
        .with_comm(comm("naive"))
        .with_experts(experts("aiter", vec![BF16]))
}

#[rstest]
#[case(
    "mori",
    "unknown all2all backend \"mori\" (use mori_high_throughput or mori_low_latency); known: \
                mori_high_throughput, mori_low_latency, naive"
)]
#[case(
    "mori_l",
    "unknown all2all backend \"mori_l\" (use mori_low_latency); known: mori_high_throughput, \
                  mori_low_latency, naive"
)]
#[case("deepep", "unknown all2all backend \"deepep\"; known: mori_high_throughput, mori_low_latency, naive")]
#[case("", "unknown all2all backend \"\"; known: mori_high_throughput, mori_low_latency, naive")]
fn an_unknown_backend_is_answered_with_the_known_ones(#[case] name: &str, #[case] text: &str) {
    let selection = Selection { comm: Some(name), experts: None };
    assert_eq!(registry().survey(&config(1), selection).unwrap_err().to_string(), text);
    assert_eq!(registry().build(&config(1), selection, &SingleRank).unwrap_err().to_string(), text);
    assert!(registry().comm("naive").is_ok());
    let error = registry().experts("triton").err().unwrap().to_string();
    assert_eq!(error, "unknown experts backend \"triton\"; known: aiter");
}

fn refused(error: MakeError) -> Vec<(String, Vec<Axis>)> {
    let MakeError::NoneFits(pairs) = error else { panic!("{error}") };
    let axes = |why: &[Unsupported]| why.iter().map(|reason| reason.axis).collect();
    pairs.iter().map(|pair| (format!("{} x {}", pair.comm, pair.experts), axes(&pair.reasons))).collect()
}

#[test]
fn all_pairs_and_all_reasons_are_listed() {
    let why = |axis| Unsupported::new(axis, "more", "less");
    let refusing =
        ToyProvider { refuses: vec![why(Axis::Library), why(Axis::Shape)], ..experts("picky", vec![BF16]) };
    let mut modular = experts("fp8", vec![fp8()]);
    modular.caps.topk_id = DType::U8;
    let mut monolithic = experts("mono", vec![BF16]);
    monolithic.caps.kind = KernelKind::Monolithic;
    let registry = Registry::new()
        .with_comm(comm("a"))
        .with_comm(CommProvider { min_ranks: 2, ..comm("b") })
        .with_experts(refusing)
        .with_experts(modular)
        .with_experts(monolithic);
    let error = registry.build(&config(1), ANY, &SingleRank).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("no backends fit\n  - x picky: "), "{text}");
    assert_eq!(text.lines().count(), 6, "{text}");
    assert!(text.contains("library: needs more, found less; shape: needs more, found less"), "{text}");
    let wanted = [
        ("- x picky", vec![Axis::Library, Axis::Shape]),
        ("a x fp8", vec![Axis::DType, Axis::Quant]),
        ("b x fp8", vec![Axis::Parallel]),
        ("a x mono", vec![Axis::KernelKind]),
        ("b x mono", vec![Axis::KernelKind, Axis::Parallel]),
    ];
    assert_eq!(refused(error), wanted.map(|(pair, axes)| (pair.to_string(), axes)));
}

#[test]
fn contradictions_come_before_capabilities() {
    let mut config = config(1);
    config.top_k = EXPERTS + 1;
    let refusing = ToyProvider {
        refuses: vec![Unsupported::new(Axis::Library, "x", "y")],
        ..experts("picky", vec![BF16])
    };
    let registry = registry().with_experts(refusing);
    let survey = registry.survey(&config, ANY).unwrap();
    assert!(survey.fitting.is_empty());
    let axes: Vec<Vec<Axis>> =
        survey.refused.iter().map(|pair| pair.reasons.iter().map(|reason| reason.axis).collect()).collect();
    assert_eq!(axes, [vec![Axis::Shape], vec![Axis::Shape, Axis::Library]]);
    let caps = ExpertsCaps::host("aiter", vec![BF16]);
    let (naive, other) = (comm("naive"), comm("other"));
    let error = maybe_make_prepare_finalize(&[&naive, &other], &config, &caps, &SingleRank).unwrap_err();
    assert_eq!(refused(error).len(), 2);
}

#[test]
fn a_survey_holds_every_pair_in_order_of_preference() {
    let registry = registry().with_experts(experts("second", vec![BF16]));
    let names =
        |plans: &[Plan]| plans.iter().map(|p| format!("{} x {}", p.comm(), p.experts())).collect::<Vec<_>>();
    let survey = registry.survey(&config(1), ANY).unwrap();
    let all = ["mori_high_throughput", "mori_low_latency", "naive"];
    let wanted: Vec<String> =
        ["aiter", "second"].iter().flat_map(|e| all.map(|c| format!("{c} x {e}"))).collect();
    assert_eq!(names(&survey.fitting), wanted);
    let selection = Selection { comm: Some("naive"), experts: Some("second") };
    assert_eq!(names(&registry.survey(&config(1), selection).unwrap().fitting), ["naive x second"]);
    let debug = format!("{registry:?}");
    assert!(debug.contains("mori_low_latency") && debug.contains("second"), "{debug}");
}

#[rstest]
#[case::quantized_first(vec![fp8(), BF16], vec![BF16, fp8()], Some(fp8()))]
#[case::unquantized_first(vec![BF16, fp8()], vec![fp8(), BF16], Some(BF16))]
#[case::only_unquantized(vec![fp8(), BF16], vec![BF16], Some(BF16))]
#[case::neither(vec![fp8()], vec![BF16], None)]
fn dispatch_quantises_when_the_experts_prefer_it(
    #[case] accepts: Vec<WireFormat>,
    #[case] wires: Vec<WireFormat>,
    #[case] wanted: Option<WireFormat>,
) {
    let caps = ExpertsCaps::host("experts", accepts);
    let provider = CommProvider { wires, ..comm("only") };
    match maybe_make_prepare_finalize(&[&provider], &config(1), &caps, &SingleRank) {
        Ok((plan, built)) => {
            assert_eq!((Some(plan.wire()), built.caps().name), (wanted, "only"));
            assert_eq!(built.allocated_bytes(), provider.required_bytes(&config(1), &plan));
        }
        Err(error) => {
            assert_eq!(wanted, None);
            assert_eq!(refused(error), [("only x experts".to_string(), vec![Axis::Quant])]);
        }
    }
}

#[test]
fn one_rank_is_no_exception() {
    let caps = ExpertsCaps::host("experts", vec![BF16]);
    let wide = CommProvider { min_ranks: 2, ..comm("wide") };
    let error = maybe_make_prepare_finalize(&[], &config(1), &caps, &SingleRank).unwrap_err();
    assert_eq!((error.to_string().as_str(), refused(error)), ("no backends fit", vec![]));
    let error = maybe_make_prepare_finalize(&[&wide], &config(1), &caps, &SingleRank).unwrap_err();
    assert_eq!(refused(error), [("wide x experts".to_string(), vec![Axis::Parallel])]);
    let local = comm("local");
    let (plan, _) = maybe_make_prepare_finalize(&[&wide, &local], &config(1), &caps, &SingleRank).unwrap();
    assert_eq!(plan.comm(), "local");
}

fn cause(error: MakeError) -> Error {
    let MakeError::Build(error) = error else { panic!("{error}") };
    error
}

fn mismatch(error: MakeError) -> Mismatch {
    match cause(error).kind {
        ErrorKind::Mismatch(mismatch) => *mismatch,
        kind => panic!("{kind}"),
    }
}

fn routing() -> RoutingConfig {
    RoutingConfig {
        method: RoutingMethod::DeepSeekV3,
        num_experts: EXPERTS,
        top_k: TOP_K,
        groups: None,
        renormalize: true,
        routed_scaling_factor: 2.5,
        correction_bias: Some(vec![0.0; EXPERTS]),
    }
}

/// Gives a closure its type.
fn set(change: fn(&mut MoeConfig)) -> fn(&mut MoeConfig) {
    change
}

/// One rank of three differs in one field.
#[rstest]
#[case("hidden", set(|c| c.hidden += 1))]
#[case("intermediate", set(|c| c.intermediate += 1))]
#[case("top_k", set(|c| { c.top_k -= 1; c.routing = None }))]
#[case("max_tokens_per_rank", set(|c| c.max_tokens_per_rank += 1))]
#[case("in_dtype", set(|c| c.in_dtype = DType::F32))]
#[case("quant", set(|c| c.quant = QuantScheme::Fp8Block(Fp8Format::E4M3Fnuz)))]
#[case("apply_router_weight_on_input", set(|c| c.apply_router_weight_on_input = true))]
#[case("routing", set(|c| c.routing = None))]
#[case("routing", set(|c| c.routing = Some(RoutingConfig { routed_scaling_factor: 1.0, ..routing() })))]
#[case("routing", set(|c| c.routing = Some(RoutingConfig { renormalize: false, ..routing() })))]
#[case("routing", set(|c| c.routing.as_mut().unwrap().correction_bias.as_mut().unwrap()[3] = 0.5))]
#[case("ep_size", set(|c| c.placement = ExpertPlacement::from_owners(&[0, 0, 1, 1, 2], 4).unwrap()))]
#[case("placement", set(|c| c.placement = ExpertPlacement::from_owners(&[0, 0, 1, 2, 2], 3).unwrap()))]
#[case("ranks_per_node", set(|c| c.ranks_per_node = 1))]
#[case("device", set(|c| c.device = DeviceKind::Cuda))]
fn a_difference_is_an_error_on_every_rank(#[case] field: &str, #[case] change: fn(&mut MoeConfig)) {
    for odd in 0..3 {
        let errors = groups::run(3, |group| {
            let mut config = config(3);
            config.routing = Some(routing());
            if group.rank() == Rank(odd) {
                change(&mut config);
            }
            mismatch(registry().build(&config, ANY, group).unwrap_err())
        });
        for (rank, error) in errors.iter().enumerate() {
            assert_eq!(error.field, field, "rank {rank}: {error}");
            assert_ne!(error.mine, error.theirs);
            assert!(Rank(rank as u32) == Rank(odd) || error.rank == Rank(odd), "rank {rank}: {error}");
            let odd_one = &errors[odd as usize];
            assert!((&error.mine, &error.theirs) == (&odd_one.theirs, &odd_one.mine) || rank == odd as usize);
        }
    }
}

/// Equal configurations, and one rank that knows other backends.
#[rstest]
#[case("comm", Registry::new().with_comm(comm("other")).with_experts(experts("aiter", vec![BF16])))]
#[case("comm", Registry::new())]
#[case("experts", Registry::new().with_comm(comm("mori_high_throughput")).with_experts(experts("x", vec![BF16])))]
#[case("max_rows", Registry::new()
    .with_comm(CommProvider { max_rows: 9, ..comm("mori_high_throughput") })
    .with_experts(experts("aiter", vec![BF16])))]
#[case("wire", Registry::new()
    .with_comm(CommProvider { wires: vec![fp8()], ..comm("mori_high_throughput") })
    .with_experts(experts("aiter", vec![fp8()])))]
fn different_plans_are_an_error_on_every_rank(#[case] field: &str, #[case] odd: Registry) {
    let fields = groups::run(2, |group| {
        let registry = if group.rank() == Rank(1) { odd.clone() } else { registry() };
        mismatch(registry.build(&config(2), ANY, group).unwrap_err()).field
    });
    assert_eq!(fields, [field, field]);
    let agreed = groups::run(2, |group| registry().build(&config(2), ANY, group).is_ok());
    assert_eq!(agreed, [true, true], "the control is built");
}

#[test]
fn a_rank_with_an_unknown_name_does_not_keep_the_others_waiting() {
    let errors = groups::run(2, |group| {
        let comm = Some(if group.rank() == Rank(0) { "mori" } else { "naive" });
        registry().build(&config(2), Selection { comm, experts: None }, group).unwrap_err()
    });
    assert!(matches!(errors[0], MakeError::UnknownBackend { .. }), "{}", errors[0]);
    let MakeError::Build(Error { kind: ErrorKind::Mismatch(other), .. }) = &errors[1] else {
        panic!("{}", errors[1]);
    };
    assert_eq!((&*other.field, &*other.mine, &*other.theirs), ("comm", "naive", "none"));
}

#[test]
fn a_group_of_another_size_is_a_broken_contract() {
    for error in groups::run(2, |group| cause(registry().build(&config(3), ANY, group).unwrap_err())) {
        assert_eq!(error.kind, ErrorKind::Contract);
        let why = error.source.unwrap().to_string();
        assert_eq!(why, "the placement is for 3 ranks, the group has 2");
    }
}

#[rstest]
fn required_bytes_are_what_a_kernel_holds(
    #[values(false, true)] contiguous: bool,
    #[values(1, 3)] ranks: usize,
) {
    let mut provider = experts("aiter", vec![BF16]);
    if contiguous {
        provider.caps.weight_and_reduce = Contiguous.into();
    }
    let registry = Registry::new().with_comm(comm("naive")).with_experts(provider);
    let config = config(ranks);
    let plan = registry.survey(&config, ANY).unwrap().fitting.remove(0);
    groups::run(ranks, |group| {
        let kernel = registry.build(&config, ANY, group).unwrap();
        let required = registry.required_bytes(&config, &plan, group.rank()).unwrap();
        assert_eq!(kernel.bytes(), required);
        assert!(required.comm > 0 && required.workspace > 0 && required.expert_out > 0);
        assert_eq!(kernel.plan(), &plan);
        let FusedMoEKernel::Modular(mut modular) = kernel else { panic!("modular experts") };
        assert_eq!(modular.prepare_finalize().allocated_bytes(), required.comm);
        assert_eq!(modular.config(), &config);
    });
}

#[test]
fn the_number_of_packed_experts_is_checked() {
    let (config, provider) = (config(2), experts("aiter", vec![BF16]));
    let error = provider.pack(&config, Rank(0), &[]).unwrap_err();
    assert_eq!(error.source.unwrap().to_string(), "rank 0 holds 3 experts, 0 were given");
    let nobody = provider.pack(&config, Rank(7), &[]).unwrap();
    assert_eq!((nobody.backend(), nobody.bytes(), nobody.packed::<u8>()), ("aiter", 0, None));
}

#[test]
fn a_device_needs_an_allocator_and_its_bytes_are_those_that_were_promised() {
    let registry = || {
        let mut aiter = experts("aiter", vec![BF16]);
        aiter.caps.devices = vec![DeviceKind::Cuda];
        let local = CommProvider { device: DeviceKind::Cuda, ..comm("local") };
        Registry::new().with_comm(local).with_experts(aiter)
    };
    let config = MoeConfig { device: DeviceKind::Cuda, ..config(1) };
    let survey = registry().survey(&config, ANY).unwrap();
    assert!(survey.fitting.is_empty());
    let reason = survey.refused[0].reasons[0].to_string();
    assert_eq!(reason, "device: needs memory of Cuda, found no allocator for it");

    let memory = Pretended { address: 4096, limit: 1 << 20, short: 0 };
    let with_memory = registry().with_memory(Arc::new(memory));
    let kernel = with_memory.build(&config, ANY, &SingleRank).unwrap();
    let promised = with_memory.required_bytes(&config, kernel.plan(), Rank(0)).unwrap();
    let held = kernel.bytes();
    assert_eq!((held.workspace, held.expert_out), (promised.workspace, promised.expert_out));

    let full = Pretended { address: 4096, limit: 0, short: 0 };
    let full = registry().with_memory(Arc::new(full)).build(&config, ANY, &SingleRank);
    let MakeError::Build(error) = full.unwrap_err() else { panic!("refused") };
    assert!(matches!(error.kind, ErrorKind::OutOfMemory { .. }), "{error}");
}
