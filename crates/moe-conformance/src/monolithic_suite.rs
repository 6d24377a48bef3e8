//! Checks of monolithic experts on hand-made batches against the oracle, which routes by the host router.

use std::sync::Arc;

use fused_moe_core::{
    ActivationFormat, CombineWire, DType, ExecCx, ExpertWeights, Experts, ExpertsMonolithic, ExpertsProvider,
    KernelKind, PartialSums, Rank, Stream, TensorViewMut,
};

use crate::batch::{Batch, Receiver, plan_for, writable};
use crate::bound::{Combine, Returned, Rounding};
use crate::case::{Case, RankInput};
use crate::comm_suite::over;
use crate::experts_suite::{
    Poison, SPECIAL_PER_TEST, Target, layer, local_experts, packing, specialised, weight_bytes,
};
use crate::layer::{bits, routed};
use crate::named::Named;
use crate::oracle::{ArrivedRows, Codes, RankExperts};
use crate::outcome::{Check, Outcome, Settings, chain, fail, supervised};

pub(crate) const CASES: &[&str] = crate::__monolithic_cases! { __names };

/// Cases of a covering that one test runs.
const CASES_PER_TEST: usize = 6;

pub(crate) fn run(provider: &Arc<dyn ExpertsProvider>, case: &'static str, settings: Settings) -> Outcome {
    let Some(Named { check, quant, topology }) = Named::parse(case) else {
        return Outcome::Fail(format!("{case:?} is no name of a case"));
    };
    let provider = Arc::clone(provider);
    supervised(settings, move || {
        let target = Target { provider: &provider, kind: KernelKind::Monolithic, settings };
        let mut cases = Case::covering_part(quant, topology, settings.seed);
        // The routing weight can only be applied on the input where it is known before the experts.
        cases.iter_mut().for_each(|case| case.apply_router_weight_on_input = false);
        cases.truncate(CASES_PER_TEST);
        let plain = Case::plain(quant, topology.ranks, settings.seed.derive(7));
        cases.insert(0, plain.clone());
        match check {
            "oracle" => over(&cases, |case| oracle(&target, case)),
            "swigluoai" | "clamped" | "bias" | "padding" | "gptoss" => {
                let special: Vec<_> = cases.into_iter().filter_map(|case| specialised(check, case)).collect();
                over(&special[..SPECIAL_PER_TEST], |case| oracle(&target, case))
            }
            "weightbytes" => over(&[plain], |case| weight_bytes(&target, case)),
            "packing" => over(&[plain], |case| packing(&target, case)),
            "layer" => over(&cases, |case| layer(&target, case)),
            _ => fail(format!("unknown check {check:?}")),
        }
    })
}

/// Every wire format that the backend reads, on the first and the last rank.
fn oracle(target: &Target<'_>, case: &Case) -> Check {
    let caps = target.accepts(case)?;
    let inputs: Vec<RankInput> = case.inputs(0).iter().map(|i| routed(case, i)).collect::<Check<_>>()?;
    let mut ranks = vec![0, case.ep_size() - 1];
    ranks.dedup();
    for &wire in &caps.accepts {
        if !writable(wire, case.quant) {
            return fail(format!("accepts {wire}, which no row of {} can be", case.quant));
        }
        for &rank in &ranks {
            let rank = Rank(rank as u32);
            let rows = Batch::new(Receiver { case, rank, wire, format: ActivationFormat::Standard }, &inputs);
            let plan = plan_for(case, &caps, wire, rows.max_rows).map_err(Outcome::Refused)?;
            let Experts::Monolithic(kernel) = target.build(case, &plan, rank)? else {
                return fail("the provider offers monolithic experts and builds modular ones");
            };
            one_batch(target, case, (&*kernel, rank), &rows)
                .map_err(|e| e.within(format!("{rank}, {wire}")))?;
        }
    }
    Ok(())
}

fn one_batch(
    target: &Target<'_>,
    case: &Case,
    (kernel, rank): (&dyn ExpertsMonolithic, Rank),
    rows: &Batch,
) -> Check {
    let weights = case.weights();
    let all = weights.matrices();
    let packed = target.provider.pack(&case.config(), rank, &local_experts(case, &all, rank));
    let packed = packed.or_else(|e| fail(format!("packing fails: {}", chain(&e))))?;
    let count = rows.num_rows();
    let apply = |weights: &ExpertWeights, poison: Poison| {
        let mut out = poison.output(rows.max_rows * case.hidden);
        let mut workspace = poison.workspace(kernel.workspace_bytes())?;
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &[rows.max_rows, case.hidden]);
        let applied = kernel.apply(&mut cx, weights, &rows.dispatched_monolithic(), view.or_else(fail)?);
        applied.or_else(|e| fail(format!("apply fails: {}", chain(&e))))?;
        Ok(out[..count * case.hidden].iter().map(|x| x.to_f32()).collect::<Vec<f32>>())
    };
    let got = apply(&packed, Poison::Ones)?;
    let again = apply(&packed, Poison::Plausible)?;
    let experts = RankExperts {
        shape: case.shape(),
        codes: Codes::of_gemm2(case.quant, &all),
        activation: case.activation,
        padding: case.padding,
        router_weight: fused_moe_core::RouterWeight::OnOutput,
        accumulation: fused_moe_core::Accumulation::F32,
        experts: &all,
        placement: &case.placement,
        rank,
    };
    let slots = count * case.top_k;
    let rounding = Rounding {
        returned: Returned::PartialSums,
        combine_wire: CombineWire::InDtype,
        partial_sums: PartialSums::None,
        output: DType::F32,
        accumulation: fused_moe_core::Accumulation::F32,
        routes: true,
    };
    let mut verdict = fail("no candidate");
    for values in rows.values(case, rank, Codes::of_gemm1(case.quant, &all)) {
        let arrived =
            ArrivedRows { values: &values, ids: &rows.ids[..slots], weights: &rows.weights[..slots] };
        let mut combine = Combine::new(rounding, count, case.hidden);
        combine.add_rank(&experts.outputs(arrived).or_else(fail)?);
        verdict = match combine.finish().check(&got, case.hidden) {
            Ok(_) => Ok(()),
            Err(far) => fail(far),
        };
        if verdict.is_ok() {
            break;
        }
    }
    verdict?;
    match bits(&got) == bits(&again) {
        true => Ok(()),
        false => fail("the same batch gave other bits the second time, in other workspace and output"),
    }
}
