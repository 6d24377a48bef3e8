//! A handle: the four phases, the same for all kernels.
//!
//! A round has two exchanges of statuses among all ranks, one behind the sends of the dispatch and one behind the
//! experts; with several nodes there is a third behind the forwarding. Every rank waits for every other in each, so all
//! return the same fault, and whoever waits for a lost rank waits for that very rank and can name it.

use std::sync::Arc;

use ep_transport::{Heap, Status, StatusBoard, Transport, TransportError};
use fused_moe_core::{
    DType, Dispatched, Error, ExecCx, ExpertOut, Fault, MoeConfig, Outstanding, Plan, PrepareAndFinalize,
    PrepareAndFinalizeModular, PrepareCaps, PrepareInput, Rank, Result, Routed, RouterWeight, Routing, Sent,
    Source, Stage, TensorViewMut, TicketLedger, check_output, phase,
};
use quant::{Activations, Quantizer};

use crate::buffers::Buffers;
use crate::kernel::{Hops, InterNode, IntraNode, Kernel, Token};
use crate::kernel_type::KernelType;
use crate::node::{Node, RowOn};
use crate::nodes::{Destinations, Nodes};
use crate::rails::Rails;
use crate::record::{Fields, copy_bytes};
use crate::sum::OutputRow;

/// One rank's end of a dispatch/combine pair.
pub(crate) struct Handle {
    caps: PrepareCaps,
    config: MoeConfig,
    weight_on_input: bool,
    quantizer: Quantizer,
    ledger: TicketLedger,
    buffers: Buffers,
    destinations: Destinations,
    node: Node,
    kernel: Kernel,
    fields: Fields<usize>,
    /// One token on its way out; its payload only if that is made for the way.
    record: Vec<u8>,
    /// `[max_tokens, top_k]`: where this rank's tokens lie on this node.
    rows: Vec<RowOn>,
    ones: Vec<f32>,
    received: [i32; 1],
    heap: Arc<dyn Heap>,
    transport: Arc<dyn Transport>,
}

impl Handle {
    pub fn new(
        kernel: KernelType,
        caps: PrepareCaps,
        (config, plan): (&MoeConfig, &Plan),
        transport: Arc<dyn Transport>,
    ) -> Result<Self> {
        let backend = caps.name;
        let failed = |error: TransportError| error.into_core(Stage::QuantizeDispatch, backend, 0);
        let quantizer = Quantizer::for_dispatch(plan.wire(), config.quant)
            .map_err(|e| Error::contract(Stage::QuantizeDispatch, backend, e))?;
        let buffers = Buffers::new(config, plan);
        let heap = transport.allocate(buffers.layout().size(), transport.deadline()).map_err(failed)?;
        let nodes = Nodes::new(config, transport.rank());
        let rails = |rails| Rails::new((config, plan), nodes, rails, Arc::clone(&heap));
        let kernel = match (kernel, buffers.rails.map(rails)) {
            (KernelType::InterNodeV1, Some(rails)) => Kernel::InterNodeV1(InterNode::new(nodes, rails)),
            (KernelType::InterNodeV1LL, Some(rails)) => Kernel::InterNodeV1LL(InterNode::new(nodes, rails)),
            _ => Kernel::IntraNode(IntraNode),
        };
        let fields = Fields::of_plan(config, plan);
        Ok(Self {
            ledger: TicketLedger::new(backend, transport.rank(), config),
            weight_on_input: plan.router_weight() == RouterWeight::OnInputByPrepare,
            destinations: Destinations::new(config, nodes),
            node: Node::new((config, plan), nodes, &buffers, Arc::clone(&heap))?,
            record: vec![0; fields.record_bytes()],
            rows: vec![RowOn::NOWHERE; config.max_tokens_per_rank * config.top_k],
            ones: vec![1.0; config.top_k],
            received: [0],
            config: config.clone(),
            caps,
            quantizer,
            buffers,
            kernel,
            fields,
            heap,
            transport,
        })
    }

    /// Bytes of this rank's own bookkeeping.
    pub fn local_bytes(config: &MoeConfig, plan: &Plan) -> usize {
        let rows = config.max_tokens_per_rank * config.top_k * size_of::<RowOn>();
        let ones = config.top_k * size_of::<f32>();
        let rails = if config.is_single_node() { 0 } else { Rails::local_bytes(config, plan) };
        rows + ones + Fields::of_plan(config, plan).record_bytes() + Node::local_bytes(config, plan) + rails
    }

    fn contract(&self, stage: Stage, why: impl Into<Source>) -> Error {
        Error::contract(stage, self.caps.name, why)
    }

    /// Ends the round, and the handle if a peer is lost.
    fn broken(&mut self, error: TransportError, stage: Stage) -> Error {
        error.into_round(&mut self.ledger, stage, self.caps.name)
    }

    /// Quantises this rank's tokens and sends each to every rank of this node that holds one of its experts, and to
    /// the nodes of the others.
    fn dispatch(
        &mut self,
        activations: Activations<'_>,
        routing: &Routing,
        round: u64,
    ) -> Result<(), Source> {
        let top_k = self.config.top_k;
        let slots = |token: usize| token * top_k..(token + 1) * top_k;
        for token in 0..routing.num_tokens() {
            self.node.find(&self.destinations, routing.ids_of(token), &mut self.rows[slots(token)]);
        }
        self.node.reserve(round)?;
        let mut activations = activations;
        if self.weight_on_input {
            activations = activations.weighted(routing.weights());
        }
        let prepared = self.quantizer.prepare(activations)?;
        let first = self.transport.rank().0 * self.config.max_tokens_per_rank as u32;
        for index in 0..routing.num_tokens() {
            let ids = routing.ids_of(index);
            if !ids.iter().any(|&id| self.config.placement.rank_of_slot(id).is_some())
                && !self.kernel.whole_windows()
            {
                continue;
            }
            let weights = if self.weight_on_input { &self.ones } else { &routing.weights()[slots(index)] };
            let fields = self.fields.split_mut(&mut self.record);
            let unchanged = prepared.unchanged(index)?;
            if unchanged.is_none() {
                prepared.row(index, fields.payload, fields.scales)?;
            }
            copy_bytes(fields.ids, ids, i32::to_ne_bytes);
            copy_bytes(fields.weights, weights, f32::to_ne_bytes);
            copy_bytes(fields.source, &[first + index as u32], u32::to_ne_bytes);
            let mut fields = self.fields.split(&self.record);
            fields.payload = unchanged.unwrap_or(fields.payload);
            self.kernel.send(&self.destinations, Token { index, ids, fields }, round)?;
            self.node.write(fields, &mut self.rows[slots(index)]);
        }
        Ok(())
    }

    /// Tells every rank how this rank's part of a step went, and how many rows it has written there since the last
    /// time. This rank comes last: the others start early, and not all with the same one.
    fn announce(&mut self, board: StatusBoard, round: u64, fault: Option<Fault>) -> ep_transport::Result<()> {
        let (me, ranks) = (self.transport.rank().index(), self.config.ep_size());
        let mut told = Ok(());
        for distance in 1..=ranks {
            let to = Rank(((me + distance) % ranks) as u32);
            let status = match fault {
                Some(fault) => Status::failed(fault),
                None => Status::done(self.node.fresh(to)),
            };
            told = told.and(board.post(&*self.heap, to, round, status));
        }
        self.node.announced();
        told
    }

    /// Forwards what other nodes have sent, whatever else has happened in the round, and waits until all that comes to
    /// this rank is here. Returns the first fault, if there is one.
    fn receive(&mut self, round: u64) -> ep_transport::Result<Option<(Rank, Fault)>> {
        let deadline = self.transport.deadline();
        self.kernel.forward(&mut self.node, &self.destinations, round, deadline)?;
        let forwarded = self.kernel.forwarded();
        if let Some(board) = forwarded {
            self.announce(board, round, self.node.overflow())?;
        }
        let mut total = 0;
        let mut first: Option<(Rank, Fault)> = None;
        for board in [Some(self.buffers.dispatched), forwarded].into_iter().flatten() {
            let fault = board.wait_all(&*self.heap, round, deadline, |_, status| total += status.count)?;
            first = match (first, fault) {
                (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
                (a, b) => a.or(b),
            };
        }
        self.received = [total as i32];
        Ok(first)
    }

    /// Waits for the experts of all ranks, sends back what this node computed for others, and waits for what they
    /// computed. Returns the first fault, if there is one.
    fn collect(&mut self, round: u64) -> ep_transport::Result<Option<(Rank, Fault)>> {
        let (board, deadline) = (self.buffers.ready, self.transport.deadline());
        // Those of this node first: others wait for what is made of their outputs.
        let mut failed = false;
        for rank in self.nodes().peers() {
            failed |= board.wait(&*self.heap, rank, round, deadline)?.fault.is_some();
        }
        if !failed {
            self.kernel.give_back(&mut self.node, round)?;
        }
        let fault = board.wait_all(&*self.heap, round, deadline, |_, _| {})?;
        if fault.is_none() {
            self.kernel.collect(round, deadline)?;
        }
        Ok(fault)
    }

    fn nodes(&self) -> Nodes {
        Nodes::new(&self.config, self.transport.rank())
    }

    /// Sums the outputs of this rank's own tokens and rounds each sum to the output's type.
    fn sum(&mut self, routing: &Routing, out: &mut TensorViewMut<'_>) -> Result<(), Source> {
        let top_k = self.config.top_k;
        for token in 0..routing.num_tokens() {
            let rows = &self.rows[token * top_k..][..top_k];
            let out = match out.dtype() {
                DType::F32 => OutputRow::F32(out.row_mut(token)?),
                _ => OutputRow::Bf16(out.row_mut(token)?),
            };
            self.kernel.sum(&mut self.node, token, rows, out)?;
        }
        Ok(())
    }
}

impl PrepareAndFinalize for Handle {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        let ones = self.ones.len() * size_of::<f32>();
        let local = self.rows.len() * size_of::<RowOn>() + ones + self.record.len();
        let parts = self.node.allocated_bytes() + self.kernel.allocated_bytes();
        self.heap.size().required_bytes() + local + parts
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
            ExpertOut::Lent(view) => self.node.take_lent(view, self.received[0] as usize).err().map(|why| {
                self.ledger.explain(why);
                Fault::BadTensor
            }),
        };
        if fault.is_none() {
            self.node.publish(self.received[0] as usize);
        }
        let status = fault.map_or(Status::done(0), Status::failed);
        let posted = self.buffers.ready.post_all(&*self.heap, sent.round(), status);
        posted.map_err(|e| self.broken(e, Stage::Combine))?;
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
        let fault = self.collect(round).map_err(|e| self.broken(e, Stage::Combine))?;
        if let Some((rank, fault)) = fault {
            return Err(self.ledger.fail_finalize(routing, rank, fault));
        }
        // The peers have all they need of this rank, so an output that does not fit is this rank's affair alone.
        let combined = check_output(&self.config, routing.num_tokens(), &out)
            .map_err(Into::into)
            .and_then(|()| self.sum(&routing, &mut out))
            .map_err(|why| self.contract(Stage::Combine, why));
        self.node.outputs_read();
        self.ledger.close(routing);
        combined
    }
}

impl PrepareAndFinalizeModular for Handle {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.settle(cx)?;
        let (sent, mut fault) = self.ledger.open(&self.config, &input)?;
        let round = sent.round();
        let begun = self.node.begin(round).and_then(|()| self.kernel.begin(self.transport.deadline()));
        begun.map_err(|e| self.broken(e, Stage::QuantizeDispatch))?;
        let activations = Activations::of(input.hidden).scaled(input.input_scale);
        let mut told = Ok(());
        if fault.is_none()
            && let Err(why) = self.dispatch(activations, sent.routing(), round)
        {
            fault = Some(Fault::BadTensor);
            match why.downcast::<TransportError>() {
                Ok(error) => told = Err(*error),
                Err(why) => self.ledger.explain(why),
            }
        }
        fault = fault.or(self.node.overflow());
        // Whatever has happened, the others are told.
        told = told.and(self.kernel.end(round, fault.is_some()));
        told = self.announce(self.buffers.dispatched, round, fault).and(told);
        told.map_err(|e| self.broken(e, Stage::QuantizeDispatch))?;
        Ok(sent)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        let routed = self.ledger.receive_prepare(sent)?;
        let fault = self.receive(routed.round()).map_err(|e| self.broken(e, Stage::QuantizeDispatch))?;
        if let Some((rank, fault)) = fault {
            return Err(self.ledger.fail_prepare(routed, rank, fault));
        }
        let this = &*self;
        let views = this.node.received(&this.received);
        Ok((views.map_err(|e| this.contract(Stage::QuantizeDispatch, e))?, routed))
    }
}

impl Drop for Handle {
    /// Tells the peers of a round whose ticket was dropped that nothing will come, now and not at their deadline.
    /// Does not wait for them: the memory lives as long as any rank holds it.
    fn drop(&mut self) {
        let round = self.ledger.round();
        let awaited = match self.ledger.outstanding() {
            Some(Outstanding::PrepareSent(_)) => [self.kernel.forwarded(), Some(self.buffers.ready)],
            Some(Outstanding::Dispatched(_)) => [None, Some(self.buffers.ready)],
            _ => [None, None],
        };
        for board in awaited.into_iter().flatten() {
            // A peer that cannot be told is one that is gone.
            let _ = board.post_all(&*self.heap, round, Status::failed(Fault::Abandoned));
        }
    }
}
