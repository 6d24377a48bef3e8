//! Arguments of `fmoe bench`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use fused_moe::RoutingMethod;

use super::{Draw, OnDevice, Quant, Ranks};

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Dispatch and combine of every backend, beside a copy probe in the same process.
    Comm(BenchCommArgs),
    /// The experts of one rank, beside a peak and a bandwidth probe in the same process.
    Experts(BenchExpertsArgs),
    /// Activations to FP8 with one scale per 128 columns, beside a copy on the same device.
    Quant(BenchQuantArgs),
    /// Logits to experts and weights; on a GPU, to the sorted pairs of each expert.
    Router(BenchRouterArgs),
}

/// Arguments of `fmoe bench quant`.
#[derive(Clone, Debug, Args)]
pub struct BenchQuantArgs {
    /// Where.
    #[arg(long, value_enum, default_value_t = OnDevice::Host)]
    pub device: OnDevice,
    /// Elements of a token.
    #[arg(long, default_value_t = 7168)]
    pub hidden: usize,
    /// Tokens of a call.
    #[arg(long, value_name = "T", value_delimiter = ',', default_values_t = [128, 1024, 4096, 32768])]
    pub tokens: Vec<usize>,
    /// Timed samples per row, of which the median counts.
    #[arg(long, default_value_t = 21)]
    pub reps: usize,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `fmoe bench router`.
#[derive(Clone, Debug, Args)]
pub struct BenchRouterArgs {
    /// Where.
    #[arg(long, value_enum, default_value_t = OnDevice::Host)]
    pub device: OnDevice,
    /// Experts with a logit.
    #[arg(long, default_value_t = 256)]
    pub experts: usize,
    /// Experts per token.
    #[arg(long, default_value_t = 8)]
    pub top_k: usize,
    /// Routing methods. DeepSeek's take the best 4 of 8 groups.
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        default_values_t = [RoutingMethod::DeepSeekV3, RoutingMethod::RenormalizeNaive]
    )]
    pub routing: Vec<RoutingMethod>,
    /// Tokens of a call.
    #[arg(long, value_name = "T", value_delimiter = ',', default_values_t = [1, 64, 256, 1024, 4096, 32768])]
    pub tokens: Vec<usize>,
    /// Timed samples per row, of which the median counts.
    #[arg(long, default_value_t = 21)]
    pub reps: usize,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `fmoe bench comm`.
#[derive(Clone, Debug, Args)]
pub struct BenchCommArgs {
    /// Dispatch/combine backends; all if not given.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub all2all: Vec<String>,
    /// Numbers of ranks.
    #[arg(long, value_name = "R", value_delimiter = ',', default_values_t = [8])]
    pub ep_size: Vec<usize>,
    /// Ranks on one (simulated) node; all of them if not given.
    #[arg(long, value_name = "G")]
    pub gpus_per_node: Option<usize>,
    /// What a rank is; both kinds if not given.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Ranks::Threads, Ranks::Processes])]
    pub ranks: Vec<Ranks>,
    /// Tokens that one rank brings to one call.
    #[arg(long, value_name = "T", value_delimiter = ',', default_values_t = [1, 8, 128, 512, 4096])]
    pub tokens: Vec<usize>,
    /// Tokens over all ranks instead, so that groups of different sizes do the same work.
    #[arg(long, value_name = "T", value_delimiter = ',', conflicts_with = "tokens")]
    pub total_tokens: Vec<usize>,
    /// Quantisation of what dispatch sends.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Quant::None, Quant::Fp8Block, Quant::Fp8Ptpc])]
    pub quant: Vec<Quant>,
    /// Where experts are drawn from: uniform, or model for 4 of 8 groups as DeepSeek-V3 routes.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Draw::Uniform, Draw::Model])]
    pub routing: Vec<Draw>,
    /// Elements of a token.
    #[arg(long, default_value_t = 7168)]
    pub hidden: usize,
    /// Experts over all ranks.
    #[arg(long, default_value_t = 256)]
    pub experts: usize,
    /// Experts per token.
    #[arg(long, default_value_t = 8)]
    pub top_k: usize,
    /// Timed samples per row, of which the median counts.
    #[arg(long, default_value_t = 9)]
    pub reps: usize,
    /// Refuse what needs more memory over all ranks.
    #[arg(long, default_value_t = 12.0)]
    pub max_gib: f64,
    /// File to write the rows to, as CSV.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `fmoe bench experts`.
#[derive(Clone, Debug, Args)]
pub struct BenchExpertsArgs {
    /// Shapes: a TOML file as in benches/definitions, or one of the built-in names.
    #[arg(long, value_name = "NAME|FILE", default_value = "qwen3-30b-a3b")]
    pub shape: String,
    /// Tokens per call; those of the shape if not given.
    #[arg(long, value_delimiter = ',')]
    pub tokens: Vec<usize>,
    /// Quantisation schemes; all if not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub quant: Vec<Quant>,
    /// Experts in f32 instead, by the grouped GEMM alone: no backend runs a layer in f32.
    #[arg(long, conflicts_with_all = ["quant", "device", "ep_size", "tuning"])]
    pub f32: bool,
    /// Where; a GPU runs stage 3 alone, from sorting to the weighted sum.
    #[arg(long, value_enum, default_value_t = OnDevice::Host, conflicts_with_all = ["ep_size", "threads", "routing", "tuning"])]
    pub device: OnDevice,
    /// On a GPU: the experts are those of one of R ranks, each with as many tokens.
    #[arg(long, value_name = "R", default_value_t = 1)]
    pub slice_of: usize,
    /// On a GPU: experts of a token over all ranks; that of the shape if not given.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Ranks of this process that share the experts and the tokens; their calls are measured by wall time.
    #[arg(long, default_value_t = 1)]
    pub ep_size: usize,
    /// Threads; all cores if not given.
    #[arg(long)]
    pub threads: Option<NonZeroUsize>,
    /// Timed calls per row, of which the median counts.
    #[arg(long, default_value_t = 9)]
    pub reps: usize,
    /// The calls to time, instead of random ones: a JSON file `{"calls": [[id, …], …]}` with the expert ids of each
    /// call, token by token.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tokens", "reps"])]
    pub routing: Option<PathBuf>,
    /// Block sizes and task grain from this file of `fmoe tune`, instead of those that come with the program.
    #[arg(long, value_name = "TABLE.toml")]
    pub tuning: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}
