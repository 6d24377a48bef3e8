//! Composition: a prepare/finalize backend and an experts backend as one layer call.

use std::time::{Duration, Instant};

use crate::config::MoeConfig;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result, Stage};
use crate::exec::{ExecCx, Stream};
use crate::experts::ExpertWeights;
use crate::fault::Fault;
use crate::kind::{Batch, Input, Kind, Modular, Monolithic};
use crate::layout::ViewError;
use crate::negotiate::{ActivationFormat, Plan, RouterWeight};
use crate::placement::{ExpertMap, Rank};
use crate::prepare_finalize::{ExpertOut, PrepareInput};
use crate::reduce::{ReduceError, ReduceInput};
use crate::router::TopK;
use crate::tensor::{TensorView, TensorViewMut};
use crate::workspace::{DeviceAllocator, Workspace};

/// Work to run while tokens are in flight (shared experts, the other micro-batch).
pub type OverlapFn<'a> = &'a mut dyn FnMut(Stream) -> Result<()>;

/// What runs between the send and the receive of each half. An error in the dispatch half fails the round on
/// every rank; in the combine half only this rank returns it, since its peers already have all they need.
#[derive(Default)]
pub struct Overlap<'a> {
    /// Runs while the dispatch is in flight.
    pub dispatch: Option<OverlapFn<'a>>,
    /// Runs while the combine is in flight.
    pub combine: Option<OverlapFn<'a>>,
}

impl std::fmt::Debug for Overlap<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = (self.dispatch.is_some(), self.combine.is_some());
        f.debug_struct("Overlap").field("dispatch", &set.0).field("combine", &set.1).finish()
    }
}

/// Where the time of the last call went, as the calling thread saw it. On a device stream this is the time to
/// enqueue, not to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Quantise and send, the wait for the peers' tokens, and the overlapped work between.
    pub dispatch: Duration,
    /// gemm1, activation, gemm2 and the reduction.
    pub experts: Duration,
    /// Send, the wait for the peers' outputs, and the overlapped work between.
    pub combine: Duration,
}

/// Bytes that a kernel holds on this rank, the same for any number of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelBytes {
    /// Buffers of the prepare/finalize backend.
    pub comm: usize,
    /// Workspace of the experts.
    pub workspace: usize,
    /// The experts' output, where the backend lends no buffer for it, and the reduced rows.
    pub expert_out: usize,
}

impl KernelBytes {
    /// All of it.
    pub fn total(&self) -> usize {
        self.comm + self.workspace + self.expert_out
    }
}

/// Shape of the experts' output and of the rows that the combine takes.
#[derive(Clone, Debug)]
pub(crate) struct OutputShape {
    expert_out: Vec<usize>,
    reduced: Option<Vec<usize>>,
}

impl OutputShape {
    pub(crate) fn new(config: &MoeConfig, plan: &Plan, rank: Rank) -> Self {
        let (rows, hidden) = (plan.max_rows(), config.hidden);
        let local = config.placement.num_local_experts(rank);
        match plan.format() {
            ActivationFormat::BatchedExperts => Self { expert_out: vec![local, rows, hidden], reduced: None },
            ActivationFormat::Standard if plan.weight_and_reduce().is_no_op() => {
                Self { expert_out: vec![rows, hidden], reduced: None }
            }
            ActivationFormat::Standard => {
                Self { expert_out: vec![rows, config.top_k, hidden], reduced: Some(vec![rows, hidden]) }
            }
        }
    }

    /// Bytes of the experts' output and of the reduced rows that the kernel itself holds.
    pub(crate) fn bytes(&self, config: &MoeConfig, plan: &Plan) -> (usize, usize) {
        let bytes = |dims: &[usize]| {
            Workspace::rounded(dims.iter().product::<usize>() * config.in_dtype.size_bytes())
        };
        let expert_out = if plan.in_place_output() { 0 } else { bytes(&self.expert_out) };
        (expert_out, self.reduced.as_deref().map_or(0, bytes))
    }
}

/// Memory and shapes that both kinds of kernel keep.
#[derive(Debug)]
struct Buffers {
    shape: OutputShape,
    workspace: Workspace,
    expert_out: Workspace,
    reduced: Workspace,
}

impl Buffers {
    fn new(
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
        workspace_bytes: usize,
        memory: Option<&dyn DeviceAllocator>,
    ) -> Result<Self> {
        let alloc = |bytes| match memory.filter(|memory| memory.device().kind == config.device) {
            Some(memory) => Workspace::on(memory, bytes),
            None => Workspace::new(config.device, bytes),
        };
        let shape = OutputShape::new(config, plan, rank);
        let (expert_out, reduced) = shape.bytes(config, plan);
        Ok(Self {
            workspace: alloc(workspace_bytes)?,
            expert_out: alloc(expert_out)?,
            reduced: alloc(reduced)?,
            shape,
        })
    }

    fn bytes(&self, comm: usize) -> KernelBytes {
        let expert_out = self.expert_out.bytes() + self.reduced.bytes();
        KernelBytes { comm, workspace: self.workspace.bytes(), expert_out }
    }
}

/// One call of a layer: `R` is [`TopK`] for a modular one, [`crate::Logits`] for a monolithic one.
#[derive(Debug)]
pub struct Call<'a, R> {
    /// Where device work is enqueued.
    pub stream: Stream,
    /// The layer's weights, packed by the plan's experts backend.
    pub weights: &'a ExpertWeights,
    /// `[tokens, hidden]` in the configuration's element type. Never written.
    pub hidden: TensorView<'a>,
    /// Top-k or logits of the same tokens.
    pub routing: R,
    /// Work for the time in flight.
    pub overlap: Overlap<'a>,
    /// `[tokens, hidden]` f32 or the configuration's element type.
    pub out: TensorViewMut<'a>,
}

/// Two backends that fit, with the memory they need.
///
/// One kernel serves every layer of a model for one micro-batch; `apply` takes the layer's weights.
pub struct ComposedKernel<K: Kind> {
    config: MoeConfig,
    plan: Plan,
    rank: Rank,
    experts_map: ExpertMap,
    buffers: Buffers,
    times: StageTimes,
    experts: Box<K::Experts>,
    prepare_finalize: Box<K::Comm>,
}

/// The engine routes and hands over top-k.
pub type ModularKernel = ComposedKernel<Modular>;

/// The engine hands over logits.
pub type MonolithicKernel = ComposedKernel<Monolithic>;

impl<K: Kind> std::fmt::Debug for ComposedKernel<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ComposedKernel").field("plan", &self.plan).finish_non_exhaustive()
    }
}

impl<K: Kind> ComposedKernel<K> {
    /// Composes two backends that `plan` was negotiated for, on the host. Allocates every byte that [`Self::apply`] uses.
    ///
    /// # Errors
    /// `OutOfMemory`; `Contract` for a configuration of another device.
    pub fn new(
        config: MoeConfig,
        plan: Plan,
        rank: Rank,
        prepare_finalize: Box<K::Comm>,
        experts: Box<K::Experts>,
    ) -> Result<Self> {
        Self::new_in(config, plan, rank, prepare_finalize, experts, None)
    }

    /// As [`Self::new`], on the device of the configuration: `memory` allocates there. It is not read for the host.
    ///
    /// # Errors
    /// `OutOfMemory`; `Contract` if `memory` is that of another kind of device.
    pub fn new_in(
        config: MoeConfig,
        plan: Plan,
        rank: Rank,
        prepare_finalize: Box<K::Comm>,
        experts: Box<K::Experts>,
        memory: Option<&dyn DeviceAllocator>,
    ) -> Result<Self> {
        let buffers = Buffers::new(&config, &plan, rank, K::workspace_bytes(&experts), memory)?;
        let experts_map = ExpertMap::new(&config.placement, rank);
        Ok(Self {
            config,
            plan,
            rank,
            experts_map,
            buffers,
            times: StageTimes::default(),
            experts,
            prepare_finalize,
        })
    }

    /// The configuration it was built for.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// What was negotiated.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where the time of the last call went.
    pub fn stage_times(&self) -> StageTimes {
        self.times
    }

    /// Bytes that the kernel holds on this rank.
    pub fn bytes(&self) -> KernelBytes {
        self.buffers.bytes(K::comm_bytes(&self.prepare_finalize))
    }

    /// The prepare/finalize backend, to drive the phases by hand.
    pub fn prepare_finalize(&mut self) -> &mut K::Comm {
        &mut self.prepare_finalize
    }

    /// Runs one layer on this rank's tokens. Collective: every rank calls it, with zero tokens if it has none.
    ///
    /// # Errors
    /// `RankFailed` with the same value on every rank, after which the kernel is ready for the next call;
    /// `PeerLost`, after which it is not.
    pub fn apply<'a>(&mut self, mut call: Call<'a, K::Routing<'a>>) -> Result<()> {
        let start = Instant::now();
        self.times = StageTimes::default();
        let rank = self.rank;
        // A call that cannot succeed must not leave the peers waiting: it takes part with zero tokens.
        let misfit = self.check(call.weights, &call.hidden, &call.out).err();
        let fault = misfit.as_ref().map(|_| Fault::BadTensor);
        let input = Input {
            hidden: call.hidden,
            routing: call.routing,
            input_scale: call.weights.input_scale(),
            fault,
        };

        let comm = &mut *self.prepare_finalize;
        let Buffers { shape, workspace, expert_out, reduced } = &mut self.buffers;
        let mut cx = ExecCx { stream: call.stream, workspace: workspace.arena() };
        let sent = K::prepare_send(comm, &mut cx.reborrow(), input)?;
        let overlapped = run(&mut call.overlap.dispatch, call.stream);
        let (mut dispatched, routed) = K::prepare_recv(comm, &mut cx.reborrow(), sent)
            .map_err(|error| explained(error, rank, misfit))?;
        self.times.dispatch = start.elapsed();

        let start = Instant::now();
        let (config, plan) = (&self.config, &self.plan);
        // A buffer that the plan does not count on has the shape of reduced rows, which this output may not have.
        let in_place = dispatched.take_output().filter(|_| plan.in_place_output());
        let lent = in_place.is_none();
        let failed = |fault| move |error: Error| Box::new((fault, error));
        let experts_failed = failed(Fault::ExpertsFailed);
        let other = |e: crate::Source| experts_failed(Error::other(Stage::Experts, plan.experts(), e));
        let ran = overlapped.map_err(failed(Fault::OverlapFailed)).and_then(|()| {
            let out = match in_place {
                Some(out) => out,
                None => {
                    expert_out.tensor_mut(config.in_dtype, &shape.expert_out).map_err(|e| other(e.into()))?
                }
            };
            K::run_experts(&self.experts, &mut cx.reborrow(), call.weights, &dispatched, out)
                .map_err(experts_failed)
        });
        let ran = ran.and_then(|()| {
            let Some(dims) = &shape.reduced else { return Ok(()) };
            let (topk, num_rows) = dispatched
                .received()
                .ok_or_else(|| other("the received rows cannot be reduced on the host".into()))?;
            let unreduced = Unreduced { config, plan, experts: &self.experts_map, topk, num_rows };
            unreduced.reduce((expert_out, &shape.expert_out), (reduced, dims)).map_err(|e| other(e.into()))
        });
        drop(dispatched);
        self.times.experts = start.elapsed();

        let start = Instant::now();
        let rows = match &shape.reduced {
            Some(dims) => reduced.tensor(config.in_dtype, dims),
            None if lent => expert_out.tensor(config.in_dtype, &shape.expert_out),
            None => TensorView::from_slice::<u8>(&[], DType::U8, &[0]),
        };
        let (out, failure) = match (ran, lent, rows) {
            (Err(failure), _, _) => (ExpertOut::Failed(failure.0), Some(failure.1)),
            (Ok(()), false, _) => (ExpertOut::InPlace, None),
            (Ok(()), true, Ok(rows)) => (ExpertOut::Lent(rows), None),
            (Ok(()), true, Err(e)) => {
                let error = Error::other(Stage::Combine, plan.comm(), e);
                (ExpertOut::Failed(Fault::ExpertsFailed), Some(error))
            }
        };
        let sent = K::finalize_send(comm, &mut cx.reborrow(), routed, out)?;
        let overlapped = run(&mut call.overlap.combine, call.stream);
        let received = K::finalize_recv(comm, &mut cx.reborrow(), sent, call.out);
        self.times.combine = start.elapsed();
        received.map_err(|error| explained(error, rank, failure))?;
        overlapped
    }

    /// Fails unless `weights` were packed for this plan and `out` has a row for every token of `hidden`.
    fn check(&self, weights: &ExpertWeights, hidden: &TensorView<'_>, out: &TensorViewMut<'_>) -> Result<()> {
        let contract = |why: String| Err(Error::contract(Stage::Experts, self.plan.experts(), why));
        if weights.backend() != self.plan.experts() {
            return contract(format!("the weights were packed by {}", weights.backend()));
        }
        let dtype_fits = out.dtype() == DType::F32 || out.dtype() == self.config.in_dtype;
        if out.dims() != [hidden.dims()[0], self.config.hidden] || !dtype_fits {
            let (dims, dtype, hidden) = (out.dims(), out.dtype(), hidden.dims());
            return contract(format!("output is {dims:?} of {dtype}, the hidden states are {hidden:?}"));
        }
        let (device, layout) = (out.device(), *out.as_view().layout());
        if device.kind != self.config.device {
            return contract(format!("output lives on {device}, not on {:?}", self.config.device));
        }
        if layout.dims()[1] > 1 && layout.strides()[1] != 1 {
            return contract(format!("output has strides {:?}, its rows have gaps", layout.strides()));
        }
        Ok(())
    }
}

impl ModularKernel {
    /// Takes part in a call without tokens because of `fault`, and returns what every rank returns: `RankFailed` with
    /// it, or with the fault of a lower rank. A rank that finds out before the call that it cannot bring its tokens
    /// calls this instead of [`Self::apply`], so that nobody waits for it.
    pub fn abstain(&mut self, stream: Stream, fault: Fault) -> Error {
        self.take_no_part(stream, fault).err().unwrap_or_else(|| {
            let why = "the peers took no notice of the fault";
            Error::contract(Stage::QuantizeDispatch, self.plan.comm(), why)
        })
    }

    fn take_no_part(&mut self, stream: Stream, fault: Fault) -> Result<()> {
        let contract = |why: ViewError| Error::contract(Stage::QuantizeDispatch, self.plan.comm(), why);
        let slots = [0, self.config.top_k];
        let topk = TopK {
            ids: TensorView::from_slice::<i32>(&[], DType::I32, &slots).map_err(contract)?,
            weights: TensorView::from_slice::<f32>(&[], DType::F32, &slots).map_err(contract)?,
        };
        let hidden = [0, self.config.hidden];
        let hidden = TensorView::from_slice::<u8>(&[], DType::U8, &hidden).map_err(contract)?;
        let input = PrepareInput { hidden, topk, input_scale: None, fault: Some(fault) };
        let mut cx = ExecCx { stream, workspace: self.buffers.workspace.arena() };
        self.prepare_finalize.prepare(&mut cx, input).map(drop)
    }
}

/// Expert outputs that the kernel itself weights and reduces, between experts and combine.
struct Unreduced<'k> {
    config: &'k MoeConfig,
    plan: &'k Plan,
    experts: &'k ExpertMap,
    topk: TopK<'k>,
    num_rows: usize,
}

impl Unreduced<'_> {
    fn reduce(
        &self,
        from: (&Workspace, &[usize]),
        to: (&mut Workspace, &[usize]),
    ) -> Result<(), ReduceError> {
        let input = ReduceInput {
            expert_out: from.0.tensor(self.config.in_dtype, from.1)?,
            topk: self.topk,
            num_rows: self.num_rows,
            experts: self.experts,
            weighted: self.plan.router_weight() != RouterWeight::OnOutput,
        };
        self.plan.weight_and_reduce().reduce(input, to.0.tensor_mut(self.config.in_dtype, to.1)?)
    }
}

fn run(work: &mut Option<OverlapFn<'_>>, stream: Stream) -> Result<()> {
    work.as_mut().map_or(Ok(()), |work| work(stream))
}

/// The error that every rank returns, with what only the rank at fault knows as its source.
fn explained(mut error: Error, mine: Rank, local: Option<Error>) -> Error {
    let at_fault = matches!(error.kind, ErrorKind::RankFailed { rank, .. } if rank == mine);
    if at_fault && error.source.is_none() {
        error.source = local.map(Into::into);
    }
    error
}

/// A layer of either kind: an engine matches on it once.
#[derive(Debug)]
pub enum FusedMoEKernel {
    /// The engine routes and hands over top-k.
    Modular(ModularKernel),
    /// The engine hands over logits.
    Monolithic(MonolithicKernel),
}

impl FusedMoEKernel {
    /// What was negotiated.
    pub fn plan(&self) -> &Plan {
        match self {
            FusedMoEKernel::Modular(k) => k.plan(),
            FusedMoEKernel::Monolithic(k) => k.plan(),
        }
    }

    /// Bytes that the kernel holds on this rank.
    pub fn bytes(&self) -> KernelBytes {
        match self {
            FusedMoEKernel::Modular(k) => k.bytes(),
            FusedMoEKernel::Monolithic(k) => k.bytes(),
        }
    }

    /// Where the time of the last call went.
    pub fn stage_times(&self) -> StageTimes {
        match self {
            FusedMoEKernel::Modular(k) => k.stage_times(),
            FusedMoEKernel::Monolithic(k) => k.stage_times(),
        }
    }
}
