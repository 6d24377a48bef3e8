//! The command line.

mod bench;

use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fused_moe::aiter_experts::SortPolicy;
use fused_moe::{Device, DeviceKind};

pub use bench::{BenchCommArgs, BenchCommand, BenchExpertsArgs, BenchQuantArgs, BenchRouterArgs};

/// Expert-parallel MoE layers of Hugging Face checkpoints: run, plan, verify, measure.
#[derive(Debug, Parser)]
#[command(name = "fmoe", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one MoE layer of a checkpoint on hidden states from a file.
    Run(RunArgs),
    /// Write two small FP8 checkpoints, run them over 8 ranks with every backend, check against the oracle.
    Demo(DemoArgs),
    /// Say which backends would run a layer, what they cost, and why the others would not.
    Plan(PlanArgs),
    /// Run a program once per rank, as a group of processes.
    #[cfg(target_os = "linux")]
    Launch(LaunchArgs),
    /// Become the program of a rank.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    LaunchRank(LaunchRankArgs),
    /// Say which devices this machine has, and which backends can use them and why not.
    Doctor(DoctorArgs),
    /// Print the support table of all backends.
    Matrix(MatrixArgs),
    /// Propose a placement of experts and replicas that balances recorded loads.
    Eplb(crate::eplb::EplbArgs),
    /// Measure block sizes and task grain of the grouped GEMM on this machine, and write the table.
    Tune(TuneArgs),
    /// Kill, stop and delay ranks at random and see whether the others return right results or errors in time.
    #[cfg(target_os = "linux")]
    Chaos(crate::chaos::args::ChaosArgs),
    /// A rank of `chaos`, which starts it.
    #[command(hide = true)]
    #[cfg(target_os = "linux")]
    ChaosRank(crate::chaos::args::ChaosRankArgs),
    /// Measure.
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// How the experts' weights and activations are to be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Quant {
    /// As the checkpoint stores them.
    Auto,
    /// bf16; an FP8 or FP4 checkpoint is dequantised at load.
    None,
    /// FP8, one scale per tensor; a bf16 checkpoint is quantised at load.
    Fp8PerTensor,
    /// FP8, one scale per output channel and per token; a bf16 checkpoint is quantised at load.
    Fp8Ptpc,
    /// FP8, one scale per 128x128 block and per 1x128 group; a bf16 checkpoint is quantised at load.
    Fp8Block,
    /// FP8, one scale per tensor for weights and activations, both from the checkpoint, which must have them.
    Fp8PerTensorStatic,
    /// FP4 weights with one scale per 32 columns, bf16 activations, of a checkpoint that is so.
    Mxfp4,
    /// FP4 weights and activations with two levels of scales, of a checkpoint that is so.
    Nvfp4,
}

/// Where the experts of a token are when a cost is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Draw {
    /// In the groups that a group-limited routing allows.
    #[value(alias = "group-limited")]
    Model,
    /// Anywhere.
    Uniform,
}

/// Numbers of ranks, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpSizes(pub Vec<usize>);

impl std::str::FromStr for EpSizes {
    type Err = String;

    /// `A..B` doubles from A and ends with B; otherwise a list.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse() {
            Ok(ranks @ 2..=MAX_EP) => Ok(ranks),
            Ok(ranks) => Err(format!("{ranks} ranks: at least 2 and at most {MAX_EP}")),
            Err(error) => Err(format!("{text:?}: {error}")),
        };
        let mut sizes: Vec<usize> = match text.split_once("..") {
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last {
                    return Err(format!("{first} is more than {last}"));
                }
                let doubled = std::iter::successors(Some(first), |ranks| Some(ranks * 2));
                doubled.take_while(|&ranks| ranks < last).chain([last]).collect()
            }
            None => text.split(',').map(number).collect::<Result<_, _>>()?,
        };
        sizes.sort_unstable();
        sizes.dedup();
        Ok(Self(sizes))
    }
}

/// Beyond what any group of GPUs has been run with.
const MAX_EP: usize = 4096;

/// What a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ranks {
    /// A thread of this process.
    Threads,
    /// A process of this machine.
    Processes,
    /// An MPI rank.
    Mpi,
}

/// Quantisation of a combine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CombineQuant {
    /// None: rows come back in bf16.
    #[default]
    None,
    /// FP8 with a scale for each 128 columns.
    Fp8Block,
}

/// Which layer, over which ranks, with which backends.
#[derive(Clone, Debug, Args)]
pub struct LayerArgs {
    /// Layer of the model; the first MoE layer if not given.
    #[arg(long, value_name = "N")]
    pub layer: Option<usize>,
    /// Ranks that share the experts.
    #[arg(long, value_name = "R", default_value_t = 1)]
    pub ep_size: usize,
    /// Where; a GPU holds one rank.
    #[arg(long, value_enum, default_value_t = OnDevice::Host)]
    pub device: OnDevice,
    /// Dispatch/combine backend; mori_high_throughput if not given, on a GPU local.
    #[arg(long, value_name = "NAME")]
    pub all2all: Option<String>,
    /// Experts backend.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub experts: String,
    /// Quantisation.
    #[arg(long, value_enum, default_value_t = Quant::Auto)]
    pub quant: Quant,
    /// As what outputs come back between ranks; lossy but for `none`.
    #[arg(long, value_enum, default_value_t = CombineQuant::None)]
    pub combine_quant: CombineQuant,
    /// How experts `aiter` sort rows by expert: auto, single or multi. The results are the same.
    #[arg(long, value_name = "P", default_value_t = SortPolicy::Auto)]
    pub sort_policy: SortPolicy,
    /// Ranks on one node; all of them if not given.
    #[arg(long, value_name = "G")]
    pub gpus_per_node: Option<usize>,
}

/// Arguments of `fmoe run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Folder with config.json and safetensors files.
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,
    /// The layer.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// File with `hidden_states`, [tokens, hidden] bf16 or f32.
    #[arg(long, value_name = "IN.safetensors")]
    pub input: PathBuf,
    /// File to write: `output`, `routed`, `topk_ids`, `topk_weights`.
    #[arg(long, value_name = "OUT.safetensors")]
    pub output: PathBuf,
    /// What a rank is.
    #[arg(long, value_enum, default_value_t = Ranks::Threads)]
    pub ranks: Ranks,
    /// Place experts and their replicas as this file of `fmoe eplb` says.
    #[arg(long, value_name = "PLACEMENT.json")]
    pub placement: Option<PathBuf>,
    /// File to write: the load of every expert, for `fmoe eplb`.
    #[arg(long, value_name = "LOAD.json")]
    pub record_load: Option<PathBuf>,
    /// Compare with the f64 oracle; an error above the tolerance is a failure.
    #[arg(long)]
    pub verify: bool,
    /// Block sizes and task grain from this file of `fmoe tune`, instead of those that come with the program.
    #[arg(long, value_name = "TABLE.toml")]
    pub tuning: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `fmoe tune`.
#[derive(Clone, Debug, Args)]
pub struct TuneArgs {
    /// Shapes: TOML files as in benches/definitions, or built-in names.
    #[arg(
        long,
        value_name = "NAME|FILE",
        value_delimiter = ',',
        default_value = "qwen3-30b-a3b,deepseek-v3-ep32"
    )]
    pub shapes: Vec<String>,
    /// Tokens per call; those of the shape if not given.
    #[arg(long, value_delimiter = ',')]
    pub tokens: Vec<usize>,
    /// Schemes of the weights: none and fp8-block.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["none", "fp8-block"])]
    pub quant: Vec<Quant>,
    /// Threads; all cores if not given.
    #[arg(long)]
    pub threads: Option<NonZeroUsize>,
    /// Timed calls per candidate, of which the median counts.
    #[arg(long, default_value_t = 9)]
    pub reps: usize,
    /// File to write, instead of standard output.
    #[arg(long, value_name = "TABLE.toml")]
    pub output: Option<PathBuf>,
}

/// Arguments of `fmoe launch`.
#[derive(Clone, Debug, Args)]
pub struct LaunchArgs {
    /// Ranks.
    #[arg(short = 'n', long, value_name = "N")]
    pub ranks: NonZeroUsize,
    /// Ranks on one node; all of them if not given.
    #[arg(long, value_name = "G")]
    pub gpus_per_node: Option<NonZeroUsize>,
    /// Seconds that a rank waits for another that does not answer.
    #[arg(long, value_name = "S", default_value = "30")]
    pub timeout_s: NonZeroU64,
    /// Seconds that the other ranks get to end by themselves after one has failed.
    #[arg(long, value_name = "S", default_value_t = 5)]
    pub grace_s: u64,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Arguments of `fmoe launch-rank`.
#[derive(Clone, Debug, Args)]
pub struct LaunchRankArgs {
    /// The process that launches; the rank ends with it.
    pub launcher: u32,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

/// Arguments of `fmoe demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Where; a GPU holds one rank.
    #[arg(long, value_enum, default_value_t = OnDevice::Host)]
    pub device: OnDevice,
    /// Ranks that share the experts; 8 if not given, on a GPU 1.
    #[arg(long, value_name = "R")]
    pub ep_size: Option<usize>,
    /// Tokens per layer call, over all ranks.
    #[arg(long, value_name = "T", default_value_t = 128)]
    pub tokens: usize,
    /// Keep the checkpoints in this folder, which must not exist yet.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
}

/// Arguments of `fmoe plan`.
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    /// Folder with config.json and safetensors files, of which only the headers are read. With --machine, the sizes of
    /// DeepSeek-V3 if not given.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["machine", "published"])]
    pub checkpoint: Option<PathBuf>,
    /// The layer.
    #[command(flatten)]
    pub layer: LayerArgs,
    /// Price dispatch and combine of every backend on this machine: a file as in crates/moe-cost/machines, or one of the
    /// built-in names (mi300x, mi355x, h100, h200, h200-efa, h800, b200).
    #[arg(long, value_name = "NAME|FILE", conflicts_with_all = ["ep_size", "all2all", "experts", "max_tokens"])]
    pub machine: Option<String>,
    /// With --machine: numbers of ranks, as 8..320 (8, 16, 32 and so on, and 320) or 8,16.
    #[arg(long, value_name = "A..B", default_value = "8..64", requires = "machine")]
    pub ep: EpSizes,
    /// With --machine: tokens that one rank brings to one call.
    #[arg(long, value_name = "T", value_delimiter = ',', default_values_t = [128, 4096], requires = "machine")]
    pub tokens: Vec<usize>,
    /// With --machine: experts drawn as the model's routing allows, or uniformly as in most benchmarks.
    #[arg(long, value_enum, default_value_t = Draw::Model, requires = "machine")]
    pub routing: Draw,
    /// Print what others have published beside what the cost model says of it.
    #[arg(long, conflicts_with_all = ["machine", "checkpoint"])]
    pub published: bool,
    /// Largest number of tokens that one rank brings to one call.
    #[arg(long, value_name = "T", default_value_t = 128)]
    pub max_tokens: usize,
    /// Place experts and their replicas as this file of `fmoe eplb` says.
    #[arg(long, value_name = "PLACEMENT.json")]
    pub placement: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `fmoe matrix`.
#[derive(Clone, Copy, Debug, Args)]
pub struct MatrixArgs {
    /// Backends for layers that run there.
    #[arg(long, value_enum, default_value_t = OnDevice::Host)]
    pub device: OnDevice,
    /// Print a Markdown table, as it stands in the README.
    #[arg(long)]
    pub markdown: bool,
    /// Print one JSON object.
    #[arg(long, conflicts_with = "markdown")]
    pub json: bool,
}

/// Where something runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnDevice {
    /// The CPU.
    Host,
    /// The first NVIDIA GPU.
    Cuda,
    /// The first AMD GPU.
    Hip,
}

impl OnDevice {
    /// The device, the first of its kind.
    pub const fn device(self) -> Device {
        let kind = match self {
            OnDevice::Host => DeviceKind::Host,
            OnDevice::Cuda => DeviceKind::Cuda,
            OnDevice::Hip => DeviceKind::Hip,
        };
        Device { kind, index: 0 }
    }
}

/// Arguments of `fmoe doctor`.
#[derive(Clone, Copy, Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}
