//! Backend names, and the kernel that a name runs on a topology.

use fused_moe_core::MoeConfig;

/// The names that an engine chooses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MoriBackend {
    /// `mori_high_throughput`.
    HighThroughput,
    /// `mori_low_latency`.
    LowLatency,
}

impl MoriBackend {
    /// Both, in the order in which a registry should prefer them.
    pub const ALL: [MoriBackend; 2] = [MoriBackend::HighThroughput, MoriBackend::LowLatency];

    /// The name as vLLM spells it.
    pub const fn name(self) -> &'static str {
        match self {
            MoriBackend::HighThroughput => "mori_high_throughput",
            MoriBackend::LowLatency => "mori_low_latency",
        }
    }
}

/// MoRI's dispatch/combine kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KernelType {
    /// All ranks reach each other's memory: one copy per (token, rank).
    IntraNode,
    /// Several nodes, one compacted copy per (token, node), forwarded inside the node.
    InterNodeV1,
    /// Several nodes, whole windows of tokens to every node.
    InterNodeV1LL,
}

impl KernelType {
    /// What `backend` runs under `config`.
    pub fn select(backend: MoriBackend, config: &MoeConfig) -> Self {
        match backend {
            _ if config.is_single_node() => KernelType::IntraNode,
            MoriBackend::HighThroughput => KernelType::InterNodeV1,
            MoriBackend::LowLatency => KernelType::InterNodeV1LL,
        }
    }

    /// MoRI's name of the kernel.
    pub const fn name(self) -> &'static str {
        match self {
            KernelType::IntraNode => "IntraNode",
            KernelType::InterNodeV1 => "InterNodeV1",
            KernelType::InterNodeV1LL => "InterNodeV1LL",
        }
    }
}
