//! `fmoe bench experts`: the experts of one rank, beside what this machine can do at most, in one process; or a layer
//! whose experts and tokens are spread over several ranks of it.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use fused_moe::transport::{Endpoint, ThreadOptions, run_ranks};
use fused_moe::{
    Activation, BackendOptions, Call, DType, DeviceKind, ExpertPlacement, FusedMoEKernel, MoeConfig, Overlap,
    ProcessGroup, QuantScheme, Rank, Registry, Selection, Stream, TensorView, TensorViewMut, TopK,
};
use grouped_gemm::probe;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

use super::calls::Calls;
use super::clock::Clock;
use super::{experts_device, experts_f32};
use crate::args::{BenchExpertsArgs, OnDevice, Quant};
use crate::ep::share;
use crate::exit::{Failure, OrFailure, refused};
use crate::layer::{check_conversion, scheme};
use crate::report::{print, print_json};
use crate::synthetic::normal;
use crate::tune;
use crate::weights::{LoadedExpert, LoadedMatrix};

/// A layer shape, as in `benches/definitions`.
#[derive(Clone, Debug, Deserialize)]
pub struct Shape {
    /// As printed and recorded.
    pub name: String,
    /// Elements of a token.
    pub hidden: usize,
    /// Rows of gate and of up.
    pub intermediate: usize,
    /// Experts.
    pub experts: usize,
    /// Of these, experts per token.
    pub top_k: usize,
    /// Numbers of tokens to measure.
    pub tokens: Vec<usize>,
}

/// The files of `benches/definitions`, by name.
const BUILT_IN: [(&str, &str); 6] = [
    ("qwen3-30b-a3b", include_str!("../../shapes/qwen3-30b-a3b.toml")),
    ("deepseek-v3-ep8", include_str!("../../shapes/deepseek-v3-ep8.toml")),
    ("deepseek-v3-ep32", include_str!("../../shapes/deepseek-v3-ep32.toml")),
    ("gpt-oss-20b", include_str!("../../shapes/gpt-oss-20b.toml")),
    ("mixtral-8x7b", include_str!("../../shapes/mixtral-8x7b.toml")),
    ("small", include_str!("../../shapes/small.toml")),
];

impl Shape {
    /// A built-in shape, or one of a file.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let text = match BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            Some((_, text)) => (*text).to_string(),
            None => std::fs::read_to_string(Path::new(name)).with_context(|| {
                let known: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
                format!("{name} is no built-in shape ({}) and cannot be read", known.join(", "))
            })?,
        };
        toml::from_str(&text).with_context(|| format!("in {name}"))
    }
}

impl Shape {
    /// Refuses sizes that cannot be measured; what no backend runs is found out later.
    pub fn check(&self, tokens: &[usize]) -> anyhow::Result<()> {
        let Shape { hidden, intermediate, experts, top_k, .. } = *self;
        // 2^40 bytes of weights are beyond what is measured on a host.
        let elements = hidden.checked_mul(intermediate).and_then(|n| n.checked_mul(experts));
        if elements.is_none_or(|n| n == 0 || n > 1 << 40) {
            bail!(
                "a layer of {experts} experts, hidden {hidden}, intermediate {intermediate} cannot be measured"
            );
        }
        if top_k == 0 || top_k > experts {
            bail!("top-{top_k} of {experts} experts does not exist");
        }
        if let Some(&tokens) = tokens.iter().find(|&&tokens| tokens == 0 || tokens > 1 << 20) {
            bail!("{tokens} tokens cannot be measured, at least 1 and at most {} can", 1 << 20);
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Report {
    shape: String,
    ep_size: usize,
    threads: usize,
    clock: Clock,
    peak_gflops: f64,
    read_gbytes_per_s: f64,
    rows: Vec<Row>,
}

/// What the machine does at most, per second.
#[derive(Clone, Copy, Debug)]
struct Roof {
    flops: f64,
    bytes: f64,
}

impl Roof {
    fn probe(threads: NonZeroUsize, is_f32: bool) -> Self {
        let flops = if is_f32 { probe::peak_f32_flops(threads) } else { probe::peak_bf16_flops(threads) };
        Self { flops, bytes: probe::read_bandwidth(threads) }
    }

    /// The machine is not slower than it was seen to be once.
    fn max(self, other: Self) -> Self {
        Self { flops: self.flops.max(other.flops), bytes: self.bytes.max(other.bytes) }
    }
}

#[derive(Serialize)]
struct Row {
    scheme: String,
    tokens: usize,
    median_ms: f64,
    min_ms: f64,
    max_ms: f64,
    gflops: f64,
    weight_gbytes_per_s: f64,
    fraction_of_peak: f64,
    fraction_of_roof: f64,
}

/// More threads than any machine has cores.
const MAX_THREADS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// How long a rank waits for another, which may have a core to share with seven of them.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Runs the command.
pub fn run(args: &BenchExpertsArgs) -> Result<(), Failure> {
    let shape = Shape::named(&args.shape).or_refused()?;
    if args.reps == 0 {
        return refused("--reps 0: at least one call is needed");
    }
    let tokens = if args.tokens.is_empty() { &shape.tokens } else { &args.tokens };
    shape.check(tokens).or_refused()?;
    if args.device != OnDevice::Host {
        return experts_device::run(args, &shape, tokens);
    }
    if args.slice_of != 1 || args.top_k.is_some() {
        return refused(
            "--slice-of and --top-k go with --device cuda; on the host, --ep-size shares out a layer",
        );
    }
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let threads = args.threads.unwrap_or(cores);
    if threads > MAX_THREADS {
        return refused(format!("--threads {threads}: at most {MAX_THREADS}"));
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global().or_failed()?;
    let schemes = if args.quant.is_empty() {
        vec![Quant::None, Quant::Fp8Block, Quant::Fp8Ptpc, Quant::Fp8PerTensor]
    } else {
        args.quant.clone()
    };
    let schemes: Vec<QuantScheme> =
        schemes.into_iter().map(|quant| scheme(quant, QuantScheme::Unquantized)).collect();
    // The weights are drawn in bf16.
    schemes.iter().try_for_each(|&wanted| check_conversion(QuantScheme::Unquantized, wanted))?;
    let ep_size = args.ep_size;
    if ep_size == 0 || ep_size > shape.experts {
        return refused(format!("--ep-size {ep_size}: {} experts are for 1 to as many ranks", shape.experts));
    }
    let Shape { experts, top_k, .. } = shape;
    let calls = match &args.routing {
        Some(file) => Calls::read(file, experts, top_k).or_refused()?,
        None => tokens.iter().map(|&tokens| Calls::uniform(experts, top_k, tokens, args.reps)).collect(),
    };

    let mut options = BackendOptions::default();
    options.executor = args.tuning.as_deref().map(tune::executor).transpose().or_refused()?;
    let registry = fused_moe::backends(options);
    let before = Roof::probe(threads, args.f32);
    let clock = if ep_size == 1 { Clock::for_threads(threads.get()) } else { Clock::Wall };
    let mut measured = Vec::new();
    if args.f32 {
        measured = experts_f32::measure(&shape, &calls, (threads, clock)).or_failed()?;
    }
    for quant in if args.f32 { vec![] } else { schemes } {
        let most = calls.iter().map(|calls| calls.tokens).max().unwrap_or(1);
        let bench = Bench::new(&registry, &shape, ep_size, quant, most).or_failed()?;
        for calls in &calls {
            measured.push(bench.measure(calls, clock).or_failed()?);
        }
    }
    let roof = before.max(Roof::probe(threads, args.f32));
    let report = Report {
        shape: shape.name.clone(),
        ep_size,
        threads: threads.get(),
        clock,
        peak_gflops: roof.flops / 1e9,
        read_gbytes_per_s: roof.bytes / 1e9,
        rows: measured.iter().map(|measured| measured.row(roof)).collect(),
    };
    if args.json {
        return print_json(&report).or_failed();
    }
    print(format_args!(
        "{}: hidden {}, intermediate {}, {} experts, top-{}; {} ranks, {} threads\n\
         probes: {:.0} GFLOP/s {}, {:.1} GB/s read; calls by {} time",
        shape.name,
        shape.hidden,
        shape.intermediate,
        shape.experts,
        shape.top_k,
        ep_size,
        report.threads,
        report.peak_gflops,
        if args.f32 { "f32" } else { "bf16" },
        report.read_gbytes_per_s,
        match report.clock {
            Clock::Cpu => "CPU",
            Clock::Wall => "wall",
        }
    ))
    .or_failed()?;
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "scheme",
        "tokens",
        "median ms",
        "min",
        "max",
        "GFLOP/s",
        "weights GB/s",
        "of peak",
        "of roof",
    ]);
    for row in &report.rows {
        table.add_row([
            row.scheme.clone(),
            row.tokens.to_string(),
            format!("{:.2}", row.median_ms),
            format!("{:.2}", row.min_ms),
            format!("{:.2}", row.max_ms),
            format!("{:.1}", row.gflops),
            format!("{:.1}", row.weight_gbytes_per_s),
            format!("{:.0} %", row.fraction_of_peak * 100.0),
            format!("{:.0} %", row.fraction_of_roof * 100.0),
        ]);
    }
    print(format_args!(
        "{table}\n\
         roof: the longer of reading the active experts' weights once and of the FLOPs at the probed peak"
    ))
    .or_failed()
}

/// A layer of random experts, packed.
struct Bench<'s> {
    shape: &'s Shape,
    registry: &'s Registry,
    config: MoeConfig,
    /// Of each rank.
    weights: Vec<fused_moe::ExpertWeights>,
}

impl<'s> Bench<'s> {
    fn new(
        registry: &'s Registry,
        shape: &'s Shape,
        ep_size: usize,
        quant: QuantScheme,
        max_tokens: usize,
    ) -> anyhow::Result<Self> {
        let Shape { hidden, intermediate, experts, top_k, .. } = *shape;
        let config = MoeConfig {
            hidden,
            intermediate,
            top_k,
            max_tokens_per_rank: max_tokens.div_ceil(ep_size),
            in_dtype: DType::Bf16,
            quant,
            activation: Activation::Silu,
            apply_router_weight_on_input: false,
            expert_bias: false,
            padding: Default::default(),
            redundant_experts: 0,
            max_received_rows: None,
            combine_wire: Default::default(),
            routing: None,
            placement: ExpertPlacement::linear(experts, ep_size)?,
            ranks_per_node: ep_size,
            device: DeviceKind::Host,
        };
        // All experts hold the same values, each in memory of its own: what is timed does not depend on them.
        let mut random = Pcg64::seed_from_u64(7);
        let mut matrix = |rows: usize, cols: usize| {
            let deviation = 1.0 / (cols as f32).sqrt();
            let values: Vec<bf16> =
                (0..rows * cols).map(|_| bf16::from_f32(normal(&mut random) * deviation)).collect();
            LoadedMatrix::from_bf16(values.into(), [rows, cols], quant)
        };
        let expert = LoadedExpert {
            gate: matrix(intermediate, hidden)?,
            up: matrix(intermediate, hidden)?,
            down: matrix(hidden, intermediate)?,
        };
        let plan = registry.survey(&config, Selection::default())?.fitting.into_iter().next();
        let plan = plan.ok_or_else(|| anyhow!("no backend runs {quant}"))?;
        let provider = registry.experts(plan.experts())?;
        let pack = |rank: u32| {
            let local = config.placement.num_local_experts(Rank(rank));
            provider.pack(&config, Rank(rank), &vec![expert.view()?; local]).map_err(anyhow::Error::from)
        };
        let weights = (0..ep_size as u32).map(pack).collect::<anyhow::Result<_>>()?;
        Ok(Self { shape, registry, config, weights })
    }

    fn measure(&self, calls: &Calls, clock: Clock) -> anyhow::Result<Measured> {
        let Shape { hidden, intermediate, experts, top_k, .. } = *self.shape;
        let (tokens, ep_size) = (calls.tokens, self.weights.len());
        let options = ThreadOptions { timeout: TIMEOUT, ..ThreadOptions::default() };
        let seconds = run_ranks(ep_size, options, |group| self.time_rank(&group, calls, clock))?;
        // A rank waits for the others before and after each call, so all have the same times.
        let seconds = seconds.into_iter().next().context("a group has a rank")??;
        let per_expert =
            self.weights.iter().map(|weights| weights.bytes() as f64).sum::<f64>() / experts as f64;
        Ok(Measured {
            scheme: self.config.quant.to_string(),
            tokens,
            seconds,
            flops: 6.0 * (hidden * intermediate * top_k * tokens) as f64,
            bytes: calls.active().map(|active| active as f64 * per_expert).collect(),
        })
    }

    /// The times of the calls on one rank, in seconds, each until all ranks have their output.
    fn time_rank(&self, group: &Endpoint, calls: &Calls, clock: Clock) -> anyhow::Result<Vec<f64>> {
        let Shape { hidden, top_k, .. } = *self.shape;
        let (transport, rank) = (group.transport(), group.rank());
        let part = share(calls.tokens, self.weights.len(), rank);
        let tokens = part.len();
        let FusedMoEKernel::Modular(mut kernel) =
            self.registry.build(&self.config, Selection::default(), group)?
        else {
            return Err(anyhow!("the first backend is not modular"));
        };
        let mut random = Pcg64::seed_from_u64(u64::from(rank.0) << 32 | tokens as u64);
        let x: Vec<bf16> = (0..tokens * hidden).map(|_| bf16::from_f32(normal(&mut random))).collect();
        let weights: Vec<f32> = (0..tokens * top_k).map(|_| random.random::<f32>() / top_k as f32).collect();
        let mut out = vec![0f32; tokens * hidden];
        let mut apply = |ids: &[i32]| -> anyhow::Result<f64> {
            let ids = &ids[part.start * top_k..part.end * top_k];
            let call = Call {
                stream: Stream::Host,
                weights: &self.weights[rank.index()],
                hidden: TensorView::from_slice(&x, DType::Bf16, &[tokens, hidden])?,
                routing: TopK {
                    ids: TensorView::from_slice(ids, DType::I32, &[tokens, top_k])?,
                    weights: TensorView::from_slice(&weights, DType::F32, &[tokens, top_k])?,
                },
                overlap: Overlap::default(),
                out: TensorViewMut::from_slice(&mut out, DType::F32, &[tokens, hidden])?,
            };
            transport.barrier(transport.deadline())?;
            let (took, done) = clock.time(|| {
                kernel.apply(call)?;
                transport.barrier(transport.deadline()).map_err(anyhow::Error::from)
            });
            done?;
            Ok(took.as_secs_f64())
        };
        // One call to warm up, then the timed ones.
        apply(&calls.ids[0])?;
        calls.ids.iter().map(|ids| apply(ids)).collect()
    }
}

/// Timed calls of one number of tokens.
pub(super) struct Measured {
    pub(super) scheme: String,
    pub(super) tokens: usize,
    /// Of each call.
    pub(super) seconds: Vec<f64>,
    pub(super) flops: f64,
    /// Weights of the experts that each call uses.
    pub(super) bytes: Vec<f64>,
}

impl Measured {
    fn row(&self, roof: Roof) -> Row {
        let Measured { ref scheme, tokens, ref seconds, flops, ref bytes } = *self;
        let median_of = |of_call: &dyn Fn(f64, f64) -> f64| {
            let mut values: Vec<f64> = seconds.iter().zip(bytes).map(|(&s, &b)| of_call(s, b)).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let median = median_of(&|seconds, _| seconds);
        Row {
            scheme: scheme.clone(),
            tokens,
            median_ms: median * 1e3,
            min_ms: seconds.iter().copied().fold(f64::INFINITY, f64::min) * 1e3,
            max_ms: seconds.iter().copied().fold(0.0, f64::max) * 1e3,
            gflops: flops / median / 1e9,
            weight_gbytes_per_s: median_of(&|seconds, bytes| bytes / seconds / 1e9),
            fraction_of_peak: flops / median / roof.flops,
            // Calls that use different experts have different roofs: each is held against its own.
            fraction_of_roof: median_of(&|seconds, bytes| {
                (bytes / roof.bytes).max(flops / roof.flops) / seconds
            }),
        }
    }
}
