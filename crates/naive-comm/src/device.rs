//! `local` on a device: rows are quantised, or copied, into the handle's buffers on the lent stream.
//!
//! Nothing here waits for the device. A fault is found on the host, from shapes and places alone: values are read by kernels,
//! to which an id that no expert has is none.

use fused_moe_core::{
    Arrived, Axis, CommTraffic, DType, DeviceKind, Dispatched, Error, ExecCx, ExpertOut, Fault, Fp8Format,
    Granularity, KernelKind, MoeConfig, Plan, PrepareAndFinalize, PrepareAndFinalizeModular, PrepareCaps,
    PrepareFinalize, PrepareFinalizeProvider, PrepareInput, ProcessGroup, QuantScheme, Rank, ReceivedRows,
    Result, Routed, ScaleOrder, Sent, Source, Stage, Support, TensorView, TensorViewMut, TicketLedger, TopK,
    Unsupported, WireBytes, WireFormat, Workspace, check_output, phase,
};
use moe_kernels::quantize::{Quantize1x128, QuantizeBuffers, QuantizePerToken};
use moe_kernels::weighted_sum::{SumBuffers, WeightedSum};
use moe_kernels::{Arch, BadLaunch, Float, Gpu, Target};

use crate::Local;

const NAME: &str = "local";
const ONLY: Rank = Rank(0);
/// What the kernels that quantise and cast read at once, in elements.
const LANE: usize = 8;
/// Devices that it was run on.
const ARCHES: [Arch; 1] = [Arch::Sm90a];

/// `local` on one device: one rank, no transport. Rows are quantised (or copied) into the handle's buffer in the device's
/// memory, and the combine casts the experts' output. A call can be captured in a graph.
#[derive(Clone, Debug)]
pub struct DeviceLocal {
    target: Target,
}

impl DeviceLocal {
    /// The backend on `target`. If that is not open, it refuses every configuration with the reason.
    pub fn new(target: impl Into<Target>) -> Self {
        Self { target: target.into() }
    }

    fn reasons(&self, config: &MoeConfig, kind: KernelKind) -> Vec<Unsupported> {
        let mut why = Vec::new();
        let mut no = |axis, wanted: &str, offered: String| why.push(Unsupported::new(axis, wanted, offered));
        if config.device != DeviceKind::Cuda {
            no(Axis::Device, "Cuda", format!("{:?}", config.device));
        }
        if kind != KernelKind::Modular {
            no(Axis::KernelKind, KernelKind::Modular.name(), kind.name().into());
        }
        if config.in_dtype != DType::Bf16 {
            no(Axis::DType, "bf16 hidden states", config.in_dtype.to_string());
        }
        if config.ep_size() != 1 {
            no(Axis::Parallel, "1 rank", format!("{} ranks", config.ep_size()));
        }
        if !config.hidden.is_multiple_of(LANE) {
            no(Axis::Shape, "hidden a multiple of 8", config.hidden.to_string());
        }
        why.extend(self.target.refusal(&ARCHES));
        if why.is_empty()
            && let Err(error) = Kernels::of(config, wires(config)[0]).check(config)
        {
            why.push(Unsupported::new(Axis::Shape, "sizes that the kernels count", error.to_string()));
        }
        why
    }
}

/// What the kernels can write: rows as they are, and those of the schemes of the device's FP8.
fn wires(config: &MoeConfig) -> Vec<WireFormat> {
    let mut wires = Vec::new();
    if let QuantScheme::Fp8Block(Fp8Format::E4M3Fn) | QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn) = config.quant {
        wires.push(config.quant.quantized_wire(config.in_dtype));
    }
    wires.push(WireFormat::unquantized(config.in_dtype));
    wires
}

fn caps(config: &MoeConfig) -> PrepareCaps {
    let mut caps = PrepareCaps::host(NAME, KernelKind::Modular, wires(config), config.max_tokens_per_rank);
    caps.in_place_output = true;
    caps.capturable = true;
    caps.devices = vec![DeviceKind::Cuda];
    caps
}

impl PrepareFinalizeProvider for DeviceLocal {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        Support::unless(self.reasons(config, kind), caps(config))
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        Workspace::rounded(Sizes::new(config, plan.wire()).total())
    }

    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        Local.wire_bytes_per_token(config, plan)
    }

    fn traffic(&self, config: &MoeConfig, wire: &WireFormat) -> Option<CommTraffic> {
        Local.traffic(config, wire)
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let refused = |why: String| Err(Error::contract(Stage::QuantizeDispatch, NAME, why));
        let reasons = self.reasons(config, plan.kind());
        let gpu = match self.target.gpu() {
            Ok(gpu) if reasons.is_empty() => gpu,
            _ => return refused(reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")),
        };
        if plan.comm() != NAME || !wires(config).contains(&plan.wire()) {
            return refused(format!("the plan is for {} with {}", plan.comm(), plan.wire()));
        }
        if group.world_size() != 1 {
            return refused(format!("the group has {} ranks, needs 1", group.world_size()));
        }
        Ok(PrepareFinalize::Modular(Box::new(OnDevice::new(gpu, config, plan)?)))
    }
}

/// Bytes of the pieces of a handle's memory.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    payload: usize,
    scales: usize,
    ids: usize,
    weights: usize,
    output: usize,
    /// Weights of 1 and positions of rows in order, by which the cast "sums" one row each.
    ones: usize,
    order: usize,
}

/// Addresses of the pieces.
#[derive(Clone, Copy, Debug)]
struct Pieces {
    payload: u64,
    scales: u64,
    ids: u64,
    weights: u64,
    output: u64,
    ones: u64,
    order: u64,
}

impl Sizes {
    fn new(config: &MoeConfig, wire: WireFormat) -> Self {
        let (rows, hidden) = (config.max_tokens_per_rank, config.hidden);
        let slots = rows * config.top_k;
        Self {
            payload: rows * wire.payload_bytes(hidden),
            scales: rows * wire.scale_bytes(hidden),
            ids: slots * size_of::<i32>(),
            weights: slots * size_of::<f32>(),
            output: rows * hidden * config.in_dtype.size_bytes(),
            ones: rows * size_of::<f32>(),
            order: rows * size_of::<i32>(),
        }
    }

    fn all(&self) -> [usize; 7] {
        let Self { payload, scales, ids, weights, output, ones, order } = *self;
        [payload, scales, ids, weights, output, ones, order]
    }

    fn total(&self) -> usize {
        self.all().into_iter().map(Workspace::rounded).sum()
    }

    fn pieces(&self, base: u64) -> Pieces {
        let mut end = base;
        let [payload, scales, ids, weights, output, ones, order] = self.all().map(|bytes| {
            let start = end;
            end += Workspace::rounded(bytes) as u64;
            start
        });
        Pieces { payload, scales, ids, weights, output, ones, order }
    }
}

/// What a round launches.
#[derive(Clone, Copy, Debug)]
struct Kernels {
    granularity: Option<Granularity>,
    hidden: usize,
}

impl Kernels {
    fn of(config: &MoeConfig, wire: WireFormat) -> Self {
        Self { granularity: wire.scale.map(|scale| scale.granularity), hidden: config.hidden }
    }

    /// Whether they do the largest round.
    fn check(&self, config: &MoeConfig) -> Result<(), BadLaunch> {
        let (rows, nowhere) =
            (config.max_tokens_per_rank, QuantizeBuffers { input: 0, codes: 0, scales: 0, count: 0 });
        self.group(rows, self.hidden).launch(nowhere)?;
        self.token(rows, self.hidden).launch(nowhere)?;
        let nowhere = SumBuffers { products: 0, positions: 0, weights: 0, out: 0 };
        self.cast(rows).launch(nowhere).map(drop)
    }

    fn group(&self, rows: usize, input_stride: usize) -> Quantize1x128 {
        let format = Arch::Sm90a.fp8();
        Quantize1x128 { rows, hidden: self.hidden, input_stride, scales: ScaleOrder::RowMajor, format }
    }

    fn token(&self, rows: usize, input_stride: usize) -> QuantizePerToken {
        QuantizePerToken { rows, hidden: self.hidden, input_stride, format: Arch::Sm90a.fp8() }
    }

    /// One row each with the weight 1, which is exact.
    fn cast(&self, rows: usize) -> WeightedSum {
        WeightedSum { rows, top_k: 1, hidden: self.hidden, products: Float::Bf16, out: Float::F32 }
    }
}

/// The handle.
#[derive(Debug)]
struct OnDevice {
    gpu: Gpu,
    caps: PrepareCaps,
    config: MoeConfig,
    wire: WireFormat,
    memory: Workspace,
    pieces: Pieces,
    kernels: Kernels,
    ledger: TicketLedger,
    lends_output: bool,
    /// Rows of the round, as [`ReceivedRows`] hands them out.
    received: [i32; 1],
    /// What this rank is at fault for in this round.
    fault: Option<Fault>,
    /// Where the experts' outputs of this round are.
    outputs: u64,
}

impl OnDevice {
    fn new(gpu: &Gpu, config: &MoeConfig, plan: &Plan) -> Result<Self> {
        let failed = |error: Source| Error::other(Stage::QuantizeDispatch, NAME, error);
        let sizes = Sizes::new(config, plan.wire());
        let memory = Workspace::on(gpu.runtime(), sizes.total()).map_err(|error| {
            Error::new(error.kind.clone(), Stage::QuantizeDispatch, NAME).caused_by(error)
        })?;
        let base = memory.tensor(DType::U8, &[0]).map_err(|error| failed(error.into()))?.address();
        let pieces = sizes.pieces(base as u64);
        let mut this = Self {
            gpu: gpu.clone(),
            caps: caps(config),
            wire: plan.wire(),
            kernels: Kernels::of(config, plan.wire()),
            ledger: TicketLedger::new(NAME, ONLY, config),
            lends_output: plan.in_place_output(),
            received: [0],
            fault: None,
            outputs: pieces.output,
            config: config.clone(),
            memory,
            pieces,
        };
        this.write_constants().map_err(|error| failed(error.into()))?;
        Ok(this)
    }

    /// Writes what never changes: by way of an upload, since a handle is built outside of calls.
    fn write_constants(&mut self) -> Result<(), device_runtime::DeviceError> {
        let rows = self.config.max_tokens_per_rank;
        let runtime = self.gpu.runtime();
        let stream = runtime.stream()?;
        let ones: Vec<u8> = std::iter::repeat_n(1f32.to_ne_bytes(), rows).flatten().collect();
        let order: Vec<u8> = (0..rows as i32).flat_map(i32::to_ne_bytes).collect();
        for (to, bytes) in [(self.pieces.ones, ones), (self.pieces.order, order)] {
            let mut upload = runtime.alloc(bytes.len())?;
            upload.write(&bytes)?;
            let row = bytes.len();
            // SAFETY: the piece is as long, this handle's own and not in use yet; the stream is waited for.
            unsafe { stream.copy_rows((to, row), (upload.address(), row), 1, row)? };
            stream.wait()?;
        }
        Ok(())
    }

    /// Puts this rank's rows into the handle's buffers.
    fn stage(&mut self, cx: &ExecCx<'_>, input: &PrepareInput<'_>) -> Result<(), Source> {
        let (gpu, config, pieces) = (&self.gpu, &self.config, self.pieces);
        let (rows, hidden, top_k) = (input.hidden.dims()[0], config.hidden, config.top_k);
        if rows == 0 {
            return Ok(());
        }
        let stream = gpu.stream(cx.stream)?;
        let (tokens, stride) = gpu.rows("hidden states", input.hidden, &[rows, hidden], DType::Bf16)?;
        if self.kernels.granularity.is_some() {
            gpu.aligned("hidden states", tokens)?;
        }
        let (ids, id_stride) = gpu.rows("top-k ids", input.topk.ids, &[rows, top_k], DType::I32)?;
        let (weights, weight_stride) =
            gpu.rows("top-k weights", input.topk.weights, &[rows, top_k], DType::F32)?;
        let buffers =
            QuantizeBuffers { input: tokens, codes: pieces.payload, scales: pieces.scales, count: 0 };
        // SAFETY: `rows` has checked place, shape and alignment of what is read, which is lent until the call's work has run
        // (`DeviceStream::new`); what is written is this handle's, and large enough for as many rows as a round may have.
        unsafe {
            match self.kernels.granularity {
                None => {
                    let bytes = config.in_dtype.size_bytes();
                    let row = hidden * bytes;
                    stream.copy_rows((pieces.payload, row), (tokens, stride * bytes), rows, row)?;
                }
                Some(Granularity::Token) => {
                    gpu.kernels().launch(&self.kernels.token(rows, stride).launch(buffers)?, &stream)?;
                }
                Some(_) => {
                    gpu.kernels().launch(&self.kernels.group(rows, stride).launch(buffers)?, &stream)?;
                }
            }
            stream.copy_rows((pieces.ids, top_k * 4), (ids, id_stride * 4), rows, top_k * 4)?;
            stream.copy_rows((pieces.weights, top_k * 4), (weights, weight_stride * 4), rows, top_k * 4)?;
        }
        Ok(())
    }

    /// What has arrived, in the order of [`Sizes::all`].
    fn dispatched(&mut self) -> Result<Dispatched<'_>, Source> {
        let Self { memory, config, wire, received, lends_output, .. } = self;
        let rows = config.max_tokens_per_rank;
        let mut arena = memory.arena();
        let mut take = |dtype, width| arena.take_tensor(dtype, &[rows, width]);
        let hidden = take(wire.payload, config.hidden)?.into_view();
        let scale_dtype = wire.scale.map_or(DType::F32, |scale| scale.dtype);
        let scales = take(scale_dtype, wire.scales_per_token(config.hidden))?.into_view();
        let topk = TopK {
            ids: take(DType::I32, config.top_k)?.into_view(),
            weights: take(DType::F32, config.top_k)?.into_view(),
        };
        let output = take(config.in_dtype, config.hidden)?;
        let rows = ReceivedRows(TensorView::from_slice(received, DType::I32, &[1])?);
        Ok(Dispatched {
            hidden,
            scale: wire.scale.map(|_| scales),
            arrived: Arrived::Standard { topk, rows },
            output: lends_output.then_some(output),
        })
    }

    fn outputs_of(&self, out: ExpertOut<'_>) -> Result<u64, Result<Fault, Source>> {
        let rows = self.received[0] as usize;
        match out {
            ExpertOut::Failed(fault) => Err(Ok(fault)),
            ExpertOut::InPlace if self.lends_output => Ok(self.pieces.output),
            ExpertOut::InPlace => Err(Err("the plan lends no buffer for the experts' output".into())),
            ExpertOut::Lent(view) => {
                let dims = [view.dims()[0], self.config.hidden];
                if view.dims() != dims || dims[0] < rows {
                    let (found, hidden) = (view.dims(), self.config.hidden);
                    return Err(Err(
                        format!("the experts' output is {found:?}, needs [{rows}, {hidden}]").into()
                    ));
                }
                let address = self.gpu.address("experts' outputs", view, &dims, DType::Bf16);
                address.map_err(|error| Err(error.into()))
            }
        }
    }

    /// Writes the outputs of the round to `out`.
    fn cast(&self, cx: &ExecCx<'_>, tokens: usize, out: &TensorViewMut<'_>) -> Result<(), Source> {
        check_output(&self.config, tokens, out)?;
        if tokens == 0 {
            return Ok(());
        }
        let (gpu, pieces) = (&self.gpu, self.pieces);
        let stream = gpu.stream(cx.stream)?;
        let dims = [tokens, self.config.hidden];
        if out.dtype() == DType::F32 {
            let out = gpu.address("outputs", out.as_view(), &dims, DType::F32)?;
            let buffers =
                SumBuffers { products: self.outputs, positions: pieces.order, weights: pieces.ones, out };
            let launch = self.kernels.cast(tokens).launch(buffers)?;
            // SAFETY: `out` is lent exclusively, was checked, and stays until the call's work has run
            // (`DeviceStream::new`); the outputs were checked when they were sent, the rest is this handle's.
            unsafe { gpu.kernels().launch(&launch, &stream)? };
            return Ok(());
        }
        let (out, stride) = gpu.rows("outputs", out.as_view(), &dims, DType::Bf16)?;
        let row = dims[1] * size_of::<u16>();
        // SAFETY: as above.
        unsafe { stream.copy_rows((out, stride * size_of::<u16>()), (self.outputs, row), tokens, row)? };
        Ok(())
    }
}

impl PrepareAndFinalize for OnDevice {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        self.memory.bytes()
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
        match self.outputs_of(out) {
            Ok(outputs) => self.outputs = outputs,
            Err(Ok(fault)) => self.fault = Some(fault),
            Err(Err(why)) => {
                self.ledger.explain(why);
                self.fault = Some(Fault::BadTensor);
            }
        }
        Ok(sent)
    }

    fn finalize_recv(
        &mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        let routing = self.ledger.receive_finalize(sent)?;
        if let Some(fault) = self.fault.take() {
            return Err(self.ledger.fail_finalize(routing, ONLY, fault));
        }
        let written = self.cast(cx, routing.num_tokens(), &out);
        self.ledger.close(routing);
        written.map_err(|why| failure(Stage::Combine, why))
    }
}

/// A failure of the driver, or else what the caller lent.
fn failure(stage: Stage, why: Source) -> Error {
    match why.is::<device_runtime::DeviceError>() {
        true => Error::other(stage, NAME, why),
        false => Error::contract(stage, NAME, why),
    }
}

impl PrepareAndFinalizeModular for OnDevice {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.settle(cx)?;
        let (sent, fault) = self.ledger.open(&self.config, &input)?;
        self.fault = fault;
        self.received = [sent.routing().num_tokens() as i32];
        if fault.is_none()
            && let Err(why) = self.stage(cx, &input)
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
        let routed = self.ledger.receive_prepare(sent)?;
        if let Some(fault) = self.fault.take() {
            return Err(self.ledger.fail_prepare(routed, ONLY, fault));
        }
        let lent = self.dispatched().map_err(|why| Error::other(Stage::QuantizeDispatch, NAME, why))?;
        Ok((lent, routed))
    }
}
