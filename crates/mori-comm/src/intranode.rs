//! The IntraNode kernel.

use std::sync::Arc;

use ep_transport::{Heap, Status, Transport, TransportError};
use fused_moe_core::{
    Arrived, DType, Dispatched, Error, ExecCx, ExpertOut, Fault, MoeConfig, Outstanding, Plan,
    PrepareAndFinalize, PrepareAndFinalizeModular, PrepareCaps, PrepareInput, Rank, ReceivedRows, Result,
    Routed, RouterWeight, Routing, Sent, Stage, TensorView, TensorViewMut, TicketLedger, TopK, ViewError,
    check_output, phase,
};
use half::bf16;
use quant::{Activations, Quantizer};

use crate::buffers::{Buffers, Rows};

/// A top-k slot whose token goes to no new rank: padding, or a rank that an earlier slot already named.
const NO_ROW: u32 = u32::MAX;

/// The regions of one rank, mapped.
#[derive(Clone, Copy, Debug)]
struct Peer {
    payload: Rows,
    scales: Rows,
    ids: Rows,
    weights: Rows,
    source: Rows,
    expert_out: Rows,
}

/// Where this rank's tokens went in the current round.
struct Sends {
    /// `[max_tokens, top_k]`: row on the rank of the slot's expert, or [`NO_ROW`].
    rows: Vec<u32>,
    /// `[world_size]`: rows reserved on each rank; first the count, then the next row to write.
    next: Vec<u32>,
    /// `[world_size]`: rows written to each rank.
    counts: Vec<u32>,
}

/// One rank's end of an IntraNode dispatch/combine pair.
pub(crate) struct IntraNode {
    caps: PrepareCaps,
    config: MoeConfig,
    wire_has_scales: bool,
    payload_dtype: DType,
    weight_on_input: bool,
    quantizer: Quantizer,
    ledger: TicketLedger,
    buffers: Buffers,
    peers: Vec<Peer>,
    sends: Sends,
    staged_payload: Vec<u8>,
    staged_scales: Vec<u8>,
    ones: Vec<f32>,
    sum: Vec<f32>,
    received: [i32; 1],
    heap: Arc<dyn Heap>,
    transport: Arc<dyn Transport>,
}

impl IntraNode {
    pub fn new(
        caps: PrepareCaps,
        config: &MoeConfig,
        plan: &Plan,
        transport: Arc<dyn Transport>,
    ) -> Result<Self> {
        let backend = caps.name;
        let failed = |error: TransportError| error.into_core(Stage::QuantizeDispatch, backend, 0);
        let contract = |why: String| Error::contract(Stage::QuantizeDispatch, backend, why);
        let quantizer =
            Quantizer::for_dispatch(plan.wire(), config.quant).map_err(|e| contract(e.to_string()))?;
        let buffers = Buffers::new(config, plan);
        let heap = transport.allocate(buffers.layout().size(), transport.deadline()).map_err(failed)?;
        let mut peers = Vec::with_capacity(config.ep_size());
        for rank in (0..config.ep_size() as u32).map(Rank) {
            let map = |region| -> Result<Rows> {
                Rows::map(&*heap, rank, region)
                    .map_err(failed)?
                    .ok_or_else(|| contract(format!("the memory of {rank} is out of reach")))
            };
            peers.push(Peer {
                payload: map(buffers.payload)?,
                scales: map(buffers.scales)?,
                ids: map(buffers.ids)?,
                weights: map(buffers.weights)?,
                source: map(buffers.source)?,
                expert_out: map(buffers.expert_out)?,
            });
        }
        let slots = config.max_tokens_per_rank * config.top_k;
        Ok(Self {
            ledger: TicketLedger::new(backend, transport.rank(), config),
            wire_has_scales: plan.wire().scale.is_some(),
            payload_dtype: plan.wire().payload,
            weight_on_input: plan.router_weight() == RouterWeight::OnInputByPrepare,
            sends: Sends {
                rows: vec![NO_ROW; slots],
                next: vec![0; config.ep_size()],
                counts: vec![0; config.ep_size()],
            },
            staged_payload: vec![0; plan.wire().payload_bytes(config.hidden)],
            staged_scales: vec![0; plan.wire().scale_bytes(config.hidden)],
            ones: vec![1.0; config.top_k],
            sum: vec![0.0; config.hidden],
            received: [0],
            config: config.clone(),
            caps,
            quantizer,
            buffers,
            peers,
            heap,
            transport,
        })
    }

    /// Bytes of this rank's own bookkeeping.
    pub fn local_bytes(config: &MoeConfig, plan: &Plan) -> usize {
        let slots = config.max_tokens_per_rank * config.top_k;
        let words = slots + 2 * config.ep_size() + config.top_k + config.hidden;
        words * size_of::<u32>()
            + plan.wire().payload_bytes(config.hidden)
            + plan.wire().scale_bytes(config.hidden)
    }

    fn rank(&self) -> Rank {
        self.transport.rank()
    }

    fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.config.ep_size() as u32).map(Rank)
    }

    fn contract(&self, stage: Stage, why: impl Into<fused_moe_core::Source>) -> Error {
        Error::contract(stage, self.caps.name, why)
    }

    /// Quantises this rank's tokens and writes each to every rank that holds one of its experts.
    fn dispatch(&mut self, activations: Activations<'_>, routing: &Routing, round: u64) -> Result<()> {
        self.reserve(routing, round)
            .map_err(|e| e.into_core(Stage::QuantizeDispatch, self.caps.name, round))?;
        let mut activations = activations;
        if self.weight_on_input {
            activations = activations.weighted(routing.weights());
        }
        let prepared =
            self.quantizer.prepare(activations).map_err(|e| self.contract(Stage::QuantizeDispatch, e))?;
        let top_k = self.config.top_k;
        for token in 0..routing.num_tokens() {
            let slots = token * top_k..(token + 1) * top_k;
            let ids = &routing.ids()[slots.clone()];
            let weights = if self.weight_on_input { &self.ones } else { &routing.weights()[slots.clone()] };
            let source = self.rank().0 * self.config.max_tokens_per_rank as u32 + token as u32;
            let mut staged = false;
            for (slot, &id) in slots.zip(ids) {
                if self.sends.rows[slot] == NO_ROW {
                    continue;
                }
                let Some(to) = self.config.placement.rank_of_slot(id) else { continue };
                if !staged {
                    let (payload, scales) = (&mut self.staged_payload, &mut self.staged_scales);
                    let quantised = prepared.row(token, payload, scales);
                    quantised.map_err(|e| Error::contract(Stage::QuantizeDispatch, self.caps.name, e))?;
                    staged = true;
                }
                let peer = &self.peers[to.index()];
                let row = self.sends.next[to.index()] as usize;
                self.sends.next[to.index()] += 1;
                self.sends.rows[slot] = row as u32;
                // SAFETY: the row was reserved for this rank by the fetch-add of this round; its reader starts
                // after this rank's status, and its reader of the round before has posted the status that let
                // this rank begin. The heap is owned by `self`.
                unsafe {
                    peer.payload.row_mut(row).copy_from_slice(&self.staged_payload);
                    peer.scales.row_mut(row).copy_from_slice(&self.staged_scales);
                    copy_bytes(peer.ids.row_mut(row), ids, i32::to_ne_bytes);
                    copy_bytes(peer.weights.row_mut(row), weights, f32::to_ne_bytes);
                    peer.source.row_mut(row).copy_from_slice(&source.to_ne_bytes());
                }
            }
        }
        self.count_copies(self.buffers.dispatch_row_bytes());
        Ok(())
    }

    /// Finds the destinations of every token and reserves their rows: one atomic add per destination rank.
    fn reserve(&mut self, routing: &Routing, round: u64) -> ep_transport::Result<()> {
        let Sends { rows, next, counts } = &mut self.sends;
        counts.fill(0);
        let top_k = self.config.top_k;
        for token in 0..routing.num_tokens() {
            let ids = routing.ids_of(token);
            for (slot, &id) in ids.iter().enumerate() {
                let to = self.config.placement.rank_of_slot(id);
                // The first slot that names a rank owns the copy; k is small, so looking back is cheap.
                let owned = to.filter(|to| {
                    !ids[..slot].iter().any(|&e| self.config.placement.rank_of_slot(e) == Some(*to))
                });
                rows[token * top_k + slot] = match owned {
                    Some(to) => {
                        counts[to.index()] += 1;
                        0
                    }
                    None => NO_ROW,
                };
            }
        }
        for (to, (&count, next)) in counts.iter().zip(next.iter_mut()).enumerate() {
            if count > 0 {
                let (to, count) = (Rank(to as u32), u64::from(count));
                *next = self.buffers.cursor.take(&*self.heap, to, round, count)? as u32;
            }
        }
        Ok(())
    }

    /// Counts `row_bytes` for every row that this round moves between this rank and each other.
    fn count_copies(&self, row_bytes: usize) {
        for (rank, &rows) in self.ranks().zip(&self.sends.counts).filter(|&(_, &rows)| rows > 0) {
            self.heap.count_direct(rank, rows as usize * row_bytes);
        }
    }

    /// Tells every rank how this rank's dispatch went.
    fn announce(&self, round: u64, fault: Option<Fault>) -> ep_transport::Result<()> {
        self.ranks().try_for_each(|to| {
            let status = match fault {
                Some(fault) => Status::failed(fault),
                None => Status::done(u64::from(self.sends.counts[to.index()])),
            };
            self.buffers.dispatched.post(&*self.heap, to, round, status)
        })
    }

    /// Views of this rank's received regions.
    fn received_views(&self) -> Result<Dispatched<'_>, ViewError> {
        let mine = &self.peers[self.rank().index()];
        let view = |rows: &Rows, dtype| {
            // SAFETY: the writers of this round have posted their statuses and the writers of the next wait for
            // this rank's next status; `&self` keeps the heap alive and this rank from posting it.
            unsafe { TensorView::from_allocation(rows.allocation(dtype), rows.tensor_layout(dtype)) }
        };
        let (out, dtype) = (&mine.expert_out, self.config.in_dtype);
        // SAFETY: this rank alone writes its expert outputs, and its peers read them after its status; the view
        // borrows `self`, which posts that status through `&mut self`.
        let output =
            unsafe { TensorViewMut::from_allocation(out.allocation(dtype), out.tensor_layout(dtype))? };
        Ok(Dispatched {
            hidden: view(&mine.payload, self.payload_dtype)?,
            scale: self.wire_has_scales.then(|| view(&mine.scales, DType::F32)).transpose()?,
            arrived: Arrived::Standard {
                topk: TopK { ids: view(&mine.ids, DType::I32)?, weights: view(&mine.weights, DType::F32)? },
                rows: ReceivedRows(TensorView::from_slice(&self.received, DType::I32, &[1])?),
            },
            output: Some(output),
        })
    }

    /// Copies expert outputs that the caller lent into the region that peers read.
    fn take_lent(&mut self, lent: TensorView<'_>) -> Result<(), fused_moe_core::Source> {
        let wanted = [self.caps.max_rows, self.config.hidden];
        if lent.dims() != wanted || lent.dtype() != self.config.in_dtype {
            let (dims, dtype) = (lent.dims(), lent.dtype());
            return Err(format!("expert output is {dims:?} of {dtype}, needs {wanted:?}").into());
        }
        let mine = &self.peers[self.rank().index()];
        for row in 0..self.received[0] as usize {
            let from = lent.row_bytes(row)?;
            // SAFETY: as for the output view in `received_views`; the lent tensor is not this region, which the
            // caller could only have borrowed from `self`.
            unsafe { mine.expert_out.row_mut(row).copy_from_slice(from) };
        }
        Ok(())
    }

    /// Sums the outputs of this rank's own tokens, slot by slot in f32, rounded once.
    fn combine(&mut self, routing: &Routing, out: &mut TensorViewMut<'_>) -> Result<(), ViewError> {
        for token in 0..routing.num_tokens() {
            self.sum.fill(0.0);
            for (slot, &id) in routing.ids_of(token).iter().enumerate() {
                let row = self.sends.rows[token * self.config.top_k + slot];
                let Some(from) = self.config.placement.rank_of_slot(id).filter(|_| row != NO_ROW) else {
                    continue;
                };
                // SAFETY: the owner of the row has posted that its outputs are ready and writes them again only
                // after this rank's dispatch status of the next round; any bytes are a bf16.
                let values = unsafe { self.peers[from.index()].expert_out.row_as::<bf16>(row as usize) };
                for (sum, value) in self.sum.iter_mut().zip(values) {
                    *sum += value.to_f32();
                }
            }
            match out.dtype() {
                DType::F32 => out.row_mut::<f32>(token)?.copy_from_slice(&self.sum),
                _ => {
                    let row = out.row_mut::<bf16>(token)?;
                    row.iter_mut().zip(&self.sum).for_each(|(out, &sum)| *out = bf16::from_f32(sum));
                }
            }
        }
        // One output row came back for every row that was dispatched.
        self.count_copies(self.buffers.combine_row_bytes());
        Ok(())
    }
}

/// Writes `values` into `out`, which has their size.
fn copy_bytes<T: Copy, const N: usize>(out: &mut [u8], values: &[T], bytes: fn(T) -> [u8; N]) {
    for (out, &value) in out.chunks_exact_mut(N).zip(values) {
        out.copy_from_slice(&bytes(value));
    }
}

impl PrepareAndFinalize for IntraNode {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        let words = self.sends.rows.len()
            + self.sends.next.len()
            + self.sends.counts.len()
            + self.ones.len()
            + self.sum.len();
        let local = words * size_of::<u32>() + self.staged_payload.len() + self.staged_scales.len();
        self.heap.size().required_bytes() + local
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
        let fault = match out {
            ExpertOut::InPlace => None,
            ExpertOut::Failed(fault) => Some(fault),
            ExpertOut::Lent(view) => self.take_lent(view).err().map(|why| {
                self.ledger.explain(why);
                Fault::BadTensor
            }),
        };
        let status = fault.map_or(Status::done(0), Status::failed);
        let posted = self.buffers.ready.post_all(&*self.heap, sent.round(), status);
        posted.map_err(|e| e.into_round(&mut self.ledger, Stage::Combine, self.caps.name))?;
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
        let fault = self
            .buffers
            .ready
            .wait_all(&*self.heap, round, self.transport.deadline(), |_, _| {})
            .map_err(|e| e.into_round(&mut self.ledger, Stage::Combine, self.caps.name))?;
        if let Some((rank, fault)) = fault {
            return Err(self.ledger.fail_finalize(routing, rank, fault));
        }
        // The peers have all they need of this rank, so an output that does not fit is this rank's affair alone.
        let combined = check_output(&self.config, routing.num_tokens(), &out)
            .map_err(Into::into)
            .and_then(|()| self.combine(&routing, &mut out).map_err(fused_moe_core::Source::from))
            .map_err(|why| self.contract(Stage::Combine, why));
        self.ledger.close(routing);
        combined
    }
}

impl PrepareAndFinalizeModular for IntraNode {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.settle(cx)?;
        let (sent, mut fault) = self.ledger.open(&self.config, &input)?;
        let round = sent.round();
        // This rank has seen every dispatch status of the round before, and posts its own of this one below.
        let rearmed = self.buffers.cursor.rearm(&*self.heap, round);
        let activations = Activations::of(input.hidden).scaled(input.input_scale);
        if fault.is_none()
            && let Err(error) = self.dispatch(activations, sent.routing(), round)
        {
            fault = Some(Fault::BadTensor);
            self.ledger.explain(error);
        }
        let announced = rearmed.and_then(|()| self.announce(round, fault));
        let backend = self.caps.name;
        announced.map_err(|e| e.into_round(&mut self.ledger, Stage::QuantizeDispatch, backend))?;
        Ok(sent)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        let routed = self.ledger.receive_prepare(sent)?;
        let mut total = 0;
        let deadline = self.transport.deadline();
        let fault = self
            .buffers
            .dispatched
            .wait_all(&*self.heap, routed.round(), deadline, |_, status| total += status.count)
            .map_err(|e| e.into_round(&mut self.ledger, Stage::QuantizeDispatch, self.caps.name))?;
        if let Some((rank, fault)) = fault {
            return Err(self.ledger.fail_prepare(routed, rank, fault));
        }
        self.received = [total as i32];
        let this = &*self;
        let views = this.received_views().map_err(|e| this.contract(Stage::QuantizeDispatch, e))?;
        Ok((views, routed))
    }
}

impl Drop for IntraNode {
    /// Tells the peers of a round whose ticket was dropped that nothing will come, now and not at their deadline.
    /// Does not wait for them: the memory lives as long as any rank holds it.
    fn drop(&mut self) {
        let round = self.ledger.round();
        if let Some(Outstanding::PrepareSent(_) | Outstanding::Dispatched(_)) = self.ledger.outstanding() {
            // A peer that cannot be told is one that is gone.
            let _ = self.buffers.ready.post_all(&*self.heap, round, Status::failed(Fault::Abandoned));
        }
    }
}
