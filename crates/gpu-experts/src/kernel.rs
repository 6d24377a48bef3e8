//! The built kernel: one call is the launches of `moe_kernels::experts` on the lent stream.

use fused_moe_core::{
    ActivationFormat, Arrived, DType, Dispatched, ExecCx, ExpertWeights, ExpertsCaps, ExpertsModular,
    MoeConfig, Plan, Rank, Result, RouterWeight, TensorViewMut, WireFormat,
};
use moe_kernels::Gpu;
use moe_kernels::experts::{ExpertsCall, ExpertsShape};
use moe_kernels::grouped_gemm::TokenTile;

use crate::error::GpuExpertsError;
use crate::weights::{Layout, PackedExperts};
use crate::{NAME, limits};

/// Experts of one rank for one configuration and plan.
#[derive(Debug)]
pub(crate) struct GpuKernel {
    gpu: Gpu,
    tile: Option<TokenTile>,
    caps: ExpertsCaps,
    shape: ExpertsShape,
    layout: Layout,
    wire: WireFormat,
    max_rows: usize,
    workspace_bytes: usize,
}

impl GpuKernel {
    pub(crate) fn new(
        (gpu, tile): (&Gpu, Option<TokenTile>),
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
    ) -> Result<Self, GpuExpertsError> {
        let reasons = limits::reasons(config);
        let shape = limits::shape(config, rank, gpu.compute_units()).filter(|_| reasons.is_empty());
        let shape = shape.ok_or(GpuExpertsError::Refused(reasons))?;
        check_plan(plan, config)?;
        let layout = Layout::new(config, rank, &shape);
        let workspace_bytes = limits::workspace_bytes(config, plan.max_rows());
        tracing::debug!(%layout, device = %gpu.device(), workspace_bytes, "built experts");
        Ok(Self {
            gpu: gpu.clone(),
            tile,
            caps: limits::caps(config),
            shape,
            layout,
            wire: plan.wire(),
            max_rows: plan.max_rows(),
            workspace_bytes,
        })
    }

    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), GpuExpertsError> {
        let gpu = &self.gpu;
        let stream = gpu.stream(cx.stream)?;
        let packed = PackedExperts::of(weights, gpu, &self.layout)?;
        let Arrived::Standard { topk, rows } = input.arrived else {
            let (found, wanted) = ("batches per expert".into(), "one row per token".into());
            return Err(GpuExpertsError::Received { found, wanted });
        };
        // How many rows there are decides the grids, so the host has to know.
        let rows = rows.on_host()?;
        let (max_rows, hidden, top_k) = (self.max_rows, self.shape.hidden, self.shape.top_k);
        if rows > max_rows {
            let (found, wanted) = (format!("{rows} rows"), format!("at most {max_rows}"));
            return Err(GpuExpertsError::Received { found, wanted });
        }
        let scales = match (self.wire.scale, input.scale) {
            (None, _) => 0,
            (Some(scale), Some(view)) => {
                let dims = [max_rows, scale.granularity.scales_per_token(hidden)];
                gpu.address("scales", view, &dims, scale.dtype)?
            }
            (Some(_), None) => {
                let (found, wanted) = ("no scales".into(), format!("rows as {}", self.wire));
                return Err(GpuExpertsError::Received { found, wanted });
            }
        };
        let slots = [max_rows, top_k];
        let tokens = gpu.address("hidden states", input.hidden, &[max_rows, hidden], self.wire.payload)?;
        let ids = gpu.address("top-k ids", topk.ids, &slots, DType::I32)?;
        let routing_weights = gpu.address("top-k weights", topk.weights, &slots, DType::F32)?;
        let out = gpu.address("outputs", out.as_view(), &[max_rows, hidden], DType::Bf16)?;
        let bytes = [self.shape.workspace_bytes(rows)];
        let workspace = cx.workspace.reborrow().take_tensor(DType::U8, &bytes)?;
        let workspace = gpu.address("bytes of workspace", workspace.as_view(), &bytes, DType::U8)?;
        if rows == 0 {
            return Ok(());
        }
        if self.shape.experts == 0 {
            // SAFETY: `out` was lent exclusively, and is as long by its shape; what a stream lends stays (`DeviceStream::new`).
            unsafe { stream.fill(out, 0, rows * hidden * size_of::<u16>())? };
            return Ok(());
        }
        let call = ExpertsCall {
            rows,
            tokens,
            token_scales: scales,
            ids,
            weights: routing_weights,
            map: packed.map(),
            workspace,
            out,
            tile: self.tile.unwrap_or_else(|| self.likely_tile(rows)),
        };
        let launches = self.shape.launches(packed.addresses(), call)?;
        // SAFETY: `address` has checked place, shape and alignment of every tensor; they, the workspace and the weights are
        // borrowed for the call, and whoever lent the stream keeps them until it has run (`DeviceStream::new`).
        unsafe { launches.enqueue(gpu.kernels(), &stream)? };
        Ok(())
    }
}

impl GpuKernel {
    /// For rows whose experts are drawn evenly from all ranks.
    fn likely_tile(&self, rows: usize) -> TokenTile {
        let ExpertsShape { top_k, experts, num_experts, .. } = self.shape;
        TokenTile::for_pairs((rows * top_k * experts).div_ceil(num_experts.max(1)), experts)
    }
}

/// Whether `plan` is one of these experts under `config`.
fn check_plan(plan: &Plan, config: &MoeConfig) -> Result<(), GpuExpertsError> {
    let wrong = |what, found: String, wanted: String| Err(GpuExpertsError::Plan { what, found, wanted });
    if plan.experts() != NAME {
        return wrong("experts", plan.experts().into(), NAME.into());
    }
    if plan.format() != ActivationFormat::Standard {
        return wrong("format", plan.format().name().into(), ActivationFormat::Standard.name().into());
    }
    let wire = limits::wire(config);
    if plan.wire() != wire {
        return wrong("wire", plan.wire().to_string(), wire.to_string());
    }
    if plan.router_weight() != RouterWeight::OnOutput {
        let found = format!("{:?}", plan.router_weight());
        return wrong("router weight", found, format!("{:?}", RouterWeight::OnOutput));
    }
    Ok(())
}

impl ExpertsModular for GpuKernel {
    fn caps(&self) -> &ExpertsCaps {
        &self.caps
    }

    fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        Ok(self.run(cx, weights, input, out)?)
    }
}
