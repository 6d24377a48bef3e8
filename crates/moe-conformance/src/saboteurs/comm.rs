//! Reference comms that were broken on purpose.

use ep_transport::transport_of;
use fused_moe_core::{
    DType, Dispatched, Error, ExecCx, ExpertOut, KernelKind, MoeConfig, PartialSums, Plan,
    PrepareAndFinalize, PrepareAndFinalizeModular, PrepareCaps, PrepareFinalize, PrepareFinalizeProvider,
    PrepareInput, ProcessGroup, Rank, Result, Routed, Sent, Stage, Support, TensorView, TensorViewMut,
    TicketLedger, WireBytes, phase,
};
use half::bf16;

use crate::reference::{CombineIds, ReferenceComm, ReferenceHandle};

const NAME: &str = "broken_comm";

/// A prepare/finalize backend with one bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokenComm {
    /// Every rank gets its own tokens only, so experts elsewhere contribute nothing (vLLM #37529).
    LocalOnly,
    /// Scales arrive as 1.
    DroppedScale,
    /// Combine applies the routing weight to rows that are already weighted and reduced.
    DoubleReduction,
    /// From the second round on, the first round's rows are handed out.
    StaleBuffer,
    /// Combine takes the ranks of a token from the ids of the received rows instead of the rank's own (mori #475).
    ReceivedLayoutIds,
    /// The last rank sends nothing.
    DroppedSends,
    /// Combine rounds its sum to bf16 after every rank.
    NarrowSum,
    /// Combine says that it quantises, and does not.
    UnquantizedCombine,
    /// Combine says that it rounds the sums of nodes, and does not.
    UnroundedNodes,
}

impl PrepareFinalizeProvider for BrokenComm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        match ReferenceComm.supports(config, kind) {
            Support::Supported(mut caps) => {
                caps.name = NAME;
                if *self == BrokenComm::UnquantizedCombine {
                    caps.combine_wire = config.combine_wire;
                }
                if *self == BrokenComm::UnroundedNodes {
                    caps.partial_sums = PartialSums::OfNodes { ranks_per_node: config.ranks_per_node };
                }
                Support::Supported(caps)
            }
            refused => refused,
        }
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        ReferenceComm.required_bytes(config, plan)
    }

    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        ReferenceComm.wire_bytes_per_token(config, plan)
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let transport = transport_of(group).filter(|_| *self != BrokenComm::LocalOnly);
        let handle = ReferenceHandle::new(config, plan, (group.rank(), transport));
        let handle = match self {
            BrokenComm::ReceivedLayoutIds => handle.combining_by(CombineIds::Received),
            BrokenComm::NarrowSum => handle.summing_in_bf16(),
            _ => handle,
        };
        if plan.kind() == KernelKind::Monolithic {
            return Ok(handle.boxed(plan.kind()));
        }
        let silent = *self == BrokenComm::DroppedSends && group.rank() == last_rank(config);
        Ok(PrepareFinalize::Modular(Box::new(BrokenHandle {
            inner: handle,
            bug: *self,
            silent,
            rounds: 0,
            kept_elements: Vec::new(),
            kept_codes: Vec::new(),
            ones: Vec::new(),
        })))
    }
}

fn last_rank(config: &MoeConfig) -> Rank {
    Rank(config.ep_size().saturating_sub(1) as u32)
}

struct BrokenHandle {
    inner: ReferenceHandle,
    bug: BrokenComm,
    silent: bool,
    rounds: usize,
    kept_elements: Vec<bf16>,
    kept_codes: Vec<u8>,
    ones: Vec<f32>,
}

fn view_failed(error: fused_moe_core::ViewError) -> Error {
    Error::other(Stage::QuantizeDispatch, NAME, error)
}

impl PrepareAndFinalize for BrokenHandle {
    fn caps(&self) -> &PrepareCaps {
        PrepareAndFinalize::caps(&self.inner)
    }

    fn allocated_bytes(&self) -> usize {
        PrepareAndFinalize::allocated_bytes(&self.inner)
    }

    fn ledger(&mut self) -> &mut TicketLedger {
        PrepareAndFinalize::ledger(&mut self.inner)
    }

    fn finalize_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        routed: Routed,
        out: ExpertOut<'a>,
    ) -> Result<Sent<'a, phase::Finalize>> {
        PrepareAndFinalize::finalize_send(&mut self.inner, cx, routed, out)
    }

    fn finalize_recv(
        &mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        if self.silent {
            let ledger = PrepareAndFinalize::ledger(&mut self.inner);
            let routing = ledger.receive_finalize(sent)?;
            ledger.close(routing);
            return Ok(());
        }
        let (top_k, weights) = (sent.routing().top_k(), sent.routing().weights().to_vec());
        PrepareAndFinalize::finalize_recv(&mut self.inner, cx, sent, out.reborrow())?;
        if self.bug == BrokenComm::DoubleReduction {
            for (token, weights) in weights.chunks_exact(top_k).enumerate() {
                let again: f32 = weights.iter().sum();
                match out.dtype() {
                    DType::F32 => {
                        out.row_mut::<f32>(token).map_err(view_failed)?.iter_mut().for_each(|x| *x *= again);
                    }
                    _ => {
                        let row = out.row_mut::<bf16>(token).map_err(view_failed)?;
                        row.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * again));
                    }
                }
            }
        }
        Ok(())
    }
}

impl PrepareAndFinalizeModular for BrokenHandle {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.inner.prepare_send(cx, input)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        if self.silent {
            let routed = PrepareAndFinalize::ledger(&mut self.inner).receive_prepare(sent)?;
            return Ok((self.inner.dispatched(), routed));
        }
        let (mut dispatched, routed) = PrepareAndFinalizeModular::prepare_recv(&mut self.inner, cx, sent)?;
        self.rounds += 1;
        match self.bug {
            BrokenComm::DroppedScale => {
                if let Some(scale) = dispatched.scale {
                    let count = scale.dims().iter().product();
                    self.ones.resize(count, 1.0);
                    let ones = TensorView::from_slice(&self.ones, DType::F32, scale.dims());
                    dispatched.scale = Some(ones.map_err(view_failed)?);
                }
            }
            BrokenComm::StaleBuffer => {
                let (hidden, dims) = (dispatched.hidden, dispatched.hidden.dims());
                let dtype = hidden.dtype();
                let stale = if dtype == DType::Bf16 {
                    if self.rounds == 1 {
                        self.kept_elements = hidden.as_slice::<bf16>().map_err(view_failed)?.to_vec();
                    }
                    TensorView::from_slice(&self.kept_elements, dtype, dims)
                } else {
                    if self.rounds == 1 {
                        self.kept_codes = hidden.as_slice::<u8>().map_err(view_failed)?.to_vec();
                    }
                    TensorView::from_slice(&self.kept_codes, dtype, dims)
                };
                dispatched.hidden = stale.map_err(view_failed)?;
            }
            _ => {}
        }
        Ok((dispatched, routed))
    }
}
