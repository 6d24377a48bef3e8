//! A handle: the four phases.
//!
//! # Who may touch which bytes when
//! A round has two exchanges of statuses among all ranks, one when rows are dispatched and one when outputs are
//! returned. Status boards tell rounds apart by parity; the payload needs no second copy:
//!
//! - *Batches and counts* of rank `d` are written by each source in windows of its own, before its dispatch status
//!   of round r. `d` touches them between having seen the dispatch statuses of all ranks and posting its own return
//!   status. A source writes them again in round r + 1, which it enters only after it has seen the return statuses of
//!   all ranks in round r, or a dispatch status with a fault. In that case `d` sees the same fault and touches nothing.
//! - *Outputs* of rank `s` are written by the owners of its experts, each slot by one of them, between having seen the
//!   dispatch status of `s` in round r and posting their return statuses. `s` reads them after it has seen all of these
//!   and before it posts its dispatch status of round r + 1.
//!
//! Waits are for all ranks even after a fault, so that no put of a step is under way when the step has failed.
//! Every send ends with a `quiet`, so that its sources may change when it returns.

use std::sync::Arc;

use ep_transport::{Heap, Payload, Status, Transport, TransportError};
use fused_moe_core::{
    Allocation, Arrived, DType, Device, Dispatched, Error, ExecCx, ExpertOut, Fault, GlobalExpertId, Layout,
    LocalExpertId, MoeConfig, Outstanding, Plan, PrepareAndFinalize, PrepareAndFinalizeModular, PrepareCaps,
    PrepareInput, Rank, Result, Routed, RouterWeight, Routing, Sent, Source, Stage, TensorView,
    TensorViewMut, TicketLedger, TokensPerExpert, check_output, phase,
};
use half::bf16;
use quant::{Activations, Isa, QuantError, Quantizer, Term, sum_rows};
use smallvec::SmallVec;

use crate::NAME;
use crate::buffers::{Buffers, Region, Shape};

/// A u32 as it lies in the heap.
type Word = [u8; 4];

/// What this rank sends from.
struct Staged {
    /// `[max_tokens, payload_bytes]`.
    payload: Vec<u8>,
    /// `[max_tokens, scale_bytes]`.
    scales: Vec<u8>,
    /// `[max_tokens · top_k]`: every slot's own number.
    slots: Vec<Word>,
    /// `[ranks, max_experts]`: rows put to each expert of each rank in this round.
    counts: Vec<Word>,
}

/// What this rank received.
struct Received {
    /// `[local_experts, ranks]`: rows of each expert by source. Has room for the rank with most experts.
    by_source: Vec<u32>,
    /// `[local_experts]`: rows of each expert. Has room as above.
    tokens: Vec<i32>,
}

/// One rank's end of a dispatch/combine pair.
pub(crate) struct LowLatency {
    caps: PrepareCaps,
    config: MoeConfig,
    shape: Shape,
    local_experts: usize,
    wire_has_scales: bool,
    payload_dtype: DType,
    weight_on_input: bool,
    quantizer: Quantizer,
    ledger: TicketLedger,
    buffers: Buffers,
    staged: Staged,
    received: Received,
    heap: Arc<dyn Heap>,
    transport: Arc<dyn Transport>,
}

impl LowLatency {
    pub fn new(
        caps: PrepareCaps,
        config: &MoeConfig,
        plan: &Plan,
        transport: Arc<dyn Transport>,
    ) -> Result<Self> {
        let quantizer = Quantizer::for_dispatch(plan.wire(), config.quant)
            .map_err(|e| Error::contract(Stage::QuantizeDispatch, NAME, e))?;
        let shape = Shape::new(config, plan);
        let buffers = Buffers::new(&shape);
        let heap = transport
            .allocate(buffers.layout().size(), transport.deadline())
            .map_err(|e| e.into_core(Stage::QuantizeDispatch, NAME, 0))?;
        let cells = shape.ranks * shape.max_experts;
        Ok(Self {
            local_experts: config.placement.num_local_experts(transport.rank()),
            ledger: TicketLedger::new(NAME, transport.rank(), config),
            wire_has_scales: plan.wire().scale.is_some(),
            payload_dtype: plan.wire().payload,
            weight_on_input: plan.router_weight() == RouterWeight::OnInputByPrepare,
            staged: Staged {
                payload: vec![0; shape.max_tokens * shape.payload_bytes],
                scales: vec![0; shape.max_tokens * shape.scale_bytes],
                slots: (0..shape.slots() as u32).map(u32::to_ne_bytes).collect(),
                counts: vec![Word::default(); cells],
            },
            received: Received { by_source: vec![0; cells], tokens: vec![0; shape.max_experts] },
            config: config.clone(),
            caps,
            shape,
            quantizer,
            buffers,
            heap,
            transport,
        })
    }

    /// All ranks, this one last: the others start early, and not all with the same one.
    fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        let (me, ranks) = (self.transport.rank().index(), self.shape.ranks);
        (1..=ranks).map(move |distance| Rank(((me + distance) % ranks) as u32))
    }

    fn contract(&self, stage: Stage, why: impl Into<Source>) -> Error {
        Error::contract(stage, NAME, why)
    }

    /// Ends the round, and the handle if a peer is lost.
    fn broken(&mut self, error: TransportError, stage: Stage) -> Error {
        error.into_round(&mut self.ledger, stage, NAME)
    }

    /// Quantises this rank's tokens.
    fn stage(&mut self, activations: Activations<'_>, routing: &Routing) -> Result<(), QuantError> {
        let mut activations = activations;
        if self.weight_on_input {
            // One expert per token, so the weights of the round are one factor per row.
            activations = activations.weighted(routing.weights());
        }
        let rows = self.quantizer.prepare(activations)?;
        let Shape { payload_bytes, scale_bytes, .. } = self.shape;
        for token in 0..rows.tokens() {
            let payload = &mut self.staged.payload[token * payload_bytes..][..payload_bytes];
            rows.row(token, payload, &mut self.staged.scales[token * scale_bytes..][..scale_bytes])?;
        }
        Ok(())
    }

    /// Puts a row for every slot into this rank's window of its expert's batch, and then the counts.
    fn put_rows(&mut self, routing: &Routing) -> ep_transport::Result<()> {
        let Self { shape, config, buffers, staged, heap, .. } = self;
        let Shape { top_k, payload_bytes, scale_bytes, max_experts, .. } = *shape;
        let me = heap.rank();
        staged.counts.fill(Word::default());
        for (slot, &id) in routing.ids().iter().enumerate() {
            let Some((to, LocalExpertId(expert))) = owner(config, id) else { continue };
            let count = &mut staged.counts[to.index() * max_experts + expert as usize];
            let position = u32::from_ne_bytes(*count);
            *count = (position + 1).to_ne_bytes();
            let (token, row) = (slot / top_k, shape.window(expert as usize, me) + position as usize);
            let put = |region: &Region, bytes| {
                let payload = Payload { offset: region.row(row), bytes };
                // SAFETY: the row is in this rank's window, and it is this rank's turn: see the head of the file.
                // The staged rows are not touched before the `quiet` that ends the send.
                unsafe { heap.put_nbi(to, payload) }
            };
            put(&buffers.payload, &staged.payload[token * payload_bytes..][..payload_bytes])?;
            put(&buffers.scales, &staged.scales[token * scale_bytes..][..scale_bytes])?;
            put(&buffers.slots, &staged.slots[slot])?;
        }
        for (to, counts) in staged.counts.chunks_exact(max_experts.max(1)).enumerate() {
            let payload = Payload { offset: buffers.counts.row(me.index()), bytes: counts.as_flattened() };
            // SAFETY: as above; the row of counts is this rank's own.
            unsafe { heap.put_nbi(Rank(to as u32), payload)? };
        }
        Ok(())
    }

    /// Tells every rank how this rank's dispatch went, and returns when its rows have left.
    fn announce(&self, round: u64, fault: Option<Fault>) -> ep_transport::Result<()> {
        let status = fault.map_or(Status::done(0), Status::failed);
        self.heap.fence();
        self.ranks().try_for_each(|to| self.buffers.dispatched.post(&*self.heap, to, round, status))?;
        self.heap.quiet(self.transport.deadline())
    }

    /// Closes the gaps between the windows of this rank's batches and counts their rows.
    fn compact(&mut self) -> ep_transport::Result<()> {
        let Self { shape, buffers, received, heap, local_experts, .. } = self;
        // SAFETY: all ranks have posted their dispatch statuses and this one has not posted its return status, so
        // batches and counts are this rank's: see the head of the file. The regions are distinct and `self` is
        // borrowed exclusively, so there are no other references.
        let (counts, mut regions) = unsafe {
            let counts = heap.local(buffers.counts.start, buffers.counts.bytes())?;
            let region = |region: &Region| -> ep_transport::Result<_> {
                Ok((heap.local_mut(region.start, region.bytes())?, region.row_bytes))
            };
            (counts, [region(&buffers.payload)?, region(&buffers.scales)?, region(&buffers.slots)?])
        };
        let (counts, _) = counts.as_chunks::<4>();
        for expert in 0..*local_experts {
            let mut end = expert * shape.max_rows();
            for source in (0..shape.ranks as u32).map(Rank) {
                let count = u32::from_ne_bytes(counts[source.index() * shape.max_experts + expert]);
                // No sound rank has more rows for an expert than tokens; rows behind its window are not its own.
                let count = count.min(shape.max_tokens as u32);
                received.by_source[expert * shape.ranks + source.index()] = count;
                let (window, rows) = (shape.window(expert, source), count as usize);
                if window != end {
                    for (bytes, row) in &mut regions {
                        bytes.copy_within(window * *row..(window + rows) * *row, end * *row);
                    }
                }
                end += rows;
            }
            received.tokens[expert] = (end - expert * shape.max_rows()) as i32;
        }
        Ok(())
    }

    /// Views of this rank's batches.
    fn batches(&self) -> Result<Dispatched<'_>, Source> {
        let (experts, max_rows) = (self.local_experts, self.shape.max_rows());
        let view = |region: &Region, dtype: DType| -> Result<TensorView<'_>, Source> {
            let base = self.heap.local_ptr(region.start, region.bytes())?.as_ptr();
            let allocation = Allocation { base, bytes: region.bytes(), dtype, device: Device::HOST };
            let layout = Layout::contiguous(&[experts, max_rows, region.row_bytes / dtype.size_bytes()]);
            // SAFETY: nobody writes the batches before this rank's return status (see the head of the file), which
            // it posts through `&mut self`; `&self` keeps the heap alive.
            Ok(unsafe { TensorView::from_allocation(allocation, layout)? })
        };
        let tokens = TensorView::from_slice(&self.received.tokens[..experts], DType::I32, &[experts])?;
        let scale = self.wire_has_scales.then(|| view(&self.buffers.scales, DType::F32)).transpose()?;
        Ok(Dispatched {
            hidden: view(&self.buffers.payload, self.payload_dtype)?,
            scale,
            arrived: Arrived::Batched { tokens: TokensPerExpert(tokens) },
            output: None,
        })
    }

    /// The experts' output as one slice, if it has the batches' shape.
    fn outputs_of<'a>(&self, out: ExpertOut<'a>) -> Result<Result<&'a [bf16], Fault>, Source> {
        let view = match out {
            ExpertOut::Failed(fault) => return Ok(Err(fault)),
            ExpertOut::InPlace => return Err("no buffer was lent for the experts' output".into()),
            ExpertOut::Lent(view) => view,
        };
        let wanted = [self.local_experts, self.shape.max_rows(), self.shape.hidden];
        if view.dims() != wanted || view.dtype() != self.config.in_dtype {
            let (dims, dtype) = (view.dims(), view.dtype());
            let wanted = format!("{wanted:?} of {}", self.config.in_dtype);
            return Err(format!("the experts' output is {dims:?} of {dtype}, needs {wanted}").into());
        }
        Ok(Ok(view.as_slice::<bf16>()?))
    }

    /// Puts the outputs of all valid rows back to the slots that they belong to.
    fn put_outputs(&self, outputs: &[bf16]) -> ep_transport::Result<()> {
        let Self { shape, buffers, received, heap, .. } = self;
        // SAFETY: the slots came with the rows of this round and are written again only after this rank's return
        // status, which is posted behind these puts.
        let slots = unsafe { heap.local(buffers.slots.start, buffers.slots.bytes())? };
        let (slots, _) = slots.as_chunks::<4>();
        let by_source = received.by_source.chunks_exact(shape.ranks).take(self.local_experts);
        for (expert, by_source) in by_source.enumerate() {
            let mut row = expert * shape.max_rows();
            for (source, &rows) in by_source.iter().enumerate() {
                for row in row..row + rows as usize {
                    let slot = u32::from_ne_bytes(slots[row]) as usize;
                    // The bound keeps a slot that no sound rank sends inside its region.
                    let slot = slot.min(buffers.outputs.rows - 1);
                    let output = bytes_of(&outputs[row * shape.hidden..][..shape.hidden]);
                    let payload = Payload { offset: buffers.outputs.row(slot), bytes: output };
                    // SAFETY: this rank holds the slot's expert, and the slot's owner reads it after this rank's
                    // return status. The outputs are lent until this send, which a `quiet` ends.
                    unsafe { heap.put_nbi(Rank(source as u32), payload)? };
                }
                row += rows as usize;
            }
        }
        Ok(())
    }

    /// Weights and sums the outputs of this rank's own tokens, in slot order.
    fn combine(&self, routing: &Routing, out: &mut TensorViewMut<'_>) -> Result<(), Source> {
        let Self { shape, config, buffers, heap, .. } = self;
        let isa = Isa::detect();
        for token in 0..routing.num_tokens() {
            // More slots than these are rare, and cost an allocation.
            let mut terms = SmallVec::<[Term<'_>; 16]>::new();
            let slots = token * shape.top_k..(token + 1) * shape.top_k;
            for slot in slots.filter(|&slot| owner(config, routing.ids()[slot]).is_some()) {
                let weight = if self.weight_on_input { 1.0 } else { routing.weights()[slot] };
                // SAFETY: all ranks have posted that their outputs are here, and they write them again only
                // after this rank's dispatch status of the next round.
                let output = unsafe { heap.local(buffers.outputs.row(slot), buffers.outputs.row_bytes)? };
                terms.push(Term { row: elements_of(output), weight });
            }
            match out.dtype() {
                DType::F32 => sum_rows(isa, &terms, out.row_mut::<f32>(token)?),
                _ => sum_rows(isa, &terms, out.row_mut::<bf16>(token)?),
            }
        }
        Ok(())
    }
}

/// The rank that holds the expert of a slot, and the expert's place there; `None` for padding.
fn owner(config: &MoeConfig, id: i32) -> Option<(Rank, LocalExpertId)> {
    let rank = config.placement.rank_of_slot(id)?;
    Some((rank, config.placement.local_id(GlobalExpertId(id as u32))?))
}

/// `bytes` of a region as elements.
fn elements_of(bytes: &[u8]) -> &[bf16] {
    // SAFETY: any two bytes are a bf16.
    let (before, elements, behind) = unsafe { bytes.align_to() };
    assert!(before.is_empty() && behind.is_empty(), "a row of a region begins and ends with an element");
    elements
}

fn bytes_of(values: &[bf16]) -> &[u8] {
    // SAFETY: a bf16 is two initialised bytes without padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

impl PrepareAndFinalize for LowLatency {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        let Staged { payload, scales, slots, counts } = &self.staged;
        let Received { by_source, tokens } = &self.received;
        let words = slots.len() + counts.len() + by_source.len() + tokens.len();
        self.heap.size().required_bytes() + payload.len() + scales.len() + words * size_of::<u32>()
    }

    fn ledger(&mut self) -> &mut TicketLedger {
        &mut self.ledger
    }

    fn finalize_send<'a>(
        &mut self,
        _cx: &mut ExecCx<'_>,
        routed: Routed,
        out: ExpertOut<'a>,
    ) -> Result<Sent<'a, phase::Finalize>> {
        let sent = self.ledger.send_finalize(routed)?;
        let outputs = self.outputs_of(out).unwrap_or_else(|why| {
            self.ledger.explain(why);
            Err(Fault::BadTensor)
        });
        let put = outputs.map_or(Ok(()), |outputs| self.put_outputs(outputs));
        let status = outputs.err().map_or(Status::done(0), Status::failed);
        let returned = put.and_then(|()| {
            self.heap.fence();
            let (board, round) = (self.buffers.returned, sent.round());
            board.post_all(&*self.heap, round, status)?;
            self.heap.quiet(self.transport.deadline())
        });
        returned.map_err(|e| self.broken(e, Stage::Combine))?;
        Ok(sent)
    }

    fn finalize_recv(
        &mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let round = sent.round();
        let routing = self.ledger.receive_finalize(sent)?;
        let (board, deadline) = (self.buffers.returned, self.transport.deadline());
        let fault = board
            .wait_all(&*self.heap, round, deadline, |_, _| {})
            .map_err(|e| self.broken(e, Stage::Combine))?;
        if let Some((rank, fault)) = fault {
            return Err(self.ledger.fail_finalize(routing, rank, fault));
        }
        // The peers have all they need of this rank, so an output that does not fit is this rank's affair alone.
        let combined = check_output(&self.config, routing.num_tokens(), &out)
            .map_err(Into::into)
            .and_then(|()| self.combine(&routing, &mut out))
            .map_err(|why| self.contract(Stage::Combine, why));
        self.ledger.close(routing);
        combined
    }
}

impl PrepareAndFinalizeModular for LowLatency {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.settle(cx)?;
        let (sent, mut fault) = self.ledger.open(&self.config, &input)?;
        if fault.is_none()
            && let Err(why) =
                self.stage(Activations::of(input.hidden).scaled(input.input_scale), sent.routing())
        {
            fault = Some(Fault::BadTensor);
            self.ledger.explain(why);
        }
        let put = if fault.is_none() { self.put_rows(sent.routing()) } else { Ok(()) };
        let announced = put.and_then(|()| self.announce(sent.round(), fault));
        announced.map_err(|e| self.broken(e, Stage::QuantizeDispatch))?;
        Ok(sent)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        let routed = self.ledger.receive_prepare(sent)?;
        let (board, deadline) = (self.buffers.dispatched, self.transport.deadline());
        let fault = board
            .wait_all(&*self.heap, routed.round(), deadline, |_, _| {})
            .map_err(|e| self.broken(e, Stage::QuantizeDispatch))?;
        if let Some((rank, fault)) = fault {
            return Err(self.ledger.fail_prepare(routed, rank, fault));
        }
        self.compact().map_err(|e| self.broken(e, Stage::QuantizeDispatch))?;
        let this = &*self;
        let batches = this.batches().map_err(|e| this.contract(Stage::QuantizeDispatch, e))?;
        Ok((batches, routed))
    }
}

impl Drop for LowLatency {
    /// Tells the peers of a round whose ticket was dropped that nothing will come, now and not at their deadline.
    /// Does not wait for them: the memory lives as long as any rank holds it.
    fn drop(&mut self) {
        let round = self.ledger.round();
        if let Some(Outstanding::PrepareSent(_) | Outstanding::Dispatched(_)) = self.ledger.outstanding() {
            // A peer that cannot be told is one that is gone.
            let _ = self.buffers.returned.post_all(&*self.heap, round, Status::failed(Fault::Abandoned));
        }
    }
}
