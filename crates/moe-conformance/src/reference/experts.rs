//! Modular experts on the standard format.

use fused_moe_core::{
    ActivationFormat, Arrived, Axis, DType, DeviceKind, Dispatched, Error, ExecCx, ExpertMap, ExpertMatrices,
    ExpertWeights, Experts, ExpertsCaps, ExpertsModular, ExpertsProvider, MoeConfig, Plan, Rank, Result,
    RouterWeight, Stage, Support, TensorViewMut, Unsupported, WireFormat,
};

use super::compute::{Compute, Pair};
use super::slip::Slip;
use super::weights::{Format, PackedExperts};

const NAME: &str = "reference_experts";

/// Which local expert an id of the batch means to a kernel.
pub(crate) type LocalTable = Vec<Option<usize>>;

/// Makes modular host experts, named `reference_experts`: standard format, every scheme and activation,
/// biases and padding, quantised or bf16 rows,
/// weighted and reduced output.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceExperts;

/// What every reference backend refuses.
pub(super) fn refusals(config: &MoeConfig) -> Vec<Unsupported> {
    let mut why = Vec::new();
    if config.in_dtype != DType::Bf16 {
        why.push(Unsupported::new(Axis::DType, config.in_dtype.name(), DType::Bf16.name()));
    }
    if config.device != DeviceKind::Host {
        why.push(Unsupported::new(Axis::Device, format!("{:?}", config.device), "Host"));
    }
    why
}

/// Wire formats of the scheme: quantised rows, and bf16 rows that the experts quantise themselves.
pub(super) fn wires(config: &MoeConfig) -> Vec<WireFormat> {
    let mut wires = vec![config.quant.quantized_wire(config.in_dtype)];
    if config.quant.fp8().is_some() {
        wires.push(WireFormat::unquantized(config.in_dtype));
    }
    wires
}

/// The local experts of `rank` by global id.
pub(crate) fn local_table(config: &MoeConfig, rank: Rank) -> LocalTable {
    let map = ExpertMap::new(&config.placement, rank);
    (0..config.num_experts() as i32).map(|id| map.local(id).map(|local| local.0 as usize)).collect()
}

impl ExpertsProvider for ReferenceExperts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        let mut caps = ExpertsCaps::host(NAME, wires(config));
        caps.weight_on_input = true;
        Support::unless(refusals(config), caps)
    }

    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        Compute::new(config, plan.max_rows(), plan.max_rows() * config.top_k).workspace_bytes()
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        let table = local_table(config, rank);
        Ok(Experts::Modular(Box::new(ReferenceKernel::new(config, plan, table))))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        PackedExperts::pack(NAME, config, rank, experts, Format::Stored)
    }
}

/// The kernel of one rank.
pub(crate) struct ReferenceKernel {
    caps: ExpertsCaps,
    compute: Compute,
    router_weight: RouterWeight,
    table: LocalTable,
}

impl ReferenceKernel {
    /// The kernel of a rank whose local experts are those of `table`.
    pub(crate) fn new(config: &MoeConfig, plan: &Plan, table: LocalTable) -> Self {
        let mut caps = ExpertsCaps::host(plan.experts(), vec![plan.wire()]);
        caps.weight_on_input = true;
        debug_assert_eq!(plan.format(), ActivationFormat::Standard);
        let compute = Compute::new(config, plan.max_rows(), plan.max_rows() * config.top_k);
        Self { caps, compute, router_weight: plan.router_weight(), table }
    }

    /// The kernel with something wrong.
    pub(crate) fn slipping(mut self, slip: Slip) -> Self {
        self.compute.slip = Some(slip);
        self
    }

    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        packed: &PackedExperts,
        input: &Dispatched<'_>,
        out: &mut TensorViewMut<'_>,
    ) -> Result<(), fused_moe_core::Source> {
        let Arrived::Standard { topk, rows } = input.arrived else {
            return Err("the batch is not in the standard format".into());
        };
        let valid: Vec<usize> = (0..rows.on_host()?).collect();
        let mut arena = cx.workspace.reborrow();
        let x = self.compute.arrived((input, packed.input_scales[0]), &valid, &mut arena)?;
        let mut pairs = Vec::new();
        let mut late = Vec::new();
        for &row in &valid {
            let (ids, weights) = (topk.ids.row::<i32>(row)?, topk.weights.row::<f32>(row)?);
            for (slot, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
                let local = usize::try_from(id).ok().and_then(|id| *self.table.get(id)?);
                let Some(expert) = local else { continue };
                let weight = self.compute.slip.map_or(weight, |slip| slip.routing_weight(slot, weight));
                let on_input = self.router_weight == RouterWeight::OnInputByExperts;
                pairs.push(Pair { row, expert, early: if on_input { weight } else { 1.0 } });
                late.push(if self.router_weight == RouterWeight::OnOutput { weight } else { 1.0 });
            }
        }
        let outputs = self.compute.run(packed, x, &pairs, &mut arena)?;
        self.compute.write_sums((outputs, &pairs, &late), valid.len(), out)?;
        Ok(())
    }
}

impl ExpertsModular for ReferenceKernel {
    fn caps(&self) -> &ExpertsCaps {
        &self.caps
    }

    fn workspace_bytes(&self) -> usize {
        self.compute.workspace_bytes()
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let packed = PackedExperts::of(weights, self.caps.name)?;
        self.run(cx, packed, input, &mut out)
            .map_err(|why| Error::contract(Stage::Experts, self.caps.name, why))
    }
}
