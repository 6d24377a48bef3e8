//! Whole layers behind reference comms against the oracle, in sizes that fill FlashInfer's layouts: those of the
//! conformance suite mostly do not.

mod common;

use common::*;
use fused_moe_core::{QuantScheme, Registry, Selection};
use moe_conformance::{Outcome, Settings, layer, reference};
use rstest::rstest;

fn run(experts: &str, quant: QuantScheme, ep_size: usize) {
    let registry =
        Registry::new().with_comm(reference::ReferenceComm).with_experts(monolithic()).with_experts(routed());
    for case in cases(quant, ep_size) {
        let selection = Selection { comm: None, experts: Some(experts) };
        let outcome = layer::run(&registry, &case, selection, Settings::default());
        assert_eq!(outcome, Outcome::Pass, "{case}");
    }
}

#[rstest]
fn layers_agree_with_the_oracle(
    #[values("trtllm", "trtllm_routed")] experts: &str,
    #[values(0, 1)] scheme: usize,
    #[values(1, 4)] ep_size: usize,
) {
    run(experts, SCHEMES[scheme], ep_size);
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
