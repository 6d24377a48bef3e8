//! One rank, batched format: every expert's tokens side by side, weighted and reduced in combine.

use fused_moe_core::{
    ActivationFormat, Arrived, Axis, CombineKind, DType, Dispatched, Error, ExecCx, ExpertMap, ExpertOut,
    Fault, KernelKind, MoeConfig, NaiveBatched, Plan, PrepareAndFinalize, PrepareAndFinalizeModular,
    PrepareCaps, PrepareFinalize, PrepareFinalizeProvider, PrepareInput, ProcessGroup, Rank, ReduceInput,
    Result, Routed, Routing, Sent, Source, Stage, Support, TensorView, TensorViewMut, TicketLedger,
    TokensPerExpert, TopK, TopKWeightAndReduce, Unsupported, WireBytes, phase,
};
use half::bf16;
use quant::{Activations, Quantizer};

use super::compute::store;
use super::experts::{refusals, wires};

const NAME: &str = "reference_batched_comm";

/// Makes the prepare/finalize backend `reference_batched_comm`: one rank, `[local_experts, max_tokens, hidden]`,
/// a combine that weights and reduces.
#[derive(Clone, Copy, Debug, Default)]
pub struct BatchedComm;

fn caps(config: &MoeConfig) -> PrepareCaps {
    let max_rows = config.max_tokens_per_rank;
    let mut caps = PrepareCaps::host(NAME, KernelKind::Modular, wires(config), max_rows);
    caps.format = ActivationFormat::BatchedExperts;
    caps.combine = CombineKind::WeightAndReduce;
    caps
}

impl PrepareFinalizeProvider for BatchedComm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        let mut why = refusals(config);
        if config.ep_size() != 1 {
            let wanted = format!("{} ranks", config.ep_size());
            why.push(Unsupported::new(Axis::Parallel, wanted, "1 rank"));
        }
        if kind != KernelKind::Modular {
            why.push(Unsupported::new(Axis::KernelKind, kind.name(), KernelKind::Modular.name()));
        }
        Support::unless(why, caps(config))
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        let rows = config.num_experts() * plan.max_rows();
        let wire = plan.wire();
        rows * (wire.payload_bytes(config.hidden) + wire.scale_bytes(config.hidden))
            + config.num_experts() * 4
    }

    fn wire_bytes_per_token(&self, _config: &MoeConfig, _plan: &Plan) -> WireBytes {
        WireBytes { dispatch: 0.0, combine: 0.0 }
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, _group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let contract = |why: Source| Error::contract(Stage::QuantizeDispatch, NAME, why);
        let wire = plan.wire();
        let quantizer = Quantizer::for_dispatch(wire, config.quant).map_err(|e| contract(e.into()))?;
        let rows = config.num_experts() * plan.max_rows();
        let quantised = wire.scale.is_some();
        Ok(PrepareFinalize::Modular(Box::new(BatchedHandle {
            caps: caps(config),
            experts: ExpertMap::new(&config.placement, Rank(0)),
            ledger: TicketLedger::new(NAME, Rank(0), config),
            quantizer,
            bf16_rows: vec![bf16::ZERO; if quantised { 0 } else { rows * config.hidden }],
            codes: vec![0; if quantised { rows * config.hidden } else { 0 }],
            scales: vec![0.0; rows * wire.scales_per_token(config.hidden)],
            counts: vec![0; config.num_experts()],
            fault: None,
            sum: Vec::new(),
            payload_dtype: wire.payload,
            config: config.clone(),
        })))
    }
}

struct BatchedHandle {
    caps: PrepareCaps,
    config: MoeConfig,
    experts: ExpertMap,
    ledger: TicketLedger,
    quantizer: Quantizer,
    payload_dtype: DType,
    bf16_rows: Vec<bf16>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    counts: Vec<i32>,
    /// Why this round failed, in either half.
    fault: Option<Fault>,
    /// `[tokens, hidden]`, reduced by `finalize_send`.
    sum: Vec<f32>,
}

impl BatchedHandle {
    /// Writes every (token, expert) row to its place.
    fn scatter(&mut self, activations: Activations<'_>, routing: &Routing) -> Result<(), Source> {
        self.bf16_rows.fill(bf16::NAN);
        self.codes.fill(0xff);
        self.scales.fill(f32::NAN);
        self.counts.fill(0);
        let rows = self.quantizer.prepare(activations)?;
        let (payload_bytes, scale_bytes) = rows.bytes_per_row();
        let (mut payload, mut scales) = (vec![0; payload_bytes], vec![0; scale_bytes]);
        let (width, per_row) = (self.config.hidden, scale_bytes / 4);
        for token in 0..routing.num_tokens() {
            rows.row(token, &mut payload, &mut scales)?;
            for &id in routing.ids_of(token) {
                let Some(expert) = self.experts.local(id) else { continue };
                let count = &mut self.counts[expert.0 as usize];
                let at = expert.0 as usize * self.caps.max_rows + *count as usize;
                *count += 1;
                if self.codes.is_empty() {
                    let (elements, _) = payload.as_chunks::<2>();
                    let row = self.bf16_rows[at * width..].iter_mut().zip(elements);
                    row.for_each(|(to, &bytes)| *to = bf16::from_ne_bytes(bytes));
                } else {
                    self.codes[at * width..][..width].copy_from_slice(&payload);
                }
                let (elements, _) = scales.as_chunks::<4>();
                let row = self.scales[at * per_row..].iter_mut().zip(elements);
                row.for_each(|(to, &bytes)| *to = f32::from_ne_bytes(bytes));
            }
        }
        Ok(())
    }

    fn reduce(&mut self, expert_out: TensorView<'_>, routing: &Routing) -> Result<(), Source> {
        let (tokens, hidden) = (routing.num_tokens(), self.config.hidden);
        self.sum.resize(tokens * hidden, 0.0);
        let dims = [tokens, routing.top_k()];
        let topk = TopK {
            ids: TensorView::from_slice(routing.ids(), DType::I32, &dims)?,
            weights: TensorView::from_slice(routing.weights(), DType::F32, &dims)?,
        };
        let input =
            ReduceInput { expert_out, topk, num_rows: tokens, experts: &self.experts, weighted: false };
        let out = TensorViewMut::from_slice(&mut self.sum, DType::F32, &[tokens, hidden])?;
        TopKWeightAndReduce::from(NaiveBatched).reduce(input, out)?;
        Ok(())
    }
}

impl PrepareAndFinalize for BatchedHandle {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        size_of_val(self.bf16_rows.as_slice())
            + self.codes.len()
            + size_of_val(self.scales.as_slice())
            + size_of_val(self.counts.as_slice())
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
        self.fault = match out {
            ExpertOut::Lent(view) => self.reduce(view, sent.routing()).err().map(|why| {
                self.ledger.explain(why);
                Fault::BadTensor
            }),
            ExpertOut::Failed(fault) => Some(fault),
            ExpertOut::InPlace => {
                self.ledger.explain("no buffer was lent for the experts' output");
                Some(Fault::BadTensor)
            }
        };
        Ok(sent)
    }

    fn finalize_recv(
        &mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let routing = self.ledger.receive_finalize(sent)?;
        if let Some(fault) = self.fault {
            return Err(self.ledger.fail_finalize(routing, Rank(0), fault));
        }
        let mut rows = self.sum.chunks_exact(self.config.hidden).take(routing.num_tokens()).enumerate();
        let stored = rows.try_for_each(|(row, sums)| store(&mut out, row, sums));
        self.ledger.close(routing);
        stored.map_err(|why| Error::contract(Stage::Combine, NAME, why))
    }
}

impl PrepareAndFinalizeModular for BatchedHandle {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.settle(cx)?;
        let (sent, fault) = self.ledger.open(&self.config, &input)?;
        self.fault = fault;
        if fault.is_none()
            && let Err(why) =
                self.scatter(Activations::of(input.hidden).scaled(input.input_scale), sent.routing())
        {
            self.ledger.explain(why);
            self.fault = Some(Fault::BadTensor);
        }
        Ok(sent)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        const FITS: &str = "the vector was made for these dimensions";
        let routed = self.ledger.receive_prepare(sent)?;
        if let Some(fault) = self.fault {
            return Err(self.ledger.fail_prepare(routed, Rank(0), fault));
        }
        let (experts, max_rows) = (self.counts.len(), self.caps.max_rows);
        let dims = [experts, max_rows, self.config.hidden];
        let hidden = match self.codes.is_empty() {
            true => TensorView::from_slice(&self.bf16_rows, DType::Bf16, &dims),
            false => TensorView::from_slice(&self.codes, self.payload_dtype, &dims),
        };
        let per_row = self.scales.len() / (experts * max_rows);
        let scale = (per_row > 0).then(|| {
            TensorView::from_slice(&self.scales, DType::F32, &[experts, max_rows, per_row]).expect(FITS)
        });
        let counts = TensorView::from_slice(&self.counts, DType::I32, &[experts]).expect(FITS);
        let arrived = Arrived::Batched { tokens: TokensPerExpert(counts) };
        Ok((Dispatched { hidden: hidden.expect(FITS), scale, arrived, output: None }, routed))
    }
}
