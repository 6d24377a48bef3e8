//! Providers that are shared or that only exist for their capabilities.

use std::sync::Arc;

use fused_moe_core::{
    ActivationFormat, CombineKind, Error, ExpertMatrices, ExpertWeights, Experts, ExpertsCaps,
    ExpertsProvider, KernelKind, MoeConfig, Plan, PrepareCaps, PrepareFinalize, PrepareFinalizeProvider,
    ProcessGroup, Rank, Result, Stage, Support, TopKWeightAndReduce, WireBytes, WireFormat,
};

/// A provider under test, as one that a registry can own.
#[derive(Clone)]
pub(crate) struct SharedComm(pub(crate) Arc<dyn PrepareFinalizeProvider>);

impl PrepareFinalizeProvider for SharedComm {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        self.0.supports(config, kind)
    }
    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        self.0.required_bytes(config, plan)
    }
    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        self.0.wire_bytes_per_token(config, plan)
    }
    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        self.0.build(config, plan, group)
    }
}

/// A provider under test, as one that a registry can own.
#[derive(Clone)]
pub(crate) struct SharedExperts(pub(crate) Arc<dyn ExpertsProvider>);

impl ExpertsProvider for SharedExperts {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        self.0.supports(config)
    }
    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        self.0.workspace_bytes(config, plan)
    }
    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        self.0.build(config, plan, rank)
    }
    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        self.0.pack(config, rank, experts)
    }
}

const PROBE: &str = "conformance_probe";

/// Experts that exist as capabilities only: the other side of a negotiation with a comm under test.
#[derive(Clone, Copy)]
pub(crate) struct Probe {
    pub(crate) kind: KernelKind,
    pub(crate) wire: WireFormat,
}

impl Probe {
    /// The capabilities that suit `comm` in everything but the wire format.
    pub(crate) fn caps(self, comm: Option<&PrepareCaps>) -> ExpertsCaps {
        let mut caps = ExpertsCaps::host(PROBE, vec![self.wire]);
        caps.kind = self.kind;
        caps.weight_on_input = true;
        if let Some(comm) = comm {
            caps.format = comm.format;
            caps.topk_id = comm.topk_id;
            if comm.combine == CombineKind::WeightAndReduce {
                caps.weight_and_reduce = TopKWeightAndReduce::delegate();
            }
            // Batched rows carry no weight with them.
            caps.weight_on_input = comm.format == ActivationFormat::Standard;
        }
        caps
    }
}

impl ExpertsProvider for Probe {
    fn name(&self) -> &'static str {
        PROBE
    }
    fn supports(&self, _config: &MoeConfig) -> Support<ExpertsCaps> {
        Support::Supported(self.caps(None))
    }
    fn workspace_bytes(&self, _config: &MoeConfig, _plan: &Plan) -> usize {
        0
    }
    fn build(&self, _config: &MoeConfig, _plan: &Plan, _rank: Rank) -> Result<Experts> {
        Err(Error::contract(Stage::Experts, PROBE, "capabilities only"))
    }
    fn pack(
        &self,
        _config: &MoeConfig,
        _rank: Rank,
        _experts: &[ExpertMatrices<'_>],
    ) -> Result<ExpertWeights> {
        Err(Error::contract(Stage::Experts, PROBE, "capabilities only"))
    }
}
