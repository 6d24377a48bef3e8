//! What a token is expected to move, by the kernel that a backend runs on a topology.

use fused_moe_core::{CommTraffic, ExpectedSpread, MoeConfig, PerLink, Protocol, WireFormat};

use crate::kernel_type::{KernelType, MoriBackend};

/// The traffic of `backend` under `config` when tokens travel as `wire`.
///
/// A copy carries payload, scales, all k ids and weights, and its source; what comes back is a row of outputs or
/// of partial sums.
pub(crate) fn traffic(backend: MoriBackend, config: &MoeConfig, wire: &WireFormat) -> CommTraffic {
    let routing = config.top_k * (size_of::<i32>() + size_of::<f32>());
    let row =
        wire.payload_bytes(config.hidden) + wire.scale_bytes(config.hidden) + routing + size_of::<u32>();
    let back = config.combine_wire.format(config.in_dtype);
    let output = back.payload_bytes(config.hidden) + back.scale_bytes(config.hidden);
    let spread = ExpectedSpread::new(config);
    let (protocol, copies) = match KernelType::select(backend, config) {
        KernelType::IntraNode => (Protocol::ONE_HOP, spread.per_rank()),
        KernelType::InterNodeV1 => (Protocol::TWO_HOP, spread.per_node()),
        // Whole windows go to every node, whether all of their tokens have business there or not.
        KernelType::InterNodeV1LL => {
            let other_nodes = config.ep_size().div_ceil(config.ranks_per_node) - 1;
            let copies = PerLink { network: other_nodes as f64, ..spread.per_node() };
            (Protocol::TWO_HOP_LOW_LATENCY, copies)
        }
    };
    CommTraffic { protocol, dispatch: copies * row, combine: copies * output }
}

#[cfg(test)]
mod tests {
    use fused_moe_core::{DType, ExpertPlacement, Fp8Format, QuantScheme};

    use super::*;

    /// KB per token of DeepSeek-V3's sizes in FP8 with 1x128 scales, 8 ranks per node, uniform routing.
    #[test]
    fn bytes_per_token() {
        use MoriBackend::{HighThroughput, LowLatency};
        let wire = QuantScheme::Fp8Block(Fp8Format::E4M3Fn).quantized_wire(DType::Bf16);
        for (backend, ranks, protocol, kbytes) in [
            (HighThroughput, 8, Protocol::ONE_HOP, [34.6, 0.0, 66.4, 0.0]),
            (LowLatency, 8, Protocol::ONE_HOP, [34.6, 0.0, 66.4, 0.0]),
            (HighThroughput, 32, Protocol::TWO_HOP, [47.4, 20.2, 91.2, 38.9]),
            (LowLatency, 32, Protocol::TWO_HOP_LOW_LATENCY, [47.4, 22.4, 91.2, 43.0]),
        ] {
            let config = MoeConfig {
                hidden: 7168,
                top_k: 8,
                ranks_per_node: 8,
                ..MoeConfig::new(ExpertPlacement::linear(256, ranks).unwrap())
            };
            let got = traffic(backend, &config, &wire);
            assert_eq!(got.protocol, protocol);
            let bytes =
                [got.dispatch.scale_up, got.dispatch.network, got.combine.scale_up, got.combine.network];
            for (got, want) in bytes.into_iter().zip(kbytes) {
                assert!((got / 1e3 - want).abs() < 0.06, "{backend:?}, {ranks} ranks: {bytes:?}");
            }
        }
    }
}
