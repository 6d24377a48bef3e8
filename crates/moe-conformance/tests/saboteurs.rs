//! Every saboteur is failed by the suite, for the right reason, in cases that the unbroken backend passes.

use std::time::{Duration, Instant};

use moe_conformance::reference::{ReferenceComm, ReferenceExperts};
use moe_conformance::saboteurs::{BrokenComm, BrokenExperts};
use moe_conformance::{Outcome, Settings, Suite};

/// Asserts that `broken` fails `case` with a message that contains `because`, and that `control` passes it.
fn fails(broken: &Suite, control: &Suite, case: &str, because: &str) {
    match broken.outcome(case) {
        Outcome::Fail(why) => assert!(why.contains(because), "{case} fails for another reason: {why}"),
        other => panic!("{case} of the saboteur: {other}"),
    }
    let outcome = control.outcome(case);
    assert!(outcome.is_pass(), "{case} of the control: {outcome}");
}

fn comm_fails(bug: BrokenComm, cases: &[(&str, &str)]) {
    let (broken, control) = (Suite::comm(bug), Suite::comm(ReferenceComm));
    for (case, because) in cases {
        fails(&broken, &control, case, because);
    }
}

fn experts_fail(bug: BrokenExperts, cases: &[(&str, &str)]) {
    let (broken, control) = (Suite::experts(bug), Suite::experts(ReferenceExperts));
    for (case, because) in cases {
        fails(&broken, &control, case, because);
    }
}

#[test]
fn local_only_dispatch_vllm_37529() {
    comm_fails(
        BrokenComm::LocalOnly,
        &[
            ("rows_none_ep2", "did not arrive"),
            ("rows_block_ep8", "did not arrive"),
            ("layer_none_ep2", "relative L2 error"),
        ],
    );
}

#[test]
fn dropped_scale() {
    let cases = [("rows_block_ep1", "scale bytes are"), ("rows_tensor_ep2", "scale bytes are")];
    comm_fails(BrokenComm::DroppedScale, &cases);
    comm_fails(BrokenComm::DroppedScale, &[("layer_ptpc_ep3", "relative L2 error")]);
}

#[test]
fn double_reduction() {
    let cases = [("rows_none_ep1", "combine gives"), ("layer_none_ep8", "relative L2 error")];
    comm_fails(BrokenComm::DoubleReduction, &cases);
}

#[test]
fn stale_buffer_on_the_second_call() {
    let cases = [
        ("rows_none_ep1", "round 1: row"),
        ("rows_block_ep2", "round 1: row"),
        ("layer_none_ep1", "round 1: relative L2"),
    ];
    comm_fails(BrokenComm::StaleBuffer, &cases);
}

#[test]
fn combine_by_received_layout_ids_mori_475() {
    let cases = [("rows_none_ep2", "combine gives"), ("rows_ptpc_ep8", "combine gives")];
    comm_fails(BrokenComm::ReceivedLayoutIds, &cases);
}

#[test]
fn sums_of_nodes_that_are_not_rounded() {
    let cases = [("rows_none_ep4n2", "combine gives"), ("layer_none_ep8n4", "relative L2 error")];
    comm_fails(BrokenComm::UnroundedNodes, &cases);
}

/// No reference quantises its combine, so the control of this is every backend that does.
#[test]
fn a_combine_that_does_not_quantise() {
    let broken = Suite::comm(BrokenComm::UnquantizedCombine);
    for (case, because) in [("fp8back_none_ep2", "combine gives"), ("layerfp8back_none_ep2", "relative L2")] {
        let Outcome::Fail(why) = broken.outcome(case) else { panic!("{case} does not fail") };
        assert!(why.contains(because), "{case} fails for another reason: {why}");
    }
}

#[test]
fn swapped_gate_and_up() {
    let cases = [("oracle_none_ep1", "relative L2 error"), ("oracle_block_ep2", "relative L2 error")];
    experts_fail(BrokenExperts::SwappedGateUp, &cases);
}

#[test]
fn mask_read_as_map_vllm_49758() {
    let cases = [("foreignids_none_ep3", "relative L2 error"), ("oracle_ptpc_ep2", "relative L2 error")];
    experts_fail(BrokenExperts::MaskAsMap, &cases);
}

#[test]
fn dequantised_at_load_passed_off_as_fp8() {
    let cases = [
        ("weightbytes_block_ep2", "times the"),
        ("weightbytes_ptpc_ep1", "times the"),
        ("oracle_tensor_ep1", "relative L2 error"),
    ];
    experts_fail(BrokenExperts::DequantizedAtLoad, &cases);
}

#[test]
fn ptpc_rows_into_per_tensor_experts() {
    let cases = [("oracle_tensor_ep1", "relative L2 error"), ("oracle_tensor_ep3", "relative L2 error")];
    experts_fail(BrokenExperts::TokenScalesAsTensor, &cases);
}

/// The peers of the silent rank must come back by their deadline, not hang.
#[test]
fn a_rank_that_drops_its_sends() {
    let timeout = Duration::from_millis(500);
    let broken =
        Suite::comm(BrokenComm::DroppedSends).with_settings(Settings::default().with_timeout(timeout));
    let control = Suite::comm(ReferenceComm);
    let start = Instant::now();
    fails(&broken, &control, "rows_none_ep2", "did not answer by the deadline");
    fails(&broken, &control, "rows_block_ep8", "did not answer by the deadline");
    fails(&broken, &control, "layer_none_ep3", "did not answer by the deadline");
    assert!(start.elapsed() < Duration::from_secs(60), "the suite waits for a silent rank");
}
