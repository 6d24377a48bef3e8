//! One cell on one rank: rounds without experts, timed, counted and checked.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use fused_moe::router::simulate::{Distribution, SimulatedTopK, Simulator};
use fused_moe::transport::{Endpoint, Traffic, Transport, transport_of};
use fused_moe::{
    Arena, Arrived, CombineKind, DType, ExecCx, ExpertOut, MoeConfig, PrepareAndFinalizeModular,
    PrepareFinalize, PrepareInput, ProcessGroup, Rank, Registry, Stream, TensorView, TensorViewMut, TopK,
};
use half::bf16;
use rand::SeedableRng;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

use super::cells::Cell;
use crate::args::Draw;
use crate::synthetic::normal;

/// A sample is as many rounds as take this long: one round of few tokens is shorter than a look at the clock.
const SAMPLE: Duration = Duration::from_millis(10);
const MOST_ROUNDS: u64 = 2000;

/// What a rank measured. Times in microseconds per round, one entry per sample.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    dispatch_us: Vec<f64>,
    combine_us: Vec<f64>,
    round_us: Vec<f64>,
    /// What this rank moved in one round.
    dispatch_bytes: Bytes,
    combine_bytes: Bytes,
    /// (token, rank) pairs of its own tokens.
    pub useful_rows: u64,
}

/// What a transport counted.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Bytes {
    /// From rank to rank.
    pub remote: u64,
    /// Of these, from node to node.
    pub internode: u64,
    /// From a rank to itself, where it copies too.
    pub local: u64,
}

impl From<Traffic> for Bytes {
    fn from(traffic: Traffic) -> Self {
        let Traffic { remote_bytes, internode_bytes, local_bytes, .. } = traffic;
        Self { remote: remote_bytes, internode: internode_bytes, local: local_bytes }
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, bytes| Self {
            remote: sum.remote + bytes.remote,
            internode: sum.internode + bytes.internode,
            local: sum.local + bytes.local,
        })
    }
}

/// One half of a round.
#[derive(Clone, Copy, Debug)]
pub struct HalfSample {
    /// Microseconds.
    pub us: f64,
    /// What was moved.
    pub bytes: Bytes,
}

/// A round: medians over the samples.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Tokens go.
    pub dispatch: HalfSample,
    /// Outputs come.
    pub combine: HalfSample,
    /// Both.
    pub round_us: f64,
    /// Of `round_us`, the shortest and the longest sample.
    pub spread: [f64; 2],
}

impl Measured {
    /// Of each sample the slowest rank's rounds, and of these the part that is dispatch in the mean over ranks: which half
    /// a rank waits in is chance, and one that a busy core let begin late has measured less of both. Bytes add up.
    pub fn over_ranks(all: &[Self], samples: usize) -> Self {
        let of_ranks = |times: fn(&Self) -> &[f64], sample: usize| -> Vec<f64> {
            all.iter().filter_map(|rank| times(rank).get(sample).copied()).collect()
        };
        let total = |times: fn(&Self) -> &[f64], sample| of_ranks(times, sample).iter().sum::<f64>();
        let slowest = |sample| of_ranks(|rank| &rank.round_us, sample).into_iter().fold(0.0, f64::max);
        let part = |half: fn(&Self) -> &[f64]| {
            let of_sample = |sample| {
                let both = total(|rank| &rank.dispatch_us, sample) + total(|rank| &rank.combine_us, sample);
                if both > 0.0 { slowest(sample) * total(half, sample) / both } else { 0.0 }
            };
            (0..samples).map(of_sample).collect()
        };
        Self {
            dispatch_us: part(|rank| &rank.dispatch_us),
            combine_us: part(|rank| &rank.combine_us),
            round_us: (0..samples).map(slowest).collect(),
            dispatch_bytes: all.iter().map(|rank| rank.dispatch_bytes).sum(),
            combine_bytes: all.iter().map(|rank| rank.combine_bytes).sum(),
            useful_rows: all.iter().map(|rank| rank.useful_rows).sum(),
        }
    }

    /// The middle of everything.
    pub fn medians(&self) -> Round {
        let sorted = |times: &[f64]| {
            let mut times = times.to_vec();
            times.sort_by(f64::total_cmp);
            times
        };
        let median = |times: &[f64]| sorted(times).get(times.len() / 2).copied().unwrap_or(0.0);
        let half = |times: &[f64], bytes| HalfSample { us: median(times), bytes };
        let rounds = sorted(&self.round_us);
        let end = |time: Option<&f64>| time.copied().unwrap_or(0.0);
        Round {
            dispatch: half(&self.dispatch_us, self.dispatch_bytes),
            combine: half(&self.combine_us, self.combine_bytes),
            round_us: median(&self.round_us),
            spread: [end(rounds.first()), end(rounds.last())],
        }
    }
}

/// Measures `cell` on the rank of `endpoint`. Collective.
pub fn measure(
    cell: &Cell,
    registry: &Registry,
    endpoint: &Endpoint,
    samples: usize,
) -> anyhow::Result<Measured> {
    let transport = transport_of(endpoint).ok_or_else(|| anyhow!("the group has no transport"))?;
    let comm = registry.comm(cell.plan.comm())?.build(&cell.config, &cell.plan, endpoint)?;
    let PrepareFinalize::Modular(comm) = comm else { bail!("the backend is not modular") };
    let mut bench = Bench::new(cell, comm, endpoint.rank())?;

    // The first rounds touch every page and fill in what experts would have put out; the second is counted.
    bench.round(true, &*transport)?;
    let counted = bench.round(true, &*transport)?;
    let start = Instant::now();
    bench.round(false, &*transport)?;
    let rounds = agreed_rounds(&*transport, start.elapsed())?;

    let mut measured = Measured {
        dispatch_bytes: counted.dispatched.into(),
        combine_bytes: counted.combined.into(),
        useful_rows: bench.wanted.iter().map(|&ranks| u64::from(ranks)).sum(),
        ..Measured::default()
    };
    for _ in 0..samples {
        transport.barrier(transport.deadline())?;
        let (mut dispatch, mut combine) = (Duration::ZERO, Duration::ZERO);
        let start = Instant::now();
        for _ in 0..rounds {
            let round = bench.round(false, &*transport)?;
            dispatch += round.dispatch;
            combine += round.combine;
        }
        let per_round = |time: Duration| time.as_secs_f64() * 1e6 / rounds as f64;
        measured.round_us.push(per_round(start.elapsed()));
        measured.dispatch_us.push(per_round(dispatch));
        measured.combine_us.push(per_round(combine));
    }
    bench.check()?;
    Ok(measured)
}

/// How many rounds a sample has: the same on all ranks, by the slowest of them.
fn agreed_rounds(transport: &dyn Transport, one: Duration) -> anyhow::Result<u64> {
    let mine = (one.as_nanos() as u64).max(1).to_le_bytes();
    let all = transport.all_gather(&mine, transport.deadline())?;
    let longest =
        all.iter().filter_map(|bytes| Some(u64::from_le_bytes(bytes.as_slice().try_into().ok()?))).max();
    Ok((SAMPLE.as_nanos() as u64 / longest.unwrap_or(1)).clamp(1, MOST_ROUNDS))
}

/// Times and traffic of one round on this rank.
struct Timed {
    dispatch: Duration,
    combine: Duration,
    dispatched: Traffic,
    combined: Traffic,
}

/// Writes what experts would: 1 for a row with an expert of this rank, 0 for one that has only come by.
fn fill_in(
    config: &MoeConfig,
    rank: Rank,
    mut output: TensorViewMut<'_>,
    arrived: &Arrived<'_>,
) -> anyhow::Result<()> {
    let Arrived::Standard { topk, rows } = arrived else {
        bail!("a batched backend offers an output buffer")
    };
    for row in 0..rows.on_host()? {
        let is_ours = |&id: &i32| config.placement.rank_of_slot(id) == Some(rank);
        let value = if topk.ids.row::<i32>(row)?.iter().any(is_ours) { bf16::ONE } else { bf16::ZERO };
        output.row_mut::<bf16>(row)?.fill(value);
    }
    Ok(())
}

/// One rank with its tokens. The experts' output is known, so the sum of a token's is, too.
struct Bench<'c> {
    cell: &'c Cell,
    rank: Rank,
    comm: Box<dyn PrepareAndFinalizeModular>,
    hidden: Vec<bf16>,
    topk: SimulatedTopK,
    /// Ranks that each token goes to.
    wanted: Vec<u32>,
    lent: Option<(Vec<bf16>, Vec<usize>)>,
    out: Vec<bf16>,
}

impl<'c> Bench<'c> {
    fn new(cell: &'c Cell, comm: Box<dyn PrepareAndFinalizeModular>, rank: Rank) -> anyhow::Result<Self> {
        let config = &cell.config;
        let seed = 1 + u64::from(rank.0);
        let distribution = match cell.draw {
            Draw::Uniform => Distribution::Uniform,
            Draw::Model => Distribution::GroupLimited { n_group: 8, topk_group: 4 },
        };
        let topk = Simulator::new(distribution, config.num_experts(), config.top_k, seed)?.draw(cell.tokens);
        let ranks_of = |ids: &[i32]| {
            let mut ranks: Vec<_> = ids.iter().filter_map(|&id| config.placement.rank_of_slot(id)).collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks.len() as u32
        };
        let mut random = Pcg64::seed_from_u64(seed);
        // One row of noise, turned for every token: drawing them all would take longer than sending them.
        let noise: Vec<bf16> = (0..config.hidden).map(|_| bf16::from_f32(normal(&mut random))).collect();
        let mut hidden = Vec::with_capacity(cell.tokens * config.hidden);
        for token in 0..cell.tokens {
            let (tail, head) = noise.split_at(token % config.hidden);
            hidden.extend(head.iter().chain(tail));
        }
        let lent = cell.lent_output().map(|[experts, rows, width]| {
            let dims = match cell.plan.format() {
                fused_moe::ActivationFormat::Standard => vec![rows, width],
                fused_moe::ActivationFormat::BatchedExperts => vec![experts, rows, width],
            };
            (vec![bf16::ONE; experts * rows * width], dims)
        });
        Ok(Self {
            cell,
            rank,
            comm,
            hidden,
            wanted: topk.ids.chunks_exact(config.top_k).map(ranks_of).collect(),
            topk,
            lent,
            out: vec![bf16::NAN; cell.tokens * config.hidden],
        })
    }

    fn round(&mut self, fill: bool, transport: &dyn Transport) -> anyhow::Result<Timed> {
        let (tokens, width, top_k) = (self.cell.tokens, self.cell.config.hidden, self.cell.config.top_k);
        let mut cx = ExecCx {
            stream: Stream::Host,
            workspace: Arena::new(TensorViewMut::from_slice::<u8>(&mut [], DType::U8, &[0])?),
        };
        let input = PrepareInput {
            hidden: TensorView::from_slice(&self.hidden, DType::Bf16, &[tokens, width])?,
            topk: TopK {
                ids: TensorView::from_slice(&self.topk.ids, DType::I32, &[tokens, top_k])?,
                weights: TensorView::from_slice(&self.topk.weights, DType::F32, &[tokens, top_k])?,
            },
            input_scale: None,
            fault: None,
        };
        let before = transport.traffic();
        let start = Instant::now();
        let sent = self.comm.prepare_send(&mut cx, input)?;
        let (dispatched, routed) = self.comm.prepare_recv(&mut cx, sent)?;
        let dispatch = start.elapsed();
        let between = transport.traffic();
        if fill && let Some(output) = dispatched.output {
            fill_in(&self.cell.config, self.rank, output, &dispatched.arrived)?;
        }

        let start = Instant::now();
        let expert_out = match &self.lent {
            Some((lent, dims)) => ExpertOut::Lent(TensorView::from_slice(lent, DType::Bf16, dims)?),
            None => ExpertOut::InPlace,
        };
        let sent = self.comm.finalize_send(&mut cx, routed, expert_out)?;
        let out = TensorViewMut::from_slice(&mut self.out, DType::Bf16, &[tokens, width])?;
        self.comm.finalize_recv(&mut cx, sent, out)?;
        let combine = start.elapsed();
        let combined = transport.traffic() - between;
        Ok(Timed { dispatch, combine, dispatched: between - before, combined })
    }

    /// A combine that sums gives the number of ranks; one that weights, the sum of the weights.
    fn check(&self) -> anyhow::Result<()> {
        let sums = self.comm.caps().combine == CombineKind::Sum;
        for (token, row) in self.out.chunks_exact(self.cell.config.hidden).enumerate() {
            let wanted = if sums { self.wanted[token] as f32 } else { 1.0 };
            let wrong = row.iter().find(|y| y.is_nan() || (y.to_f32() - wanted).abs() > wanted / 128.0);
            if let Some(wrong) = wrong {
                bail!("token {token} came back as {wrong}, wanted {wanted}");
            }
        }
        Ok(())
    }
}
