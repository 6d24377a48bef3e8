//! Wrong roundings are seen although the whole is hardly off.

use moe_conformance::reference::{ReferenceComm, ReferenceExperts, Slip};
use moe_conformance::saboteurs::{BrokenComm, SlightlyBrokenExperts};
use moe_conformance::{Outcome, Suite};

/// Relative L2 error of the whole that would have to be allowed to layers without codes, if the whole were judged.
const WHOLE: f64 = 1e-2;

/// Asserts that `suite` fails `case` by the bound of an element; without codes, although the whole is near.
fn fails_by_an_element(suite: &Suite, case: &str) {
    let why = match suite.outcome(case) {
        Outcome::Fail(why) => why,
        other => panic!("{case}: {other}"),
    };
    let whole = why.split("relative L2 error ").nth(1).and_then(|rest| rest.split(' ').next());
    let whole: f64 = whole.and_then(|number| number.parse().ok()).unwrap_or(f64::INFINITY);
    println!("{case}: {why}");
    let near = whole < WHOLE || !case.contains("none");
    assert!(near && why.contains("times its bound"), "{case} fails as a whole: {why}");
}

fn experts_fail(slip: Slip, cases: &[&str]) {
    let (broken, control) = (Suite::experts(SlightlyBrokenExperts(slip)), Suite::experts(ReferenceExperts));
    for case in cases {
        fails_by_an_element(&broken, case);
        let outcome = control.outcome(case);
        assert!(outcome.is_pass(), "{case} of the control: {outcome}");
    }
}

#[test]
fn an_activation_that_is_not_rounded() {
    experts_fail(Slip::UnroundedActivation, &["oracle_none_ep1", "oracle_block_ep2", "oracle_ptpc_ep1"]);
}

#[test]
fn scales_of_the_activation_before_it_was_rounded() {
    experts_fail(Slip::UnroundedScale, &["oracle_block_ep1", "oracle_ptpc_ep2", "layer_block_ep2"]);
}

#[test]
fn an_activation_that_is_cut_off() {
    experts_fail(Slip::TruncatedActivation, &["oracle_none_ep2", "oracle_block_ep1", "oracle_tensor_ep1"]);
}

#[test]
fn gate_and_up_in_bf16() {
    experts_fail(Slip::RoundedGateUp, &["oracle_none_ep1", "oracle_block_ep1", "layer_ptpc_ep8"]);
}

#[test]
fn a_coarse_exponential() {
    experts_fail(Slip::CoarseExponential, &["oracle_none_ep1", "oracle_block_ep1", "oracle_tensor_ep2"]);
}

#[test]
fn expert_outputs_rounded_before_their_sum() {
    experts_fail(Slip::RoundedOutputs, &["oracle_none_ep1", "oracle_block_ep2", "layer_ptpc_ep1"]);
}

#[test]
fn one_routing_weight_in_bf16() {
    experts_fail(Slip::NarrowRoutingWeight, &["oracle_none_ep1", "oracle_block_ep1", "layer_tensor_ep2"]);
}

#[test]
fn weight_scales_in_bf16() {
    experts_fail(Slip::NarrowWeightScales, &["oracle_block_ep1", "oracle_ptpc_ep2", "oracle_tensor_ep1"]);
}

#[test]
fn ranks_summed_in_bf16() {
    let suite = Suite::comm(BrokenComm::NarrowSum);
    fails_by_an_element(&suite, "layer_none_ep8");
    fails_by_an_element(&suite, "layer_block_ep3");
    assert!(Suite::comm(ReferenceComm).outcome("layer_none_ep8").is_pass());
}
