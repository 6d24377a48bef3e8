//! An all-gather of tokens, and an all-gather of partial sums, by the collectives of the transport.

use std::sync::Arc;

use ep_transport::{Transport, transport_of};
use fused_moe_core::{
    Arrived, DType, Dispatched, DispatchedMonolithic, Error, ExecCx, ExpertOut, Fault, KernelKind, MoeConfig,
    MonolithicInput, Plan, PrepareAndFinalize, PrepareAndFinalizeModular, PrepareAndFinalizeMonolithic,
    PrepareCaps, PrepareFinalize, PrepareFinalizeProvider, PrepareInput, ProcessGroup, Rank, Result, Routed,
    RouterWeight, Routing, Sent, Source, Stage, Support, TensorView, TensorViewMut, TicketLedger, TopK,
    WireBytes, phase,
};
use half::bf16;
use quant::{Activations, Quantizer};

use super::compute::store;
use super::experts::{refusals, wires};
use super::message::{self, Gathered};
use super::received::Received;

const NAME: &str = "reference_comm";

/// Makes the prepare/finalize backend `reference_comm`: every rank gets all tokens of all ranks, and afterwards
/// all partial sums; every wire format of the scheme; modular and monolithic.
///
/// It moves rows by [`Transport::all_gather`], which is not made for rounds: simple, slow, and not counted as
/// traffic.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceComm;

fn caps(config: &MoeConfig, kind: KernelKind) -> PrepareCaps {
    let max_rows = config.ep_size() * config.max_tokens_per_rank;
    let mut caps = PrepareCaps::host(NAME, kind, wires(config), max_rows);
    caps.weight_on_input = kind == KernelKind::Modular;
    caps
}

impl PrepareFinalizeProvider for ReferenceComm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        Support::unless(refusals(config), caps(config, kind))
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        Received::new(config, plan).bytes()
    }

    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        let (ranks, wire) = (config.ep_size(), plan.wire());
        let routing = match plan.kind() {
            KernelKind::Modular => config.top_k * 8,
            KernelKind::Monolithic => config.num_experts() * 4,
        };
        let row = wire.payload_bytes(config.hidden) + wire.scale_bytes(config.hidden) + routing;
        let output = config.hidden * config.in_dtype.size_bytes();
        let (dispatch, combine) = (row * (ranks - 1), output * ranks * (ranks - 1));
        WireBytes { dispatch: dispatch as f64, combine: combine as f64 }
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let transport = transport_of(group);
        if transport.is_none() && config.ep_size() > 1 {
            let why = "the process group has no ep-transport underneath";
            return Err(Error::contract(Stage::QuantizeDispatch, NAME, why));
        }
        Ok(ReferenceHandle::new(config, plan, (group.rank(), transport)).boxed(plan.kind()))
    }
}

/// Whose ids say which ranks a combine takes partial sums from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CombineIds {
    /// This rank's own, as they were before dispatch.
    Own,
    /// Those of the received rows: the bug of mori #475. Only a saboteur does this.
    Received,
}

/// One rank's end.
pub(crate) struct ReferenceHandle {
    caps: PrepareCaps,
    config: MoeConfig,
    router_weight: RouterWeight,
    quantizer: Option<Quantizer>,
    rank: Rank,
    transport: Option<Arc<dyn Transport>>,
    ledger: TicketLedger,
    outgoing: Vec<u8>,
    received: Received,
    /// First received row and number of rows of each rank.
    sources: Vec<(Rank, usize, usize)>,
    combine_ids: CombineIds,
    /// Whether the sum over ranks is rounded to bf16 after every rank: only a saboteur's is.
    narrow_sum: bool,
}

impl ReferenceHandle {
    pub(crate) fn new(
        config: &MoeConfig,
        plan: &Plan,
        (rank, transport): (Rank, Option<Arc<dyn Transport>>),
    ) -> Self {
        let wire = plan.wire();
        let quantizer = Quantizer::for_dispatch(wire, config.quant).ok();
        let mut caps = caps(config, plan.kind());
        caps.name = plan.comm();
        Self {
            caps,
            config: config.clone(),
            router_weight: plan.router_weight(),
            quantizer,
            rank,
            transport,
            ledger: TicketLedger::new(NAME, rank, config),
            outgoing: Vec::new(),
            received: Received::new(config, plan),
            sources: Vec::new(),
            combine_ids: CombineIds::Own,
            narrow_sum: false,
        }
    }

    pub(crate) fn combining_by(mut self, ids: CombineIds) -> Self {
        self.combine_ids = ids;
        self
    }

    pub(crate) fn summing_in_bf16(mut self) -> Self {
        self.narrow_sum = true;
        self
    }

    pub(crate) fn boxed(self, kind: KernelKind) -> PrepareFinalize {
        match kind {
            KernelKind::Modular => PrepareFinalize::Modular(Box::new(self)),
            KernelKind::Monolithic => PrepareFinalize::Monolithic(Box::new(self)),
        }
    }

    /// Writes this rank's message of the dispatch: `tail` appends what follows the rows and their scales.
    fn write_dispatch(
        &mut self,
        activations: Activations<'_>,
        (fault, routing): (Option<Fault>, &Routing),
        tail: impl FnOnce(&mut Vec<u8>) -> Result<(), Source>,
    ) {
        let written = match fault {
            Some(_) => Ok(()),
            None => self.write_rows(activations, routing).and_then(|()| tail(&mut self.outgoing)),
        };
        let fault = fault.or(written.err().map(|why| {
            self.ledger.explain(why);
            Fault::BadTensor
        }));
        if fault.is_some() {
            message::begin(&mut self.outgoing, fault, 0);
        }
    }

    fn write_rows(&mut self, activations: Activations<'_>, routing: &Routing) -> Result<(), Source> {
        let quantizer = self.quantizer.ok_or("no quantiser for the wire format of the plan")?;
        let mut activations = activations;
        if self.router_weight == RouterWeight::OnInputByPrepare {
            activations = activations.weighted(routing.weights());
        }
        let rows = quantizer.prepare(activations)?;
        let (count, (payload, scales)) = (rows.tokens(), rows.bytes_per_row());
        message::begin(&mut self.outgoing, None, count);
        let start = self.outgoing.len();
        self.outgoing.resize(start + count * (payload + scales), 0);
        let (payloads, scale_bytes) = self.outgoing[start..].split_at_mut(count * payload);
        for row in 0..count {
            let (at, scales_at) = (row * payload, row * scales);
            rows.row(row, &mut payloads[at..at + payload], &mut scale_bytes[scales_at..scales_at + scales])?;
        }
        Ok(())
    }

    fn gather(&mut self, stage: Stage) -> Result<Gathered> {
        let Some(transport) = &self.transport else {
            return Ok(Gathered { messages: vec![(self.rank, self.outgoing.clone())] });
        };
        let gathered = transport.all_gather(&self.outgoing, transport.deadline());
        let messages = gathered.map_err(|e| e.into_round(&mut self.ledger, stage, NAME))?;
        Ok(Gathered { messages: (0..).map(Rank).zip(messages).collect() })
    }

    fn receive(&mut self, sent: Sent<'_, phase::Prepare>) -> Result<Routed> {
        let routed = self.ledger.receive_prepare(sent)?;
        let gathered = self.gather(Stage::QuantizeDispatch)?;
        if let Some((rank, fault)) = gathered.fault() {
            return Err(self.ledger.fail_prepare(routed, rank, fault));
        }
        let mut first = 0;
        self.sources.clear();
        for (rank, count, _) in gathered.parts() {
            self.sources.push((rank, first, count));
            first += count;
        }
        self.received.fill(&gathered);
        Ok(routed)
    }

    /// The received rows of a modular round.
    pub(crate) fn dispatched(&self) -> Dispatched<'_> {
        let received = &self.received;
        let topk = TopK {
            ids: received.view(&received.ids, DType::I32, received.dims.top_k),
            weights: received.view(&received.weights, DType::F32, received.dims.top_k),
        };
        let arrived = Arrived::Standard { topk, rows: received.rows() };
        Dispatched { hidden: received.hidden(), scale: received.scale(), arrived, output: None }
    }

    fn send_partial<'a>(&mut self, routed: Routed, out: ExpertOut<'a>) -> Result<Sent<'a, phase::Finalize>> {
        let sent = self.ledger.send_finalize(routed)?;
        let rows = self.received.count[0].max(0) as usize;
        message::begin(&mut self.outgoing, None, rows);
        let fault = match out {
            ExpertOut::Failed(fault) => Some(fault),
            ExpertOut::InPlace => {
                self.ledger.explain("no buffer was lent for the experts' output");
                Some(Fault::BadTensor)
            }
            ExpertOut::Lent(view) if view.dtype() == DType::Bf16 => {
                let bytes = (0..rows).try_for_each(|row| {
                    self.outgoing.extend_from_slice(view.row_bytes(row)?);
                    Ok(())
                });
                bytes.err().map(|why: fused_moe_core::ViewError| {
                    self.ledger.explain(why);
                    Fault::BadTensor
                })
            }
            ExpertOut::Lent(view) => {
                self.ledger.explain(format!("the experts' output is of {}, not bf16", view.dtype()));
                Some(Fault::BadTensor)
            }
        };
        if fault.is_some() {
            message::begin(&mut self.outgoing, fault, 0);
        }
        Ok(sent)
    }

    fn receive_sums(&mut self, sent: Sent<'_, phase::Finalize>, mut out: TensorViewMut<'_>) -> Result<()> {
        let routing = self.ledger.receive_finalize(sent)?;
        let gathered = self.gather(Stage::Combine)?;
        if let Some((rank, fault)) = gathered.fault() {
            return Err(self.ledger.fail_finalize(routing, rank, fault));
        }
        let summed = self.sum(&gathered, &routing, &mut out);
        self.ledger.close(routing);
        summed.map_err(|why| Error::contract(Stage::Combine, NAME, why))
    }

    /// Sums the partial rows of the ranks that hold an expert of a token, in rank order, in f32.
    fn sum(&self, gathered: &Gathered, routing: &Routing, out: &mut TensorViewMut<'_>) -> Result<(), Source> {
        let hidden = self.config.hidden;
        let own = self.sources.iter().find(|(rank, _, _)| *rank == self.rank);
        let first = own.map_or(0, |&(_, first, _)| first);
        let top_k = routing.top_k();
        let mut sums = vec![0f32; hidden];
        for token in 0..routing.num_tokens() {
            let ids = match self.combine_ids {
                CombineIds::Own => routing.ids_of(token),
                CombineIds::Received => &self.received.ids[token * top_k..][..top_k],
            };
            let holds = |rank| ids.iter().any(|&id| self.config.placement.rank_of_slot(id) == Some(rank));
            sums.fill(0.0);
            for (rank, _, bytes) in gathered.parts() {
                // A monolithic round has no ids: every rank may hold an expert of the token.
                if top_k == 0 || holds(rank) {
                    let row = bytes.get((first + token) * hidden * 2..).unwrap_or_default();
                    let (elements, _) = row.as_chunks::<2>();
                    let elements = elements.iter().map(|&e| bf16::from_ne_bytes(e).to_f32());
                    sums.iter_mut().zip(elements).for_each(|(sum, x)| *sum += x);
                    if self.narrow_sum {
                        sums.iter_mut().for_each(|sum| *sum = bf16::from_f32(*sum).to_f32());
                    }
                }
            }
            store(out, token, &sums)?;
        }
        Ok(())
    }
}

/// Appends the rows of `view` to `message`.
fn append(message: &mut Vec<u8>, view: TensorView<'_>) -> Result<(), Source> {
    (0..view.dims()[0]).try_for_each(|row| {
        message.extend_from_slice(view.row_bytes(row)?);
        Ok(())
    })
}

impl PrepareAndFinalize for ReferenceHandle {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        self.received.bytes()
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
        self.send_partial(routed, out)
    }

    fn finalize_recv(
        &mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.receive_sums(sent, out)
    }
}

impl PrepareAndFinalizeModular for ReferenceHandle {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        PrepareAndFinalizeModular::settle(self, cx)?;
        let (sent, fault) = self.ledger.open(&self.config, &input)?;
        let ones = self.router_weight == RouterWeight::OnInputByPrepare;
        let activations = Activations::of(input.hidden).scaled(input.input_scale);
        self.write_dispatch(activations, (fault, sent.routing()), |message| {
            append(message, input.topk.ids)?;
            match ones {
                true => (0..sent.routing().num_tokens()).for_each(|_| message.extend(1f32.to_le_bytes())),
                false => append(message, input.topk.weights)?,
            }
            Ok(())
        });
        Ok(sent)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        let routed = self.receive(sent)?;
        Ok((self.dispatched(), routed))
    }
}

impl PrepareAndFinalizeMonolithic for ReferenceHandle {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: MonolithicInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        PrepareAndFinalizeMonolithic::settle(self, cx)?;
        let (sent, fault) = self.ledger.open_monolithic(&self.config, &input)?;
        let activations = Activations::of(input.hidden).scaled(input.input_scale);
        self.write_dispatch(activations, (fault, sent.routing()), |message| append(message, input.logits));
        Ok(sent)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(DispatchedMonolithic<'p>, Routed)> {
        let routed = self.receive(sent)?;
        let received = &self.received;
        let dispatched = DispatchedMonolithic {
            hidden: received.hidden(),
            scale: received.scale(),
            logits: received.view(&received.logits, DType::F32, received.dims.experts),
            rows: received.rows(),
            output: None,
        };
        Ok((dispatched, routed))
    }
}
