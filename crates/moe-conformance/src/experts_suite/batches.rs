//! One batch on one rank: values, garbage, repetition.

use fused_moe_core::{
    ActivationFormat, Arena, DType, DeviceKind, Dispatched, ErrorKind, ExecCx, ExpertWeights, ExpertsCaps,
    ExpertsModular, Plan, Rank, Result, RouterWeight, Stream, TensorViewMut, WireFormat, Workspace,
};
use half::bf16;

use super::{Target, local_experts};
use crate::batch::{Batch, Receiver, plan_for, writable};
use crate::bound::{Combine, Rounding};
use crate::case::{Case, LayerWeights, RankInput};
use crate::device::{Placed, TestDevice};
use crate::oracle::{ArrivedRows, Codes, RankExperts};
use crate::outcome::{Check, Outcome, chain, fail};

/// What memory holds before a call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Poison {
    /// All bits set: NaN in every float, −1 in every integer.
    Ones,
    /// Bytes 0x42: plausible numbers.
    Plausible,
}

impl Poison {
    pub(crate) fn byte(self) -> u8 {
        match self {
            Poison::Ones => 0xff,
            Poison::Plausible => 0x42,
        }
    }

    /// A workspace of `bytes`, poisoned.
    pub(crate) fn workspace(self, bytes: usize) -> Check<Workspace> {
        let mut workspace = Workspace::new(DeviceKind::Host, bytes).or_else(fail)?;
        let mut arena: Arena<'_> = workspace.arena();
        let whole = arena.remaining();
        arena.take::<u8>(whole).or_else(fail)?.fill(self.byte());
        Ok(workspace)
    }

    /// `len` elements of output, poisoned.
    pub(crate) fn output(self, len: usize) -> Vec<bf16> {
        vec![bf16::from_bits(u16::from_ne_bytes([self.byte(); 2])); len]
    }
}

/// Every wire format that the backend reads, on the ranks that matter: first, last, and one without experts if
/// there is one.
pub(super) fn oracle(target: &Target<'_>, case: &Case) -> Check {
    let caps = target.accepts(case)?;
    let inputs = case.inputs(0);
    let weights = case.weights();
    let ep_size = case.ep_size();
    let empty = (0..ep_size).find(|&r| case.placement.num_local_experts(Rank(r as u32)) == 0);
    let mut ranks = vec![0, ep_size - 1, empty.unwrap_or(ep_size / 2)];
    ranks.sort_unstable();
    ranks.dedup();
    let mut refused = None;
    for &wire in &caps.accepts {
        if !writable(wire, case.quant) {
            return fail(format!("accepts {wire}, which no row of {} can be", case.quant));
        }
        for &rank in &ranks {
            let batch = OneBatch {
                target,
                case,
                caps: &caps,
                wire,
                rank: Rank(rank as u32),
                inputs: &inputs,
                weights: &weights,
            };
            match batch.check() {
                Err(Outcome::Refused(reasons)) => refused = Some(reasons),
                other => other.map_err(|e| e.within(format!("rank {rank}, {wire}")))?,
            }
        }
    }
    refused.map_or(Ok(()), |reasons| Err(Outcome::Refused(reasons)))
}

/// Weights of another backend, and a batch that is right behind them: a broken contract, and no harm.
pub(super) fn foreign_weights(target: &Target<'_>, case: &Case) -> Check {
    let caps = target.accepts(case)?;
    let (inputs, weights) = (case.inputs(0), case.weights());
    let batch = OneBatch {
        target,
        case,
        caps: &caps,
        wire: caps.accepts[0],
        rank: Rank(0),
        inputs: &inputs,
        weights: &weights,
    };
    let (rows, plan) = batch.rows()?;
    let kernel = target.build_modular(case, &plan, Rank(0))?;
    let foreign = ExpertWeights::new("another_backend", 0u8, 1);
    match batch.apply((&*kernel, &plan), &foreign, &rows, Poison::Ones)? {
        Err(error) if error.kind == ErrorKind::Contract => batch.check(),
        other => fail(format!("weights of another backend give {:?}", other.map(|_| "an output"))),
    }
}

struct OneBatch<'a> {
    target: &'a Target<'a>,
    case: &'a Case,
    caps: &'a ExpertsCaps,
    wire: WireFormat,
    rank: Rank,
    inputs: &'a [RankInput],
    weights: &'a LayerWeights,
}

impl OneBatch<'_> {
    fn rows(&self) -> Check<(Batch, Plan)> {
        let Self { case, rank, wire, .. } = *self;
        let rows = Batch::new(Receiver { case, rank, wire, format: self.caps.format }, self.inputs);
        match plan_for(case, self.caps, wire, rows.max_rows) {
            Ok(plan) => Ok((rows, plan)),
            Err(reasons) => Err(Outcome::Refused(reasons)),
        }
    }

    fn check(&self) -> Check {
        let (rows, plan) = self.rows()?;
        let case = self.case;
        let kernel = self.target.build_modular(case, &plan, self.rank)?;
        let all = self.weights.matrices();
        let packed =
            self.target.provider.pack(&case.config(), self.rank, &local_experts(case, &all, self.rank));
        let packed = packed.or_else(|e| fail(format!("packing fails: {}", chain(&e))))?;
        let first = self.apply((&*kernel, &plan), &packed, &rows, Poison::Ones)?;
        let first = first.or_else(|e| fail(format!("apply fails: {}", chain(&e))))?;
        let again = self.apply((&*kernel, &plan), &packed, &rows, Poison::Plausible)?;
        let again = again.or_else(|e| fail(format!("the second apply fails: {}", chain(&e))))?;

        let got = self.reduced(&plan, &rows, &first);
        let same = self.reduced(&plan, &rows, &again);
        let mut verdict = fail("no candidate");
        for values in rows.values(case, self.rank, Codes::of_gemm1(case.quant, &all)) {
            let count = rows.num_rows();
            let slots = count * case.top_k;
            let arrived =
                ArrivedRows { values: &values, ids: &rows.ids[..slots], weights: &rows.weights[..slots] };
            let mut combine = Combine::new(Rounding::of_plan(&plan, DType::F32), count, case.hidden);
            combine.add_rank(&self.oracle(&plan, &all).outputs(arrived).or_else(fail)?);
            verdict = match combine.finish().check(&got, case.hidden) {
                Ok(_) => Ok(()),
                Err(far) => fail(far),
            };
            if verdict.is_ok() {
                break;
            }
        }
        verdict?;
        match crate::layer::bits(&got) == crate::layer::bits(&same) {
            true => Ok(()),
            false => fail("the same batch gave other bits the second time, in other workspace and output"),
        }
    }

    fn oracle<'o>(&'o self, plan: &Plan, all: &'o [fused_moe_core::ExpertMatrices<'o>]) -> RankExperts<'o> {
        RankExperts {
            shape: self.case.shape(),
            codes: Codes::of_gemm2(self.case.quant, all),
            activation: self.case.activation,
            padding: self.case.padding,
            router_weight: plan.router_weight(),
            accumulation: plan.accumulation(),
            experts: all,
            placement: &self.case.placement,
            rank: self.rank,
        }
    }

    fn out_dims(&self, plan: &Plan) -> Vec<usize> {
        let (rows, hidden) = (plan.max_rows(), self.case.hidden);
        match (plan.format(), plan.weight_and_reduce()) {
            (ActivationFormat::BatchedExperts, _) => {
                vec![self.case.placement.num_local_experts(self.rank), rows, hidden]
            }
            (ActivationFormat::Standard, reduce) if reduce.is_no_op() => vec![rows, hidden],
            _ => vec![rows, self.case.top_k, hidden],
        }
    }

    /// One call in poisoned workspace and output.
    fn apply(
        &self,
        (kernel, plan): (&dyn ExpertsModular, &Plan),
        weights: &ExpertWeights,
        rows: &Batch,
        poison: Poison,
    ) -> Check<Result<Vec<bf16>>> {
        let dims = self.out_dims(plan);
        if let Some(device) = self.target.settings.device {
            return apply_on(device, (kernel, &dims), weights, rows, poison);
        }
        let mut out = poison.output(dims.iter().product());
        let mut workspace = poison.workspace(kernel.workspace_bytes())?;
        let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
        let view = TensorViewMut::from_slice(&mut out, DType::Bf16, &dims).or_else(fail)?;
        let input: Dispatched<'_> = rows.dispatched();
        Ok(kernel.apply(&mut cx, weights, &input, view).map(|()| out))
    }

    /// The weighted sums of the valid rows, `[rows, hidden]`, from an output of any shape.
    fn reduced(&self, plan: &Plan, rows: &Batch, out: &[bf16]) -> Vec<f32> {
        let Case { hidden, top_k, .. } = *self.case;
        let count = rows.num_rows();
        let row = |at: usize| out[at * hidden..][..hidden].iter().map(|x| x.to_f64());
        if plan.format() == ActivationFormat::Standard && plan.weight_and_reduce().is_no_op() {
            return out[..count * hidden].iter().map(|x| x.to_f32()).collect();
        }
        let weighted = plan.router_weight() != RouterWeight::OnOutput;
        let mut sums = vec![0.0; count * hidden];
        let mut add = |to: usize, at: usize, weight: f32| {
            let weight = if weighted { 1.0 } else { f64::from(weight) };
            sums[to * hidden..][..hidden].iter_mut().zip(row(at)).for_each(|(sum, x)| *sum += weight * x);
        };
        let local = |id: i32| self.case.placement.rank_of_slot(id) == Some(self.rank);
        for to in 0..count {
            for slot in to * top_k..(to + 1) * top_k {
                let (id, weight) = (rows.ids[slot], rows.weights[slot]);
                if !local(id) {
                    continue;
                }
                if plan.format() == ActivationFormat::Standard {
                    add(to, slot, weight);
                    continue;
                }
                let mut experts = self.case.placement.experts_of(self.rank);
                let expert = experts.position(|e| e.0 as i32 == id).unwrap_or(0);
                let place = rows.of_expert[expert].iter().position(|&r| r == to).unwrap_or(0);
                add(to, expert * plan.max_rows() + place, weight);
            }
        }
        sums.iter().map(|&x| x as f32).collect()
    }
}

/// One call on a device, in poisoned workspace and output.
fn apply_on(
    device: &dyn TestDevice,
    (kernel, dims): (&dyn ExpertsModular, &[usize]),
    weights: &ExpertWeights,
    rows: &Batch,
    poison: Poison,
) -> Check<Result<Vec<bf16>>> {
    let uploaded = rows.upload(device)?;
    let mut out = Placed::filled(device, poison.byte(), (DType::Bf16, dims))?;
    let bytes = kernel.workspace_bytes();
    let mut workspace = Placed::filled(device, poison.byte(), (DType::U8, &[bytes]))?;
    let mut cx = ExecCx { stream: device.stream(), workspace: Arena::new(workspace.view_mut()?) };
    if let Err(error) = kernel.apply(&mut cx, weights, &uploaded.dispatched()?, out.view_mut()?) {
        return Ok(Err(error));
    }
    let found = out.download(device)?;
    Ok(Ok(found.as_chunks().0.iter().map(|&x| bf16::from_ne_bytes(x)).collect()))
}
