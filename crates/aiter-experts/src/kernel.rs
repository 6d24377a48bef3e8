//! The built kernel: sort, gemm1 with its activation, gemm2, sum.

use fused_moe_core::{
    Dispatched, ExecCx, ExpertMask, ExpertWeights, ExpertsCaps, ExpertsModular, MoeConfig, Plan, Rank,
    Result, RouterWeight, TensorViewMut, WireFormat,
};
use grouped_gemm::experts::{
    CodeSizes, ExpertsError, GemmRows, GemmSizes, PackedExperts, Pitched, PitchedMut, Received, TwoGemms,
    WeightLayout, check_plan, sum_slots,
};
use grouped_gemm::{Epilogue, Executor, Group};

use crate::moe_sorting::{MAX_TOKENS, MoeSorting, SortPolicy};
use crate::scheme::{caps, supported};
use crate::workspace::Sizes;
use crate::{AiterError, NAME};

/// Entries per block of the sorted order. The host's GEMM takes groups of any size, so nothing is padded.
const BLOCK_M: std::num::NonZeroUsize = std::num::NonZeroUsize::MIN;

/// Sizes of every temporary of a kernel for `plan`, the same on every rank: those of the rank with most experts.
pub(crate) fn sizes(config: &MoeConfig, plan: &Plan, executor: &Executor) -> Result<Sizes, AiterError> {
    let scheme = supported(config)?.scheme;
    let ranks = (0..config.ep_size() as u32).map(Rank);
    let busiest = ranks.max_by_key(|&rank| config.placement.num_local_experts(rank)).unwrap_or(Rank(0));
    let sorting = MoeSorting::new(&ExpertMask::new(&config.placement, busiest), config.top_k, BLOCK_M)?;
    let (rows, hidden, intermediate) = (plan.max_rows(), config.hidden, config.intermediate);
    let sort = sorting.sizes(rows);
    let gemms = GemmSizes {
        experts: sort.experts,
        entries: sort.entries,
        intermediate,
        products: hidden,
        input: CodeSizes::of_received(scheme, plan.wire(), [rows, hidden]),
        activated: CodeSizes::of(scheme, [sort.entries, intermediate]),
        scratch: executor.scratch_bytes(),
    };
    Ok(Sizes { rows, sort, gemms })
}

/// Experts of one rank for one configuration and plan.
#[derive(Debug)]
pub(crate) struct AiterKernel {
    caps: ExpertsCaps,
    epilogue: Epilogue,
    wire: WireFormat,
    /// AITER's `doweight_stage1`: the routing weight multiplies what gemm1 gives and not what gemm2 gives.
    weight_stage1: bool,
    layout: WeightLayout,
    sizes: Sizes,
    sorting: MoeSorting,
    executor: Executor,
}

impl AiterKernel {
    pub(crate) fn new(
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
        (executor, sort_policy): (Executor, SortPolicy),
    ) -> Result<Self, AiterError> {
        let supported = supported(config)?;
        let caps = caps(config);
        check_plan(plan, &caps)?;
        if plan.max_rows() >= MAX_TOKENS {
            return Err(ExpertsError::TooManyRows { rows: plan.max_rows(), max: MAX_TOKENS - 1 }.into());
        }
        let layout = WeightLayout::new(supported.scheme, config, rank);
        let sorting = MoeSorting::new(&ExpertMask::new(&config.placement, rank), config.top_k, BLOCK_M)?
            .with_policy(sort_policy);
        let sizes = sizes(config, plan, &executor)?;
        let (wire, isa) = (plan.wire(), executor.isa());
        tracing::debug!(%layout, %wire, %isa, %sort_policy, workspace_bytes = sizes.bytes(), "built experts");
        let weight_stage1 = plan.router_weight() == RouterWeight::OnInputByExperts;
        Ok(Self { caps, epilogue: supported.epilogue, wire, weight_stage1, layout, sizes, sorting, executor })
    }

    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), AiterError> {
        let packed = PackedExperts::of(weights, NAME, &self.layout)?;
        let (received, topk) = Received::standard(input, self.sizes.rows)?;
        let (rows, hidden) = (received.rows, self.layout.hidden);
        let out = PitchedMut::new("the output", out, [rows, hidden])?;
        let pieces = self.sizes.carve(&mut cx.workspace.reborrow())?;
        let sorted = self.sorting.sort(topk, rows, pieces.sort)?;
        for (row, id) in pieces.gather.iter_mut().zip(sorted.token_ids) {
            *row = id.token() as u32;
        }
        let groups = sorted.experts().map(|(expert, rows)| Group { rows, expert: expert.0 as usize });
        let (groups, weights) = (pieces.gemms.groups.fill(groups), Some(sorted.weights));
        let products = pieces.gemms.products;
        let input_scale = packed.input_scales()[0];
        let gemms = TwoGemms {
            executor: &self.executor,
            layout: &self.layout,
            epilogue: self.epilogue,
            activations: received.activations(&self.layout, self.wire, input_scale, pieces.gemms.input)?,
            gemm1: GemmRows {
                gather: Some(pieces.gather),
                groups,
                router_weights: weights.filter(|_| self.weight_stage1),
            },
            gemm2: GemmRows { gather: None, groups, router_weights: weights.filter(|_| !self.weight_stage1) },
        };
        gemms.run_f32(packed, pieces.gemms.between, products)?;
        sum_slots((sorted.positions, rows), Pitched::dense(products, hidden), None, out);
        Ok(())
    }
}

impl ExpertsModular for AiterKernel {
    fn caps(&self) -> &ExpertsCaps {
        &self.caps
    }

    fn workspace_bytes(&self) -> usize {
        self.sizes.bytes()
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
