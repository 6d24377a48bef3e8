//! Providers of the toys.

use std::sync::Arc;

use fused_moe_core::{
    Axis, DType, DeviceKind, Error, ExpertMatrices, ExpertWeights, Experts, ExpertsCaps, ExpertsProvider,
    KernelKind, MoeConfig, Plan, PrepareCaps, PrepareFinalize, PrepareFinalizeProvider, ProcessGroup, Rank,
    Result, Stage, Support, Unsupported, WireBytes, WireFormat, check_expert_count,
};

use crate::toys::{ToyComm, ToyExperts, WORKSPACE};

/// A comm that carries `wires` for groups of at least `min_ranks`.
pub struct CommProvider {
    pub name: &'static str,
    pub wires: Vec<WireFormat>,
    pub min_ranks: usize,
    pub max_rows: usize,
    pub device: DeviceKind,
}

pub fn comm(name: &'static str) -> CommProvider {
    let wires = vec![WireFormat::unquantized(DType::Bf16)];
    CommProvider { name, wires, min_ranks: 1, max_rows: 7, device: DeviceKind::Host }
}

impl PrepareFinalizeProvider for CommProvider {
    fn name(&self) -> &'static str {
        self.name
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        let mut why = Vec::new();
        if kind != KernelKind::Modular {
            why.push(Unsupported::new(Axis::KernelKind, kind.name(), "modular"));
        }
        if config.ep_size() < self.min_ranks {
            let (wanted, found) = (self.min_ranks, config.ep_size());
            why.push(Unsupported::new(Axis::Parallel, format!("{wanted} ranks"), found.to_string()));
        }
        let mut caps = PrepareCaps::host(self.name, kind, self.wires.clone(), self.max_rows);
        caps.devices = vec![self.device];
        Support::unless(why, caps)
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        ToyComm::bytes(config, plan.max_rows())
    }

    fn wire_bytes_per_token(&self, _config: &MoeConfig, _plan: &Plan) -> WireBytes {
        WireBytes { dispatch: 0.0, combine: 0.0 }
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let Support::Supported(caps) = self.supports(config, plan.kind()) else {
            return Err(Error::contract(Stage::QuantizeDispatch, self.name, "not supported"));
        };
        Ok(PrepareFinalize::Modular(Box::new(ToyComm::new(caps, config, group.rank(), Arc::default()))))
    }
}

/// Experts that accept `caps.accepts`, or nothing at all.
pub struct ToyProvider {
    pub caps: ExpertsCaps,
    pub refuses: Vec<Unsupported>,
}

pub fn experts(name: &'static str, accepts: Vec<WireFormat>) -> ToyProvider {
    ToyProvider { caps: ExpertsCaps::host(name, accepts), refuses: Vec::new() }
}

impl ExpertsProvider for ToyProvider {
    fn name(&self) -> &'static str {
        self.caps.name
    }

    fn supports(&self, _config: &MoeConfig) -> Support<ExpertsCaps> {
        Support::unless(self.refuses.clone(), self.caps.clone())
    }

    fn workspace_bytes(&self, _config: &MoeConfig, _plan: &Plan) -> usize {
        WORKSPACE
    }

    fn build(&self, config: &MoeConfig, _plan: &Plan, _rank: Rank) -> Result<Experts> {
        let fail = Arc::default();
        Ok(Experts::Modular(Box::new(ToyExperts { caps: self.caps.clone(), config: config.clone(), fail })))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        check_expert_count(self.caps.name, config, rank, experts)?;
        Ok(ExpertWeights::new(self.caps.name, (), 0))
    }
}
