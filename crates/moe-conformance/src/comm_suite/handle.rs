//! A handle of either kind, driven phase by phase.

use fused_moe_core::{
    Arena, DType, ExecCx, ExpertOut, ExpertPlacement, Fault, MonolithicInput, Plan,
    PrepareAndFinalizeModular, PrepareAndFinalizeMonolithic, PrepareFinalize, PrepareInput, Rank, Result,
    Routed, Sent, Stream, TensorView, TensorViewMut, TopK, phase,
};
use half::bf16;

use super::Accepted;
use super::arrivals::{Arrivals, batched, monolithic, standard};
use super::toy::{self, Values};
use crate::case::{Case, RankInput};
use crate::outcome::{Check, chain, fail};

/// A built backend.
pub(super) struct Handle {
    comm: PrepareFinalize,
    plan: Plan,
    placement: ExpertPlacement,
    rank: Rank,
}

/// What stands for the experts' output of a round, until combine.
pub(super) enum Partial {
    /// Written to the backend's buffer.
    InPlace,
    /// Here, in these dimensions.
    Lent(Vec<bf16>, Vec<usize>),
}

/// The input of a round in this rank's memory.
#[derive(Clone, Copy)]
pub(super) struct Lent<'a> {
    pub(super) input: &'a RankInput,
    /// Elements of a row.
    pub(super) hidden: usize,
    /// Slots of a row of ids and weights.
    pub(super) top_k: usize,
    /// Elements of a row of logits.
    pub(super) num_experts: usize,
    /// The static scale of the layer, if the scheme has one.
    pub(super) input_scale: Option<f32>,
    pub(super) fault: Option<Fault>,
}

impl<'a> Lent<'a> {
    pub(super) fn new(case: &Case, input: &'a RankInput) -> Self {
        let Case { hidden, top_k, num_experts, .. } = *case;
        Self { input, hidden, top_k, num_experts, input_scale: case.static_scale(), fault: None }
    }

    fn states(&self) -> TensorView<'a> {
        view(&self.input.hidden, DType::Bf16, &[self.input.num_tokens, self.hidden])
    }

    fn topk(&self) -> TopK<'a> {
        let dims = [self.input.num_tokens, self.top_k];
        TopK {
            ids: view(&self.input.ids, DType::I32, &dims),
            weights: view(&self.input.weights, DType::F32, &dims),
        }
    }

    fn logits(&self) -> TensorView<'a> {
        view(&self.input.logits, DType::F32, &[self.input.num_tokens, self.num_experts])
    }
}

fn view<'a, T: fused_moe_core::Element>(slice: &'a [T], dtype: DType, dims: &[usize]) -> TensorView<'a> {
    TensorView::from_slice(slice, dtype, dims).expect("the vector was made for these dimensions")
}

/// Runs `body` with an empty workspace: what a backend needs it has allocated.
fn with_cx<T>(body: impl FnOnce(&mut ExecCx<'_>) -> T) -> T {
    let memory = TensorViewMut::from_slice::<u8>(&mut [], DType::U8, &[0]);
    let workspace = Arena::new(memory.expect("an empty slice holds an empty tensor"));
    body(&mut ExecCx { stream: Stream::Host, workspace })
}

impl Handle {
    /// A handle that says what its provider said.
    pub(super) fn new(comm: PrepareFinalize, accepted: &Accepted, rank: Rank) -> Check<Self> {
        let (built, caps) = (comm.caps(), &accepted.caps);
        let same = (built.name, built.kind, built.format) == (caps.name, caps.kind, caps.format);
        if !same || built.max_rows != caps.max_rows {
            return fail(format!("the provider offers {caps:?}, the handle {built:?}"));
        }
        Ok(Self { comm, plan: accepted.plan.clone(), placement: accepted.config.placement.clone(), rank })
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        self.comm.allocated_bytes()
    }

    pub(super) fn prepare_send<'a>(&mut self, lent: Lent<'a>) -> Result<Sent<'a, phase::Prepare>> {
        with_cx(|cx| match &mut self.comm {
            PrepareFinalize::Modular(comm) => {
                let (hidden, topk, fault) = (lent.states(), lent.topk(), lent.fault);
                comm.prepare_send(cx, PrepareInput { hidden, topk, input_scale: lent.input_scale, fault })
            }
            PrepareFinalize::Monolithic(comm) => {
                let (hidden, logits, fault) = (lent.states(), lent.logits(), lent.fault);
                comm.prepare_send(
                    cx,
                    MonolithicInput { hidden, logits, input_scale: lent.input_scale, fault },
                )
            }
        })
    }

    /// Receives, keeps a copy of what arrived, and writes the toy's output. The outer error is a failed check.
    pub(super) fn prepare_recv(
        &mut self,
        sent: Sent<'_, phase::Prepare>,
        values: Values,
    ) -> Check<Result<(Arrivals, Partial, Routed)>> {
        let Self { comm, plan, placement, rank, .. } = self;
        let toy = Toy { plan, placement, rank: *rank, values };
        with_cx(|cx| match comm {
            PrepareFinalize::Modular(comm) => {
                let (mut dispatched, routed) = match comm.prepare_recv(cx, sent) {
                    Ok(received) => received,
                    Err(error) => return Ok(Err(error)),
                };
                let output = dispatched.output.take();
                let arrivals = match plan.format() {
                    fused_moe_core::ActivationFormat::Standard => standard(plan, &dispatched)?,
                    fused_moe_core::ActivationFormat::BatchedExperts => batched(plan, &dispatched)?,
                };
                let partial = toy.write(&arrivals, dispatched.hidden.dims(), output)?;
                Ok(Ok((arrivals, partial, routed)))
            }
            PrepareFinalize::Monolithic(comm) => {
                let (mut dispatched, routed) = match comm.prepare_recv(cx, sent) {
                    Ok(received) => received,
                    Err(error) => return Ok(Err(error)),
                };
                let output = dispatched.output.take();
                let arrivals = monolithic(plan, &dispatched)?;
                let partial = toy.write(&arrivals, dispatched.hidden.dims(), output)?;
                Ok(Ok((arrivals, partial, routed)))
            }
        })
    }

    pub(super) fn finalize_send<'a>(
        &mut self,
        routed: Routed,
        out: std::result::Result<&'a Partial, Fault>,
    ) -> Result<Sent<'a, phase::Finalize>> {
        let out = match out {
            Ok(Partial::InPlace) => ExpertOut::InPlace,
            Ok(Partial::Lent(rows, dims)) => ExpertOut::Lent(view(rows, DType::Bf16, dims)),
            Err(fault) => ExpertOut::Failed(fault),
        };
        with_cx(|cx| match &mut self.comm {
            PrepareFinalize::Modular(comm) => comm.finalize_send(cx, routed, out),
            PrepareFinalize::Monolithic(comm) => comm.finalize_send(cx, routed, out),
        })
    }

    /// Receives the sums of `[tokens, hidden]`, in bf16 or in f32. The output is NaN beforehand.
    pub(super) fn finalize_recv(
        &mut self,
        sent: Sent<'_, phase::Finalize>,
        [tokens, hidden]: [usize; 2],
        in_bf16: bool,
    ) -> Result<Vec<f32>> {
        let mut wide = vec![f32::NAN; tokens * hidden];
        let mut narrow = vec![bf16::NAN; tokens * hidden];
        let out = match in_bf16 {
            true => TensorViewMut::from_slice(&mut narrow, DType::Bf16, &[tokens, hidden]),
            false => TensorViewMut::from_slice(&mut wide, DType::F32, &[tokens, hidden]),
        };
        let out = out.expect("the vector was made for these dimensions");
        with_cx(|cx| match &mut self.comm {
            PrepareFinalize::Modular(comm) => comm.finalize_recv(cx, sent, out),
            PrepareFinalize::Monolithic(comm) => comm.finalize_recv(cx, sent, out),
        })?;
        Ok(if in_bf16 { narrow.iter().map(|x| x.to_f32()).collect() } else { wide })
    }

    /// A whole round.
    pub(super) fn round(
        &mut self,
        case: &Case,
        input: &RankInput,
        (values, in_bf16): (Values, bool),
    ) -> Check<(Arrivals, Vec<f32>)> {
        let failed = |phase: &str, e: fused_moe_core::Error| format!("{phase} fails: {}", chain(&e));
        let sent = self.prepare_send(Lent::new(case, input));
        let sent = sent.or_else(|e| fail(failed("prepare_send", e)))?;
        let received = self.prepare_recv(sent, values)?;
        let (arrivals, partial, routed) = received.or_else(|e| fail(failed("prepare_recv", e)))?;
        let sent = self.finalize_send(routed, Ok(&partial));
        let sent = sent.or_else(|e| fail(failed("finalize_send", e)))?;
        let out = self.finalize_recv(sent, [input.num_tokens, case.hidden], in_bf16);
        Ok((arrivals, out.or_else(|e| fail(failed("finalize_recv", e)))?))
    }
}

/// Writes what stands for the experts' output.
struct Toy<'a> {
    plan: &'a Plan,
    placement: &'a ExpertPlacement,
    rank: Rank,
    values: Values,
}

impl Toy<'_> {
    /// `dims` are those of the dispatched rows, and so of the output.
    fn write(
        &self,
        arrivals: &Arrivals,
        dims: &[usize],
        output: Option<TensorViewMut<'_>>,
    ) -> Check<Partial> {
        if output.is_some() != self.plan.in_place_output() {
            let (lends, says) = (output.is_some(), self.plan.in_place_output());
            return fail(format!("lends an output buffer: {lends}, the plan says {says}"));
        }
        let hidden = dims[dims.len() - 1];
        match output {
            Some(mut output) => {
                if output.dims() != dims || output.dtype() != DType::Bf16 {
                    let (found, dtype) = (output.dims(), output.dtype());
                    return fail(format!("lent an output of {found:?} {dtype} for rows of {dims:?}"));
                }
                let rows = output.as_mut_slice::<bf16>().or_else(fail)?;
                self.fill(arrivals, hidden, rows);
                Ok(Partial::InPlace)
            }
            None => {
                let mut rows = vec![bf16::ZERO; dims.iter().product()];
                self.fill(arrivals, hidden, &mut rows);
                Ok(Partial::Lent(rows, dims.to_vec()))
            }
        }
    }

    /// Fills `rows`; those behind the counts become NaN.
    fn fill(&self, arrivals: &Arrivals, hidden: usize, rows: &mut [bf16]) {
        rows.fill(bf16::NAN);
        match arrivals {
            Arrivals::Rows(arrived) => {
                for (row, out) in arrived.iter().zip(rows.chunks_exact_mut(hidden)) {
                    toy::partial(row, (self.placement, self.rank), self.values, out);
                }
            }
            Arrivals::OfExperts(experts) => {
                let ids = self.placement.experts_of(self.rank);
                let blocks = rows.chunks_exact_mut(self.plan.max_rows() * hidden);
                for ((arrived, id), rows) in experts.iter().zip(ids).zip(blocks) {
                    for (row, out) in arrived.iter().zip(rows.chunks_exact_mut(hidden)) {
                        toy::batched(row, (id.0, self.rank), self.values, out);
                    }
                }
            }
        }
    }
}
