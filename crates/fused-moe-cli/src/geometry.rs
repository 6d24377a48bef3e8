//! Launch geometry of MoRI's kernels in a projection, with the row of the tuning table that it is from.

use fused_moe::mori_comm::tuning::{Half, Problem, low_latency_up_to, tune};
use fused_moe::mori_comm::{KernelType, MoriBackend};
use fused_moe::{MoeConfig, WireFormat};
use serde::Serialize;

/// One launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Launch {
    kernel: &'static str,
    half: &'static str,
    tokens: usize,
    block_num: u32,
    rdma_block_num: u32,
    warps_per_block: u32,
    /// File and key of the row, or "heuristic".
    source: String,
}

/// Dispatch and combine of `all2all` with `tokens` per rank on GPUs of `arch`; nothing for a backend without a table.
pub fn launches(
    all2all: &str,
    arch: &str,
    config: &MoeConfig,
    wire: &WireFormat,
    tokens: usize,
) -> Vec<Launch> {
    let Some(backend) = MoriBackend::ALL.into_iter().find(|backend| backend.name() == all2all) else {
        return Vec::new();
    };
    let kernel = KernelType::select(backend, config);
    let halves = [(Half::Dispatch, "dispatch", wire.payload), (Half::Combine, "combine", config.in_dtype)];
    let launch = |(half, name, dtype)| {
        let (hidden, top_k) = (config.hidden, config.top_k);
        let tuned = tune(&Problem { arch, kernel, half, dtype, hidden, top_k, tokens });
        Launch {
            kernel: kernel.name(),
            half: name,
            tokens,
            block_num: tuned.launch.block_num,
            rdma_block_num: tuned.launch.rdma_block_num,
            warps_per_block: tuned.launch.warps_per_block,
            source: tuned.source.to_string(),
        }
    };
    halves.into_iter().map(launch).collect()
}

/// Where the tuning table sees the end of low latency between nodes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Crossover {
    /// InterNodeV1LL is no slower than InterNodeV1 up to so many tokens per rank.
    pub low_latency_up_to: usize,
    /// Whether that was measured; else it is a guess.
    pub measured: bool,
}

/// The crossover on GPUs of `arch`.
pub fn crossover(arch: &str, config: &MoeConfig, wire: &WireFormat) -> Crossover {
    let (low_latency_up_to, measured) = low_latency_up_to(arch, wire.payload, config.hidden);
    Crossover { low_latency_up_to, measured }
}

impl std::fmt::Display for Launch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kernel, half, tokens, block_num, rdma_block_num, warps_per_block, source } = self;
        write!(
            f,
            "{kernel} {half}, {tokens} tokens: {block_num} blocks ({rdma_block_num} for the network) of \
             {warps_per_block} warps, {source}"
        )
    }
}
