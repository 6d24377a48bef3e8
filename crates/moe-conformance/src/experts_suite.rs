//! Checks of modular experts on hand-made batches against the oracle, without a comm.

mod batches;
mod packing;

use std::sync::Arc;

use fused_moe_core::{
    Activation, Axis, Experts, ExpertsCaps, ExpertsModular, ExpertsProvider, KernelKind, Plan, Rank,
    Registry, Selection, Support, Unsupported,
};

use crate::case::{Case, RoutingPattern};
use crate::comm_suite::over;
use crate::named::Named;
use crate::outcome::{Check, Outcome, Settings, chain, fail, supervised};
use crate::reference;
use crate::shared::SharedExperts;
pub(crate) use batches::Poison;
pub(crate) use packing::{local_experts, packing, weight_bytes};

pub(crate) const CASES: &[&str] = crate::__experts_cases! { __names };

/// Cases of a covering that one test runs.
const CASES_PER_TEST: usize = 6;

pub(crate) fn run(provider: &Arc<dyn ExpertsProvider>, case: &'static str, settings: Settings) -> Outcome {
    let Some(Named { check, quant, topology }) = Named::parse(case) else {
        return Outcome::Fail(format!("{case:?} is no name of a case"));
    };
    let provider = Arc::clone(provider);
    supervised(settings, move || {
        let kind = settings.device_kind();
        let small = Case::small(quant, topology.ranks, settings.seed).on(kind);
        let target = Target { provider: &provider, kind: KernelKind::Modular, settings };
        let mut cases = Case::covering_part(quant, topology, settings.seed);
        if !matches!(check, "stage1weight") {
            cases.truncate(CASES_PER_TEST);
        }
        let plain = Case::plain(quant, topology.ranks, settings.seed.derive(7)).on(kind);
        cases.insert(0, plain.clone());
        let cases: Vec<Case> = cases.into_iter().map(|case| case.on(kind)).collect();
        match check {
            "oracle" => over(&cases, |case| batches::oracle(&target, case)),
            "gelu" | "gelutanh" | "swigluoai" | "clamped" | "bias" | "padding" | "gptoss"
            | "stage1weight" => {
                let special = cases.iter().filter_map(|case| specialised(check, case.clone()));
                over(&special.take(SPECIAL_PER_TEST).collect::<Vec<_>>(), |case| {
                    batches::oracle(&target, case)
                })
            }
            "foreignids" => {
                let with = |routing, top_k| Case { routing, top_k, ..small.clone() };
                let cases = [
                    with(RoutingPattern::RemoteOnly, 2),
                    with(RoutingPattern::SameExperts, 1),
                    with(RoutingPattern::LocalOnly, 2),
                    with(RoutingPattern::Padded, 4),
                    Case { tokens: vec![0; topology.ranks], ..small.clone() },
                    Case { tokens: vec![1; topology.ranks], ..small.clone() },
                ];
                over(&cases, |case| batches::oracle(&target, case))
            }
            "weightbytes" => over(&[plain], |case| weight_bytes(&target, case)),
            "packing" => over(&[plain], |case| {
                packing(&target, case)?;
                batches::foreign_weights(&target, case)
            }),
            "layer" => over(&cases, |case| layer(&target, case)),
            _ => fail(format!("unknown check {check:?}")),
        }
    })
}

/// Cases that a test of one property runs.
pub(crate) const SPECIAL_PER_TEST: usize = 4;

/// The case with the property that `check` is about; `None` if it cannot have it.
pub(crate) fn specialised(check: &str, mut case: Case) -> Option<Case> {
    if check == "padding" {
        return Some(case.padded());
    }
    match check {
        "gelu" => case.activation = Activation::Gelu,
        "gelutanh" => case.activation = Activation::GeluTanh,
        "swigluoai" => case.activation = Activation::SWIGLU_OAI,
        "clamped" => case.activation = Activation::SiluClamped { limit: 3.0 },
        "bias" => case.expert_bias = true,
        "gptoss" => (case.activation, case.expert_bias) = (Activation::SWIGLU_OAI, true),
        _ if case.top_k == 1 => (case.apply_router_weight_on_input, case.expert_bias) = (true, true),
        _ => return None,
    }
    Some(case)
}

/// What is under test.
pub(crate) struct Target<'a> {
    pub(crate) provider: &'a Arc<dyn ExpertsProvider>,
    pub(crate) kind: KernelKind,
    pub(crate) settings: Settings,
}

impl Target<'_> {
    /// The backend's capabilities for `case`, or its reasons against it; whoever has reasons must not be
    /// buildable.
    pub(crate) fn accepts(&self, case: &Case) -> Check<ExpertsCaps> {
        let reasons = match self.provider.supports(&case.config()) {
            Support::Supported(caps) if caps.kind == self.kind && caps.accepts.is_empty() => {
                return fail("supported without a wire format");
            }
            Support::Supported(caps) if caps.kind == self.kind => return Ok(caps),
            Support::Supported(caps) => {
                let reasons = vec![Unsupported::new(Axis::KernelKind, self.kind.name(), caps.kind.name())];
                return Err(Outcome::Refused(reasons));
            }
            Support::Unsupported(reasons) if reasons.is_empty() => return fail("refused without a reason"),
            Support::Unsupported(reasons) => reasons,
        };
        crate::layer::refused_by_build(&registry(self.provider), case, Selection::default(), self.settings)?;
        Err(Outcome::Refused(reasons))
    }

    /// The kernel of `rank`, which must say what its provider said.
    pub(crate) fn build(&self, case: &Case, plan: &Plan, rank: Rank) -> Check<Experts> {
        let built = self.provider.build(&case.config(), plan, rank);
        let built = built.or_else(|e| fail(format!("building fails: {}", chain(&e))))?;
        let (announced, needed) =
            (self.provider.workspace_bytes(&case.config(), plan), built.workspace_bytes());
        match announced == needed {
            true => Ok(built),
            false => fail(format!("needs {needed} bytes of workspace, announced {announced}")),
        }
    }

    pub(crate) fn build_modular(
        &self,
        case: &Case,
        plan: &Plan,
        rank: Rank,
    ) -> Check<Box<dyn ExpertsModular>> {
        match self.build(case, plan, rank)? {
            Experts::Modular(experts) => Ok(experts),
            other => fail(format!("the provider offers modular experts and builds {other:?}")),
        }
    }
}

fn registry(provider: &Arc<dyn ExpertsProvider>) -> Registry {
    Registry::new()
        .with_comm(reference::ReferenceComm)
        .with_comm(reference::BatchedComm)
        .with_experts(SharedExperts(Arc::clone(provider)))
}

/// The backend behind reference comms against the oracle.
pub(crate) fn layer(target: &Target<'_>, case: &Case) -> Check {
    crate::layer::check(&registry(target.provider), case, Selection::default(), target.settings)
}
