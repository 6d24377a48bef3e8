//! Memory and traffic are what the providers say, and what cannot be done is refused.

use ep_transport::{ThreadOptions, transport_of};
use fused_moe_core::*;
use naive_comm::{AllGatherReduceScatter, Local};
use rstest::rstest;

use crate::layer::{Case, Tokens};

#[rstest]
fn memory_and_traffic_are_as_announced(
    #[values(("local", 1), ("naive", 1), ("naive", 3), ("allgather_reducescatter", 1), ("allgather_reducescatter", 3))]
    (comm, ranks): (&'static str, usize),
    #[values(KernelKind::Modular, KernelKind::Monolithic)] kind: KernelKind,
    #[values(QuantScheme::Unquantized, QuantScheme::Fp8Block(Fp8Format::E4M3Fn))] quant: QuantScheme,
    #[values(true, false)] in_place: bool,
) {
    let case = Case { kind, quant, in_place, ..Case::new(comm, ranks) };
    let moved = case.run(ThreadOptions::default(), |mut rig| {
        let required = case.provider().required_bytes(&rig.config, &rig.plan);
        let transport = transport_of(&rig.group).unwrap();
        let before = transport.traffic();
        // One handle serves any number of layers.
        for round in 1..=58 {
            rig.good_round(round);
            assert_eq!(rig.comm.allocated_bytes(), required);
        }
        (transport.traffic() - before).remote_bytes
    });
    let config = case.config();
    let bytes = case.provider().wire_bytes_per_token(&config, &case.plan(&config));
    let tokens: usize = (1..=58)
        .flat_map(|round| (0..ranks).map(move |rank| (rank, round)))
        .map(|(rank, round)| Tokens::of(&case, rank, round).count)
        .sum();
    assert_eq!(moved.iter().sum::<u64>() as f64, tokens as f64 * (bytes.dispatch + bytes.combine));
}

fn axes(support: Support<PrepareCaps>) -> Vec<Axis> {
    match support {
        Support::Supported(_) => Vec::new(),
        Support::Unsupported(why) => why.iter().map(|reason| reason.axis).collect(),
    }
}

#[test]
fn every_reason_is_given() {
    let mut config = Case::new("local", 2).config();
    config.in_dtype = DType::F16;
    assert_eq!(axes(Local.supports(&config, KernelKind::Modular)), [Axis::DType, Axis::Parallel]);
    assert_eq!(axes(AllGatherReduceScatter.supports(&config, KernelKind::Monolithic)), [Axis::DType]);
    config.in_dtype = DType::Bf16;
    assert_eq!(axes(AllGatherReduceScatter.supports(&config, KernelKind::Monolithic)), []);
}

#[test]
fn a_handle_is_built_only_for_its_plan_and_group() {
    let case = Case::new("allgather_reducescatter", 1);
    let config = case.config();
    let plan = case.plan(&config);
    let refusal = |provider: &dyn PrepareFinalizeProvider, config: &MoeConfig| {
        let error = provider.build(config, &plan, &SingleRank).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Contract);
        error.source.unwrap().to_string()
    };
    assert_eq!(refusal(&AllGatherReduceScatter, &config), "the group has no transport");
    assert_eq!(refusal(&Local, &config), "the plan is for allgather_reducescatter");
    let of_two = MoeConfig { placement: ExpertPlacement::linear(4, 2).unwrap(), ..config };
    let why = "the placement is for 2 ranks, the group has 1";
    assert_eq!(refusal(&AllGatherReduceScatter, &of_two), why);
}
