//! A layer over several ranks: every rank routes its tokens, calls the kernel, and runs the shared experts while
//! the outputs of the routed ones are on their way.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use fused_moe::router::{HostRouter, add_gate_bias, gate_logits, shared_expert_gate};
use fused_moe::transport::{Endpoint, ThreadOptions, Traffic, run_ranks, transport_of};
use fused_moe::{
    Call, DType, DeviceKind, Error, ErrorKind, ExecCx, ExpertWeights, FusedMoEKernel, KernelBytes, Logits,
    Overlap, ProcessGroup, Rank, Registry, Router, Selection, SingleRank, Stage, StageTimes, Stream,
    TensorView, TensorViewMut, TopKMut, Workspace,
};
use half::bf16;
use moe_checkpoint::MoeLayer;

use crate::eplb::Replicas;
use crate::lane::{Lane, Routed};
use crate::layer::SharedLayer;
use crate::part::{Blame, RemoteFailure};
use crate::tokens::{HiddenStates, LayerOutput};

/// A layer with everything that its ranks need, loaded.
#[derive(Debug)]
pub struct LoadedLayer<'l> {
    /// The layer in the checkpoint: gate and shared expert gate.
    pub stored: &'l MoeLayer<'l>,
    /// The routed experts and their replicas.
    pub replicas: &'l Replicas,
    /// The shared experts.
    pub shared: Option<&'l SharedLayer>,
}

/// Where the time of a layer call went; of all ranks, the longest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Gate and top-k.
    pub router: Duration,
    /// Dispatch, experts, combine.
    pub stages: StageTimes,
    /// The shared experts, which run inside the combine.
    pub shared: Duration,
    /// The whole layer.
    pub total: Duration,
}

impl Times {
    fn longest(self, other: Self) -> Self {
        let stages = StageTimes {
            dispatch: self.stages.dispatch.max(other.stages.dispatch),
            experts: self.stages.experts.max(other.stages.experts),
            combine: self.stages.combine.max(other.stages.combine),
        };
        Self {
            router: self.router.max(other.router),
            stages,
            shared: self.shared.max(other.shared),
            total: self.total.max(other.total),
        }
    }
}

/// What a layer call gave.
#[derive(Clone, Debug)]
pub struct LayerRun {
    /// The tensors.
    pub output: LayerOutput,
    /// `[tokens, top_k]`: the slots, of all ranks, that the tokens went to for `topk_ids`.
    pub slots: Vec<i32>,
    /// Where the time went.
    pub times: Times,
    /// What the transport counted during the call, over all ranks.
    pub traffic: Traffic,
    /// What rank 0 holds.
    pub bytes: KernelBytes,
}

/// How long a rank waits for another. Large inputs keep ranks busy for minutes on a small machine; one that dies is
/// noticed at once, as ranks are threads of this process.
pub const TIMEOUT: Duration = Duration::from_secs(3600);

/// Tokens of `rank` when `tokens` are spread as evenly as possible.
pub fn share(tokens: usize, ranks: usize, rank: Rank) -> Range<usize> {
    let (base, extra, rank) = (tokens / ranks, tokens % ranks, rank.index());
    let start = rank * base + rank.min(extra);
    start..start + base + usize::from(rank < extra)
}

/// Runs `layer` once on `hidden`, over threads of this process. `weights` are those of the routed experts, one entry
/// per rank.
pub fn run(
    registry: &Registry,
    (layer, weights): (&LoadedLayer<'_>, &[ExpertWeights]),
    selection: Selection<'_>,
    hidden: &HiddenStates,
) -> anyhow::Result<LayerRun> {
    let ranks = layer.replicas.config.ep_size();
    let ranks_per_node = std::num::NonZeroUsize::new(layer.replicas.config.ranks_per_node);
    let options = ThreadOptions { ranks_per_node, timeout: TIMEOUT };
    let parts = run_ranks(ranks, options, |group| {
        let weights = &weights[group.rank().index()];
        run_rank(registry, (layer, weights), selection, (&group, hidden))
    })?;
    whole(parts)
}

/// Runs this rank's part of `layer`, whose own experts have `weights`.
pub fn run_rank(
    registry: &Registry,
    (layer, weights): (&LoadedLayer<'_>, &ExpertWeights),
    selection: Selection<'_>,
    (group, hidden): (&Endpoint, &HiddenStates),
) -> anyhow::Result<LayerRun> {
    RankRun::new(registry, layer, selection, group)?.run(group, weights, hidden)
}

/// The run of which `parts` are those of all ranks, or the failure that explains the others.
pub fn whole(parts: Vec<anyhow::Result<LayerRun>>) -> anyhow::Result<LayerRun> {
    let mut whole: Option<LayerRun> = None;
    for part in distinct_failure(parts)? {
        match &mut whole {
            None => whole = Some(part),
            Some(whole) => whole.append(part),
        }
    }
    whole.ok_or_else(|| anyhow!("a group has at least one rank"))
}

/// All parts, or the failure that explains the others: every rank reports the same one, the rank at fault with
/// its cause.
fn distinct_failure(parts: Vec<anyhow::Result<LayerRun>>) -> anyhow::Result<Vec<LayerRun>> {
    let mut runs = Vec::with_capacity(parts.len());
    let mut failures = Vec::new();
    for part in parts {
        match part {
            Ok(run) => runs.push(run),
            Err(error) => failures.push(error),
        }
    }
    // A rank that could not route has left, and is lost to those that could: what it says comes first.
    let explains = |error: &anyhow::Error| (is_bad_input(error), !is_peer_lost(error), depth(error));
    match failures.into_iter().max_by_key(explains) {
        None => Ok(runs),
        Some(error) => Err(error),
    }
}

impl LayerRun {
    fn append(&mut self, part: LayerRun) {
        self.output.tokens += part.output.tokens;
        self.output.output.extend(part.output.output);
        self.output.routed.extend(part.output.routed);
        self.output.topk_ids.extend(part.output.topk_ids);
        self.output.topk_weights.extend(part.output.topk_weights);
        self.slots.extend(part.slots);
        self.times = self.times.longest(part.times);
        self.traffic.remote_bytes += part.traffic.remote_bytes;
        self.traffic.internode_bytes += part.traffic.internode_bytes;
        self.traffic.remote_puts += part.traffic.remote_puts;
        self.traffic.local_bytes += part.traffic.local_bytes;
        self.traffic.signals += part.traffic.signals;
    }
}

/// One rank's kernels.
struct RankRun<'l> {
    layer: &'l LoadedLayer<'l>,
    router: HostRouter,
    kernel: FusedMoEKernel,
    shared: Option<FusedMoEKernel>,
    lane: Lane,
}

impl<'l> RankRun<'l> {
    fn new(
        registry: &Registry,
        layer: &'l LoadedLayer<'l>,
        selection: Selection<'_>,
        group: &Endpoint,
    ) -> anyhow::Result<Self> {
        let kernel = registry.build(&layer.replicas.config, selection, group)?;
        let shared = match layer.shared {
            Some(shared) => {
                let selection = Selection { comm: None, experts: Some(shared.weights.backend()) };
                Some(registry.build(&shared.config, selection, &SingleRank)?)
            }
            None => None,
        };
        let lane = Lane::open(layer.replicas.config.device)?;
        Ok(Self { layer, router: HostRouter::new(layer.stored.routing())?, kernel, shared, lane })
    }

    fn run(
        mut self,
        group: &Endpoint,
        weights: &ExpertWeights,
        hidden: &HiddenStates,
    ) -> anyhow::Result<LayerRun> {
        let transport = transport_of(group).ok_or_else(|| anyhow!("the group has no transport"))?;
        let before = transport.traffic();
        let start = Instant::now();
        let (Replicas { table, config }, rank) = (self.layer.replicas, group.rank());
        let part = share(hidden.tokens, config.ep_size(), rank);
        let (tokens, width, top_k) = (part.len(), config.hidden, config.top_k);
        let rows = &hidden.values[part.start * width..part.end * width];
        let x = TensorView::from_slice(rows, DType::Bf16, &[tokens, width])?;

        let gate = self.layer.stored.gate().view();
        let mut logits = vec![0f32; tokens * table.num_logical()];
        let dims = [tokens, table.num_logical()];
        gate_logits(x, gate, TensorViewMut::from_slice(&mut logits, DType::F32, &dims)?)?;
        if let Some(bias) = self.layer.stored.gate_bias() {
            add_gate_bias(bias, TensorViewMut::from_slice(&mut logits, DType::F32, &dims)?)?;
        }
        let logits = TensorView::from_slice(&logits, DType::F32, &dims)?;
        let mut topk_ids = vec![0i32; tokens * top_k];
        let mut topk_weights = vec![0f32; tokens * top_k];
        let out = TopKMut {
            ids: TensorViewMut::from_slice(&mut topk_ids, DType::I32, &[tokens, top_k])?,
            weights: TensorViewMut::from_slice(&mut topk_weights, DType::F32, &[tokens, top_k])?,
        };
        let mut workspace = Workspace::new(DeviceKind::Host, 0)?;
        self.router.route(&mut ExecCx { stream: Stream::Host, workspace: workspace.arena() }, logits, out)?;
        let mut slots = vec![0i32; tokens * top_k];
        table.map(top_k, &topk_ids, &mut slots)?;
        let mut times = Times { router: start.elapsed(), ..Times::default() };

        let mut routed = vec![0f32; tokens * width];
        let mut shared = vec![0f32; tokens * width];
        let (layer, lane) = (self.layer, &self.lane);
        let mut shared_experts = |_: Stream| -> fused_moe::Result<()> {
            let Some(kernel) = &mut self.shared else { return Ok(()) };
            let start = Instant::now();
            let done = run_shared((layer, lane), kernel, (rows, tokens), &mut shared);
            times.shared = start.elapsed();
            done.map_err(|e| Error::other(Stage::Experts, "shared-experts", e))
        };
        let overlap = Overlap { dispatch: None, combine: Some(&mut shared_experts) };
        match &mut self.kernel {
            FusedMoEKernel::Modular(kernel) => {
                let dims = [tokens, width, top_k];
                let tokens = Routed { hidden: rows, ids: &slots, weights: &topk_weights, dims };
                lane.apply(kernel, weights, tokens, overlap, &mut routed)?;
            }
            FusedMoEKernel::Monolithic(kernel) => {
                let (routing, out) =
                    (Logits(logits), TensorViewMut::from_slice(&mut routed, DType::F32, &[tokens, width])?);
                kernel.apply(Call { stream: Stream::Host, weights, hidden: x, routing, overlap, out })?;
            }
        }
        times.stages = self.kernel.stage_times();
        times.total = start.elapsed();
        let output: Vec<f32> = routed.iter().zip(&shared).map(|(r, s)| r + s).collect();
        if let Some(at) = output.iter().position(|y| !y.is_finite()) {
            let (token, element, value) = (part.start + at / width, at % width, output[at]);
            bail!(
                "the output of token {token} is {value} at element {element}: a weight is not finite, or the layer \
                 overflows"
            );
        }
        Ok(LayerRun {
            output: LayerOutput { tokens, hidden: width, top_k, output, routed, topk_ids, topk_weights },
            slots,
            times,
            traffic: transport.traffic() - before,
            bytes: self.kernel.bytes(),
        })
    }
}

/// The shared experts on this rank's own tokens: a layer of one expert, weighted by the sigmoid gate or by 1.
fn run_shared(
    (layer, lane): (&LoadedLayer<'_>, &Lane),
    kernel: &mut FusedMoEKernel,
    (rows, tokens): (&[bf16], usize),
    out: &mut [f32],
) -> anyhow::Result<()> {
    let (Some(shared), FusedMoEKernel::Modular(kernel)) = (layer.shared, kernel) else {
        bail!("the shared experts are not a modular layer");
    };
    let (ids, width) = (vec![0i32; tokens], layer.replicas.config.hidden);
    let mut factors = vec![1f32; tokens];
    if let Some(gate) = &shared.sigmoid_gate {
        let x = TensorView::from_slice(rows, DType::Bf16, &[tokens, width])?;
        let gate = TensorView::from_slice(gate, DType::F32, &[1, width])?;
        shared_expert_gate(x, gate, TensorViewMut::from_slice(&mut factors, DType::F32, &[tokens, 1])?)?;
    }
    let routed = Routed { hidden: rows, ids: &ids, weights: &factors, dims: [tokens, width, 1] };
    lane.apply(kernel, &shared.weights, routed, Overlap::default(), out)
}

/// How many errors `error` consists of, with its causes.
pub fn depth(error: &anyhow::Error) -> usize {
    remote(error).map_or_else(|| error.chain().count(), |far| far.depth)
}

fn remote(error: &anyhow::Error) -> Option<&RemoteFailure> {
    error.downcast_ref()
}

/// Whether `error` is about another rank that is lost.
pub fn is_peer_lost(error: &anyhow::Error) -> bool {
    remote(error).is_some_and(|far| far.blame == Blame::Lost)
        || error.downcast_ref::<Error>().is_some_and(|e| matches!(e.kind, ErrorKind::PeerLost { .. }))
}

/// Whether `error` is about what the caller gave (bad tokens), not about the run.
pub fn is_bad_input(error: &anyhow::Error) -> bool {
    remote(error).is_some_and(|far| far.blame == Blame::Input)
        || error.downcast_ref::<Error>().is_some_and(|e| matches!(e.kind, ErrorKind::BadInput(_)))
}
