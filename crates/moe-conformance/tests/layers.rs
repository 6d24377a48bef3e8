//! Whole layers of the reference backends against the oracle.

use fused_moe_core::{Registry, Selection};
use moe_conformance::{Case, EP_SIZES, Outcome, SCHEMES, Settings, Topology, layer, reference};

fn registry() -> Registry {
    Registry::new()
        .with_comm(reference::ReferenceComm)
        .with_comm(reference::BatchedComm)
        .with_experts(reference::ReferenceExperts)
        .with_experts(reference::BatchedExperts)
        .with_experts(reference::MonolithicExperts)
}

/// Runs the covering cases of the four OCP schemes over all sizes of the group; returns passes and refusals.
fn run(selection: Selection<'_>) -> (usize, usize) {
    let settings = Settings::default();
    let (mut passed, mut refused) = (0, 0);
    for (scheme, (_, quant)) in SCHEMES.into_iter().take(4).enumerate() {
        for ep_size in EP_SIZES {
            let topology = Topology::one_node(ep_size);
            for case in Case::covering_part(quant, topology, settings.seed.derive(scheme as u64)) {
                match layer::run(&registry(), &case, selection, settings) {
                    Outcome::Pass => passed += 1,
                    Outcome::Refused(_) => refused += 1,
                    Outcome::Fail(why) => panic!("{why}"),
                }
            }
        }
    }
    (passed, refused)
}

#[test]
fn modular_layers_agree_with_the_oracle() {
    let pair = Selection { comm: Some("reference_comm"), experts: Some("reference_experts") };
    let (passed, refused) = run(pair);
    assert!(passed >= 150 && refused == 0, "{passed} passed, {refused} refused");
}

#[test]
fn batched_layers_agree_with_the_oracle() {
    let pair = Selection { comm: Some("reference_batched_comm"), experts: Some("reference_batched_experts") };
    let (passed, refused) = run(pair);
    assert!(passed >= 25 && refused >= 100, "{passed} passed, {refused} refused");
}

#[test]
fn monolithic_layers_agree_with_the_oracle() {
    let pair = Selection { comm: Some("reference_comm"), experts: Some("reference_monolithic") };
    let (passed, refused) = run(pair);
    assert!(passed >= 120, "{passed} passed, {refused} refused");
}
