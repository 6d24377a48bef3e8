//! Checks of prepare/finalize backends, without experts: rows are compared byte for byte, sums exactly.
//!
//! The place of the experts is taken by a function of (row, expert) whose values are integers times a power of
//! two, so that their sums are exact in f32 in any order, and in bf16 they are not.

mod arrivals;
mod faults;
mod handle;
mod rounds;
mod toy;

use std::sync::Arc;

use ep_transport::Endpoint;
use fused_moe_core::{
    Axis, CombineKind, KernelKind, MoeConfig, Plan, PrepareCaps, PrepareFinalizeProvider, ProcessGroup,
    Registry, Selection, Support, Unsupported, WireFormat, negotiate,
};

use crate::case::Case;
use crate::named::Named;
use crate::outcome::{Check, Outcome, Settings, chain, fail, has_ranks, supervised};
use crate::reference;
use crate::shared::{Probe, SharedComm};
use crate::wire::Encoding;
use handle::Handle;

pub(crate) const CASES: &[&str] = crate::__comm_cases! { __names };

/// Cases of a covering that a whole-layer test runs, after a plain one: they cost the experts' time.
const LAYERS: usize = 3;

pub(crate) fn run(
    provider: &Arc<dyn PrepareFinalizeProvider>,
    case: &'static str,
    settings: Settings,
) -> Outcome {
    let Some(Named { check, quant, topology }) = Named::parse(case) else {
        return Outcome::Fail(format!("{case:?} is no name of a case"));
    };
    let provider = Arc::clone(provider);
    supervised(settings, move || {
        let small = Case::small(quant, topology.ranks, settings.seed).on_nodes(topology.nodes);
        let quantized = quant.quantized_wire(small.config().in_dtype);
        let target = |kind, wire| Target { provider: &provider, kind, wire, settings };
        let modular = target(KernelKind::Modular, quantized);
        let cases = || Case::covering_part(quant, topology, settings.seed);
        // A covering may come without a layer that adds up several ranks' rows for a token, in which a wrong sum shows.
        let plain = Case::plain(quant, topology.ranks, settings.seed.derive(7)).on_nodes(topology.nodes);
        let few = || [plain].into_iter().chain(cases().into_iter().take(LAYERS)).collect::<Vec<_>>();
        match check {
            "rows" => over(&cases(), |case| rounds::rows(&modular, case)),
            "deferred" => {
                let in_bf16 = WireFormat::unquantized(small.config().in_dtype);
                over(&cases(), |case| rounds::rows(&target(KernelKind::Modular, in_bf16), case))
            }
            "monolithic" => {
                over(&cases(), |case| rounds::rows(&target(KernelKind::Monolithic, quantized), case))
            }
            "faultdispatch" => over(&[small], |case| faults::dispatch(&modular, case)),
            "faultexperts" => over(&[small], |case| faults::experts(&modular, case)),
            "faultdropped" => over(&[small], |case| faults::dropped(&modular, case)),
            "faulttwo" => over(&[small], |case| faults::two_ranks(&modular, case)),
            "foreignticket" => over(&[small], |case| faults::foreign_ticket(&modular, case)),
            "twohandles" => over(&[small], |case| rounds::two_handles(&modular, case)),
            "lostpeer" => over(&[small], |case| faults::lost_peer(&modular, case)),
            "fp8back" => over(&returning_fp8(cases()), |case| rounds::rows(&modular, case)),
            "layerfp8back" => over(&returning_fp8(few()), |case| layer(&modular, case)),
            "bytesfp8back" => over(&[small.returning_fp8()], |case| rounds::bytes(&modular, case)),
            "bytes" => over(&[small], |case| rounds::bytes(&modular, case)),
            "traffic" => over(&[small], |case| rounds::traffic(&modular, case)),
            "layer" => over(&few(), |case| layer(&modular, case)),
            _ => fail(format!("unknown check {check:?}")),
        }
    })
}

fn returning_fp8(cases: Vec<Case>) -> Vec<Case> {
    cases.into_iter().map(Case::returning_fp8).collect()
}

/// Runs `check` on all cases: the first failure; refused if all are.
pub(crate) fn over(cases: &[Case], check: impl Fn(&Case) -> Check) -> Check {
    let mut refused = None;
    let mut passed = 0;
    for case in cases {
        match check(case) {
            Ok(()) => passed += 1,
            Err(Outcome::Refused(reasons)) => refused = Some(reasons),
            Err(other) => return Err(other.within(case)),
        }
    }
    match refused {
        Some(reasons) if passed == 0 => Err(Outcome::Refused(reasons)),
        _ => Ok(()),
    }
}

/// What is under test, and how it is asked.
pub(crate) struct Target<'a> {
    provider: &'a Arc<dyn PrepareFinalizeProvider>,
    kind: KernelKind,
    wire: WireFormat,
    settings: Settings,
}

/// A case that the backend takes.
struct Accepted {
    config: MoeConfig,
    caps: PrepareCaps,
    plan: Plan,
}

impl Accepted {
    fn encoding(&self, case: &Case) -> Encoding {
        Encoding {
            wire: self.plan.wire(),
            format: case.quant.fp8(),
            static_scale: case.static_scale(),
            router_weight: self.plan.router_weight(),
            kind: self.plan.kind(),
        }
    }

    /// The rounds of a case. Where combine weights the rows, the weights are multiples of 1/64: exact sums.
    fn inputs(&self, case: &Case, round: u64) -> Vec<crate::case::RankInput> {
        let mut inputs = case.inputs(round);
        if self.caps.combine == CombineKind::WeightAndReduce {
            let weights = inputs.iter_mut().flat_map(|input| &mut input.weights);
            weights.for_each(|w| *w = (*w * 64.0).ceil() / 64.0);
        }
        inputs
    }
}

impl Target<'_> {
    /// The plan for `case`, or the backend's reasons against it; whoever has reasons must not be buildable.
    fn accepts(&self, case: &Case) -> Check<Accepted> {
        has_ranks(case, self.settings)?;
        let config = case.config();
        let probe = Probe { kind: self.kind, wire: self.wire };
        let reasons = match self.provider.supports(&config, self.kind) {
            Support::Unsupported(reasons) if reasons.is_empty() => return fail("refused without a reason"),
            Support::Unsupported(reasons) => reasons,
            Support::Supported(caps) if caps.kind != self.kind => {
                vec![Unsupported::new(Axis::KernelKind, self.kind.name(), caps.kind.name())]
            }
            Support::Supported(caps) => match negotiate(&config, &caps, &probe.caps(Some(&caps))) {
                Ok(plan) => return Ok(Accepted { config, caps, plan }),
                Err(reasons) => reasons,
            },
        };
        let registry = Registry::new().with_comm(SharedComm(Arc::clone(self.provider))).with_experts(probe);
        crate::layer::refused_by_build(&registry, case, Selection::default(), self.settings)?;
        Err(Outcome::Refused(reasons))
    }

    fn build(&self, accepted: &Accepted, group: &Endpoint) -> Check<Handle> {
        let built = self.provider.build(&accepted.config, &accepted.plan, group);
        let built = built.or_else(|e| fail(format!("building fails: {}", chain(&e))))?;
        Handle::new(built, accepted, group.rank())
    }
}

/// The backend with reference experts against the oracle.
fn layer(target: &Target<'_>, case: &Case) -> Check {
    let registry = Registry::new()
        .with_comm(SharedComm(Arc::clone(target.provider)))
        .with_experts(reference::ReferenceExperts)
        .with_experts(reference::BatchedExperts)
        .with_experts(reference::MonolithicExperts);
    crate::layer::check(&registry, case, Selection::default(), target.settings)
}
