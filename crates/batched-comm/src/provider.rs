//! The provider: what is offered, what it costs, and how a handle is built.

use std::sync::Arc;

use ep_transport::{ThreadGroup, ThreadOptions, Transport, transport_of};
use fused_moe_core::{
    ActivationFormat, Axis, CombineKind, CommTraffic, DType, DeviceKind, Error, KernelKind, MoeConfig, Plan,
    PrepareCaps, PrepareFinalize, PrepareFinalizeProvider, ProcessGroup, Protocol, Result, Stage, Support,
    Unsupported, WireBytes, WireFormat, copies_per_slot,
};

use crate::NAME;
use crate::buffers::{Buffers, Shape, dispatch_row_bytes};
use crate::low_latency::LowLatency;

/// Makes the backend `batched`: one batch of rows per expert, a combine that weights and reduces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batched;

impl PrepareFinalizeProvider for Batched {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        let mut why = Vec::new();
        if kind != KernelKind::Modular {
            why.push(Unsupported::new(Axis::KernelKind, kind.name(), KernelKind::Modular.name()));
        }
        if config.in_dtype != DType::Bf16 {
            why.push(Unsupported::new(Axis::DType, config.in_dtype.name(), DType::Bf16.name()));
        }
        if config.device != DeviceKind::Host {
            why.push(Unsupported::new(Axis::Device, format!("{:?}", config.device), "Host"));
        }
        Support::unless(why, caps(config))
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        let shape = Shape::new(config, plan);
        Buffers::new(&shape).layout().size().required_bytes().saturating_add(shape.local_bytes())
    }

    /// As the trait says. The counts, four bytes for every expert and rank of a round, are not any token's.
    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        traffic(config, &plan.wire()).into()
    }

    fn traffic(&self, config: &MoeConfig, wire: &WireFormat) -> Option<CommTraffic> {
        Some(traffic(config, wire))
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let contract = |why: String| Error::contract(Stage::QuantizeDispatch, NAME, why);
        let transport = match transport_of(group) {
            Some(transport) => transport,
            // One rank reaches its own memory in any group.
            None if group.world_size() == 1 => alone()?,
            None => return Err(contract("the process group has no ep-transport underneath".into())),
        };
        if transport.world_size() != config.ep_size() {
            let (ranks, wanted) = (transport.world_size(), config.ep_size());
            return Err(contract(format!("the transport has {ranks} ranks, the placement {wanted}")));
        }
        let handle = LowLatency::new(caps(config), config, plan, transport)?;
        Ok(PrepareFinalize::Modular(Box::new(handle)))
    }
}

/// A copy per slot; what goes with it is its slot alone, as its place says the expert.
fn traffic(config: &MoeConfig, wire: &WireFormat) -> CommTraffic {
    let (copies, hidden) = (copies_per_slot(config), config.hidden);
    CommTraffic {
        protocol: Protocol::PER_EXPERT,
        dispatch: copies * dispatch_row_bytes(wire.payload_bytes(hidden), wire.scale_bytes(hidden)),
        combine: copies * (hidden * config.in_dtype.size_bytes()),
    }
}

/// The transport of a group of one rank.
fn alone() -> Result<Arc<dyn Transport>> {
    let made = ThreadGroup::new(1, ThreadOptions::default());
    let ranks = made.map_err(|error| error.into_core(Stage::QuantizeDispatch, NAME, 0))?;
    let mut ranks = ranks.into_iter().map(|rank| -> Arc<dyn Transport> { rank });
    ranks.next().ok_or_else(|| Error::contract(Stage::QuantizeDispatch, NAME, "a group has no ranks"))
}

fn caps(config: &MoeConfig) -> PrepareCaps {
    let mut wires = vec![WireFormat::unquantized(config.in_dtype)];
    let quantized = config.quant.quantized_wire(config.in_dtype);
    if quantized.scale.is_some() {
        wires.push(quantized);
    }
    let max_rows = config.ep_size().saturating_mul(config.max_tokens_per_rank);
    let mut caps = PrepareCaps::host(NAME, KernelKind::Modular, wires, max_rows);
    caps.format = ActivationFormat::BatchedExperts;
    caps.combine = CombineKind::WeightAndReduce;
    caps.weight_on_input = true;
    caps
}
