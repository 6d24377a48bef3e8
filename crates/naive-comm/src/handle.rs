//! The four phases, written once for every exchange and both kinds of layer.

use ep_transport::{Status, TransportError};
use fused_moe_core::{
    Arrived, DType, Device, Dispatched, DispatchedMonolithic, Error, ExecCx, ExpertOut, Fault, MoeConfig,
    MonolithicInput, Plan, PrepareAndFinalize, PrepareAndFinalizeModular, PrepareAndFinalizeMonolithic,
    PrepareCaps, PrepareInput, Rank, ReceivedRows, Result, Routed, RouterWeight, Routing, Sent, Source,
    Stage, TensorView, TensorViewMut, TicketLedger, TopK, ViewError, phase,
};
use half::bf16;
use quant::{Activations, Quantizer};

use crate::exchange::{Exchange, Outputs, Received};
use crate::row::{COLUMNS, Column, bytes_of, columns};
use crate::sum::Partials;

/// What a handle of either kind consists of.
pub(crate) struct Engine<X: Exchange> {
    caps: PrepareCaps,
    config: MoeConfig,
    columns: [Column; COLUMNS],
    outputs: Column,
    quantizer: Quantizer,
    weight_on_input: bool,
    lends_output: bool,
    ledger: TicketLedger,
    /// Number of gathered rows, as [`ReceivedRows`] hands it out.
    received: [i32; 1],
    /// A fault of this rank since it announced its rows.
    late: Option<Fault>,
    exchange: X,
}

/// Views of what has arrived, before they are named by kind.
struct Batch<'p> {
    columns: [TensorView<'p>; COLUMNS],
    scale: Option<TensorView<'p>>,
    rows: ReceivedRows<'p>,
    output: Option<TensorViewMut<'p>>,
}

impl<X: Exchange> Engine<X> {
    pub(crate) fn new(
        caps: PrepareCaps,
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
        exchange: X,
    ) -> Result<Self> {
        let quantizer = Quantizer::for_dispatch(plan.wire(), config.quant)
            .map_err(|error| Error::contract(Stage::QuantizeDispatch, caps.name, error))?;
        Ok(Self {
            columns: columns(config, plan),
            outputs: Column::outputs(config),
            quantizer,
            weight_on_input: plan.router_weight() == RouterWeight::OnInputByPrepare,
            lends_output: plan.in_place_output(),
            ledger: TicketLedger::new(caps.name, rank, config),
            received: [0],
            late: None,
            exchange,
            config: config.clone(),
            caps,
        })
    }

    /// Ends the round, and the handle if a peer is lost.
    fn broken(&mut self, error: TransportError, stage: Stage) -> Error {
        error.into_round(&mut self.ledger, stage, self.caps.name)
    }

    /// Announces and stages this rank's rows; `route` fills the two columns of routing.
    fn stage_rows<'a>(
        &mut self,
        (sent, fault): (Sent<'a, phase::Prepare>, Option<Fault>),
        rows: Activations<'_>,
        route: impl FnOnce(&Routing, [TensorViewMut<'_>; 2]) -> Result<(), ViewError>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.late = None;
        let own = fault.map_or(Status::done(sent.routing().num_tokens() as u64), Status::failed);
        self.exchange
            .announce(sent.round(), own)
            .map_err(|error| self.broken(error, Stage::QuantizeDispatch))?;
        // The peers already know how many rows will come; a misfit that is found now travels with the next
        // step.
        if fault.is_none()
            && let Err(why) = self.stage(sent.routing(), rows, route)
        {
            self.ledger.explain(why);
            self.late = Some(Fault::BadTensor);
        }
        Ok(sent)
    }

    fn stage(
        &mut self,
        routing: &Routing,
        rows: Activations<'_>,
        route: impl FnOnce(&Routing, [TensorViewMut<'_>; 2]) -> Result<(), ViewError>,
    ) -> Result<(), Source> {
        let [payload, scales, first, second] = self.exchange.staging()?;
        let mut rows = rows;
        if self.weight_on_input {
            // One expert per token, so the weights of the round are one factor per row.
            rows = rows.weighted(routing.weights());
        }
        let rows = self.quantizer.prepare(rows)?;
        let (payload_bytes, scale_bytes) = rows.bytes_per_row();
        for row in 0..rows.tokens() {
            rows.row(
                row,
                &mut payload[row * payload_bytes..][..payload_bytes],
                &mut scales[row * scale_bytes..][..scale_bytes],
            )?;
        }
        let [_, _, first_column, second_column] = self.columns;
        let tokens = routing.num_tokens();
        Ok(route(routing, [first_column.view_mut(first, tokens)?, second_column.view_mut(second, tokens)?])?)
    }

    fn receive_rows(&mut self, sent: Sent<'_, phase::Prepare>) -> Result<(Batch<'_>, Routed)> {
        let routed = self.ledger.receive_prepare(sent)?;
        match self.exchange.gather(routed.round(), self.late) {
            Ok(Ok(rows)) => self.received = [rows as i32],
            Ok(Err((rank, fault))) => return Err(self.ledger.fail_prepare(routed, rank, fault)),
            Err(error) => return Err(self.broken(error, Stage::QuantizeDispatch)),
        }
        let name = self.caps.name;
        let batch = self.batch().map_err(|why| Error::other(Stage::QuantizeDispatch, name, why))?;
        Ok((batch, routed))
    }

    fn batch(&mut self) -> Result<Batch<'_>, Source> {
        let max_rows = self.caps.max_rows;
        let rows = ReceivedRows(TensorView::from_slice(&self.received, DType::I32, &[1])?);
        let Received { columns, output } = self.exchange.received()?;
        let [hidden, scale, first, second] = self.columns;
        let scales = scale.view(columns[1], max_rows)?;
        let output = output.filter(|_| self.lends_output);
        Ok(Batch {
            columns: [
                hidden.view(columns[0], max_rows)?,
                scales,
                first.view(columns[2], max_rows)?,
                second.view(columns[3], max_rows)?,
            ],
            scale: self.quantizer.wire().scale.map(|_| scales),
            rows,
            output: output.map(|bytes| self.outputs.view_mut(bytes, max_rows)).transpose()?,
        })
    }

    fn send_outputs<'a>(&mut self, routed: Routed, out: ExpertOut<'a>) -> Result<Sent<'a, phase::Finalize>> {
        let sent = self.ledger.send_finalize(routed)?;
        let outputs = self.outputs_of(out).unwrap_or_else(|why| {
            self.ledger.explain(why);
            Outputs::Failed(Fault::BadTensor)
        });
        match self.exchange.scatter(sent.round(), outputs) {
            Ok(()) => Ok(sent),
            Err(error) => Err(self.broken(error, Stage::Combine)),
        }
    }

    /// The outputs, if they are what the combine can take: a row for every received one.
    fn outputs_of<'a>(&self, out: ExpertOut<'a>) -> Result<Outputs<'a>, Source> {
        let hidden = self.config.hidden;
        match out {
            ExpertOut::Failed(fault) => Ok(Outputs::Failed(fault)),
            ExpertOut::InPlace if self.lends_output => Ok(Outputs::InPlace),
            ExpertOut::InPlace => Err("the plan lends no buffer for the experts' output".into()),
            ExpertOut::Lent(rows) => match *rows.dims() {
                [lent, width] if width == hidden && lent >= self.received[0] as usize => {
                    Ok(Outputs::Lent(bytes_of(rows.as_slice::<bf16>()?)))
                }
                _ => {
                    let (dims, max_rows) = (rows.dims(), self.caps.max_rows);
                    Err(format!("the experts' output is {dims:?}, needs [{max_rows}, {hidden}]").into())
                }
            },
        }
    }

    fn receive_outputs(&mut self, sent: Sent<'_, phase::Finalize>, out: TensorViewMut<'_>) -> Result<()> {
        let routing = self.ledger.receive_finalize(sent)?;
        match self.exchange.collect(self.ledger.round()) {
            Ok(Ok(partials)) => {
                let written = write_rows(partials, routing.num_tokens(), out);
                self.ledger.close(routing);
                written.map_err(|why| Error::contract(Stage::Combine, self.caps.name, why))
            }
            Ok(Err((rank, fault))) => Err(self.ledger.fail_finalize(routing, rank, fault)),
            Err(error) => Err(self.broken(error, Stage::Combine)),
        }
    }
}

impl<X: Exchange> Drop for Engine<X> {
    /// Peers of an open round learn now, not by their deadline, that this rank will not finish it.
    ///
    /// Nothing is waited for: the drop may be part of a panic, and the peers that it would wait for, too.
    fn drop(&mut self) {
        if let Some(outstanding) = self.ledger.outstanding() {
            // There is nobody to report an error to: the peers fall back to their deadlines.
            let _ = self.exchange.abandon(self.ledger.round(), outstanding);
        }
    }
}

/// Writes the sums of the first `tokens` rows to `out`. A round whose ticket was dropped has none to write.
fn write_rows(partials: Partials<'_>, tokens: usize, mut out: TensorViewMut<'_>) -> Result<(), Source> {
    if tokens == 0 && out.as_view().layout().num_elements() == 0 {
        return Ok(());
    }
    if out.dims() != [tokens, partials.hidden] {
        let (dims, hidden) = (out.dims(), partials.hidden);
        return Err(format!("the output is {dims:?}, needs [{tokens}, {hidden}]").into());
    }
    for row in 0..tokens {
        match out.dtype() {
            DType::F32 => partials.sum_row(row, out.row_mut::<f32>(row)?),
            _ => partials.sum_row(row, out.row_mut::<bf16>(row)?),
        }
    }
    Ok(())
}

fn on_host(device: Device) -> Result<(), ViewError> {
    if device == Device::HOST { Ok(()) } else { Err(ViewError::NotHost { device }) }
}

impl<X: Exchange> PrepareAndFinalize for Engine<X> {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        self.exchange.allocated_bytes()
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
        self.send_outputs(routed, out)
    }

    fn finalize_recv(
        &mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.receive_outputs(sent, out)
    }
}

impl<X: Exchange> PrepareAndFinalizeModular for Engine<X> {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        PrepareAndFinalizeModular::settle(self, cx)?;
        let opened = self.ledger.open(&self.config, &input)?;
        let weighted = self.weight_on_input;
        self.stage_rows(
            opened,
            Activations::of(input.hidden).scaled(input.input_scale),
            |routing, [mut ids, mut weights]| {
                on_host(input.topk.ids.device())?;
                ids.as_mut_slice::<i32>()?.copy_from_slice(routing.ids());
                let weights = weights.as_mut_slice::<f32>()?;
                if weighted {
                    weights.fill(1.0);
                } else {
                    weights.copy_from_slice(routing.weights());
                }
                Ok(())
            },
        )
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        let (Batch { columns: [hidden, _, ids, weights], scale, rows, output }, routed) =
            self.receive_rows(sent)?;
        let arrived = Arrived::Standard { topk: TopK { ids, weights }, rows };
        Ok((Dispatched { hidden, scale, arrived, output }, routed))
    }
}

impl<X: Exchange> PrepareAndFinalizeMonolithic for Engine<X> {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: MonolithicInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        PrepareAndFinalizeMonolithic::settle(self, cx)?;
        let opened = self.ledger.open_monolithic(&self.config, &input)?;
        self.stage_rows(
            opened,
            Activations::of(input.hidden).scaled(input.input_scale),
            |routing, [mut logits, _]| {
                for token in 0..routing.num_tokens() {
                    logits.row_mut::<f32>(token)?.copy_from_slice(input.logits.row(token)?);
                }
                Ok(())
            },
        )
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(DispatchedMonolithic<'p>, Routed)> {
        let (Batch { columns: [hidden, _, logits, _], scale, rows, output }, routed) =
            self.receive_rows(sent)?;
        Ok((DispatchedMonolithic { hidden, scale, logits, rows, output }, routed))
    }
}
