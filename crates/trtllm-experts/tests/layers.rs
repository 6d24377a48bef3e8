//! Whole layers behind reference comms against the oracle, in sizes that fill FlashInfer's layouts: those of the
//! conformance suite mostly do not.

mod common;

use common::*;
use fused_moe_core::{Activation, QuantScheme, Registry, Selection};
use moe_conformance::{Case, Outcome, Settings, layer, reference};
use rstest::rstest;

fn run(experts: &str, cases: impl IntoIterator<Item = Case>) {
    let registry =
        Registry::new().with_comm(reference::ReferenceComm).with_experts(monolithic()).with_experts(routed());
    for case in cases {
        let selection = Selection { comm: None, experts: Some(experts) };
        let outcome = layer::run(&registry, &case, selection, Settings::default());
        assert_eq!(outcome, Outcome::Pass, "{case}");
    }
}

#[rstest]
fn layers_agree_with_the_oracle(
    #[values("trtllm", "trtllm_routed")] experts: &str,
    #[values(0, 1, 2, 3)] scheme: usize,
    #[values(1, 4)] ep_size: usize,
) {
    run(experts, cases(SCHEMES[scheme], ep_size));
}

/// What only block-scaled FP4 kernels take, and padding, which is zeros to every kernel.
#[rstest]
fn fp4_takes_activations_and_biases(#[values("trtllm", "trtllm_routed")] experts: &str) {
    let with = |activation, expert_bias| Case { activation, expert_bias, ..case(QuantScheme::Nvfp4, 2) };
    run(
        experts,
        [
            with(Activation::SWIGLU_OAI, true),
            with(Activation::SiluClamped { limit: 1.5 }, false),
            with(Activation::Silu, true).padded(),
        ],
    );
    run(experts, SCHEMES.map(|quant| case(quant, 2).padded()));
}

/// `auto` takes what is registered first, and monolithic experts only where the router is known.
#[test]
fn a_layer_that_routes_outside_gets_the_routed_form() {
    let registry =
        Registry::new().with_comm(reference::ReferenceComm).with_experts(monolithic()).with_experts(routed());
    let mut config = case(QuantScheme::Unquantized, 1).config();
    let survey = registry.survey(&config, Selection::default()).unwrap();
    let names: Vec<_> = survey.fitting.iter().map(|plan| plan.experts()).collect();
    assert_eq!(names, ["trtllm", "trtllm_routed"]);
    config.routing = None;
    let survey = registry.survey(&config, Selection::default()).unwrap();
    let names: Vec<_> = survey.fitting.iter().map(|plan| plan.experts()).collect();
    assert_eq!(names, ["trtllm_routed"]);
}
