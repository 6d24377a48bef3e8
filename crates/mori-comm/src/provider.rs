//! The providers: what is offered, what it costs, and how a handle is built.

use ep_transport::transport_of;
use fused_moe_core::{
    Axis, CommTraffic, DType, DeviceKind, Error, KernelKind, MoeConfig, PartialSums, Plan, PrepareCaps,
    PrepareFinalize, PrepareFinalizeProvider, ProcessGroup, Result, Stage, Support, Unsupported, WireBytes,
    WireFormat,
};

use crate::buffers::Buffers;
use crate::handle::Handle;
use crate::kernel_type::{KernelType, MoriBackend};
use crate::traffic::traffic;

impl PrepareFinalizeProvider for MoriBackend {
    fn name(&self) -> &'static str {
        (*self).name()
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        let mut why = Vec::new();
        let kernel = KernelType::select(*self, config);
        let (ranks, per_node) = (config.ep_size(), config.ranks_per_node);
        if kernel != KernelType::IntraNode && !ranks.is_multiple_of(per_node) {
            // Every rank has a proxy in its place of every other node.
            let wanted = format!("nodes of one size ({})", kernel.name());
            why.push(Unsupported::new(
                Axis::Parallel,
                wanted,
                format!("{ranks} ranks on nodes of {per_node}"),
            ));
        }
        if kind != KernelKind::Modular {
            why.push(Unsupported::new(Axis::KernelKind, kind.name(), KernelKind::Modular.name()));
        }
        if config.in_dtype != DType::Bf16 {
            why.push(Unsupported::new(Axis::DType, config.in_dtype.name(), DType::Bf16.name()));
        }
        if config.device != DeviceKind::Host {
            why.push(Unsupported::new(Axis::Device, format!("{:?}", config.device), "Host"));
        }
        Support::unless(why, caps(*self, config))
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        Buffers::new(config, plan).required_bytes() + Handle::local_bytes(config, plan)
    }

    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        traffic(*self, config, &plan.wire()).into()
    }

    fn traffic(&self, config: &MoeConfig, wire: &WireFormat) -> Option<CommTraffic> {
        Some(traffic(*self, config, wire))
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let backend = MoriBackend::name(*self);
        let contract = |why: String| Error::contract(Stage::QuantizeDispatch, backend, why);
        let transport = transport_of(group)
            .ok_or_else(|| contract("the process group has no ep-transport underneath".to_string()))?;
        if transport.world_size() != config.ep_size() {
            let (ranks, wanted) = (transport.world_size(), config.ep_size());
            return Err(contract(format!("the transport has {ranks} ranks, the placement {wanted}")));
        }
        if !transport.ranks_per_node().is_multiple_of(config.ranks_per_node.min(config.ep_size())) {
            let (real, wanted) = (transport.ranks_per_node(), config.ranks_per_node);
            return Err(contract(format!(
                "the transport has nodes of {real} ranks, the configuration of {wanted}"
            )));
        }
        let kernel = KernelType::select(*self, config);
        let handle = Handle::new(kernel, caps(*self, config), (config, plan), transport)?;
        Ok(PrepareFinalize::Modular(Box::new(handle)))
    }
}

fn caps(backend: MoriBackend, config: &MoeConfig) -> PrepareCaps {
    let mut wires = vec![WireFormat::unquantized(config.in_dtype)];
    let quantized = config.quant.quantized_wire(config.in_dtype);
    if quantized.scale.is_some() {
        wires.push(quantized);
    }
    let all_rows = config.ep_size() * config.max_tokens_per_rank;
    let max_rows = config.max_received_rows.map_or(all_rows, |most| most.min(all_rows));
    let mut caps = PrepareCaps::host(MoriBackend::name(backend), KernelKind::Modular, wires, max_rows);
    caps.weight_on_input = true;
    caps.in_place_output = true;
    caps.combine_wire = config.combine_wire;
    if !config.is_single_node() {
        caps.partial_sums = PartialSums::OfNodes { ranks_per_node: config.ranks_per_node };
    }
    caps
}
