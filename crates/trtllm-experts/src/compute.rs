//! What both forms run once the experts of every row are known: permute, gemm1 with its activation, gemm2,
//! finalize.

use fused_moe_core::{
    ExpertWeights, ExpertsCaps, MoeConfig, Plan, Rank, RouterWeight, TensorViewMut, TopK, WireFormat,
};
use grouped_gemm::experts::{
    CodeSizes, GemmRows, GemmSizes, PackedExperts, Pitched, PitchedMut, Received, Supported, TwoGemms,
    WeightLayout, check_plan, sum_slots,
};
use grouped_gemm::{Epilogue, Executor, Group};

use crate::TrtllmError;
use crate::permute::Permuter;
use crate::workspace::{Sizes, WorkPieces};

/// Rows per tile. The host's GEMM takes groups of any size, so nothing is padded.
const TILE_TOKENS_DIM: std::num::NonZeroUsize = std::num::NonZeroUsize::MIN;

/// Who chooses the experts of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The kernel, by logits.
    Monolithic,
    /// Somebody else; ids and weights arrive.
    Routed,
}

/// Experts of one rank for one configuration and plan.
#[derive(Debug)]
pub(crate) struct Compute {
    backend: &'static str,
    epilogue: Epilogue,
    wire: WireFormat,
    weight_on_input: bool,
    layout: WeightLayout,
    sizes: Sizes,
    permuter: Permuter,
    executor: Executor,
}

impl Compute {
    pub(crate) fn new(
        config: &MoeConfig,
        (plan, caps): (&Plan, &ExpertsCaps),
        rank: Rank,
        (form, supported): (Form, Supported),
        executor: Executor,
    ) -> Result<Self, TrtllmError> {
        check_plan(plan, caps)?;
        let layout = WeightLayout::new(supported.scheme, config, rank);
        let permuter = permuter(config, rank)?;
        let sizes = sizes(config, plan, (form, supported), &executor)?;
        let (wire, isa) = (plan.wire(), executor.isa());
        tracing::debug!(%layout, %wire, %isa, workspace_bytes = sizes.bytes(), "built experts");
        let weight_on_input = plan.router_weight() == RouterWeight::OnInputByExperts;
        let (backend, epilogue) = (caps.name, supported.epilogue);
        Ok(Self { backend, epilogue, wire, weight_on_input, layout, sizes, permuter, executor })
    }

    pub(crate) fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// Runs the local experts of all received rows and writes as many rows of `out`.
    pub(crate) fn run(
        &self,
        weights: &ExpertWeights,
        (received, topk): (Received<'_>, TopK<'_>),
        pieces: WorkPieces<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), TrtllmError> {
        let packed = PackedExperts::of(weights, self.backend, &self.layout)?;
        let (rows, hidden) = (received.rows, self.layout.hidden);
        let out = PitchedMut::new("the output", out, [rows, hidden])?;
        let slots = [rows, topk.ids.dims().get(1).copied().unwrap_or(0)];
        let router_weights = Pitched::<f32>::new("the top-k weights", topk.weights, slots)?;
        let permuted = self.permuter.permute(topk.ids, rows, pieces.permute)?;
        let entries = permuted.expanded_idx_to_permuted_idx;
        let groups = permuted.experts().map(|(expert, rows)| Group { rows, expert });
        let groups = pieces.gemms.groups.fill(groups);
        let input_weights = self.weight_on_input.then(|| {
            for (row, entries) in entries.chunks(slots[1].max(1)).enumerate() {
                for (&entry, &weight) in entries.iter().zip(router_weights.row(row)) {
                    if let Ok(entry) = usize::try_from(entry) {
                        pieces.permuted_weights[entry] = weight;
                    }
                }
            }
            &*pieces.permuted_weights
        });
        let products = pieces.gemms.products;
        let input_scale = packed.input_scales()[0];
        let gemms = TwoGemms {
            executor: &self.executor,
            layout: &self.layout,
            epilogue: self.epilogue,
            activations: received.activations(&self.layout, self.wire, input_scale, pieces.gemms.input)?,
            gemm1: GemmRows {
                gather: Some(permuted.permuted_idx_to_token_idx),
                groups,
                router_weights: input_weights,
            },
            gemm2: GemmRows { gather: None, groups, router_weights: None },
        };
        gemms.run_f32(packed, pieces.gemms.between, products)?;
        let output_weights = (!self.weight_on_input).then_some(router_weights);
        sum_slots((entries, rows), Pitched::dense(products, hidden), output_weights, out);
        Ok(())
    }
}

/// The permuter of `rank`, whose experts are a range because the placement is linear.
fn permuter(config: &MoeConfig, rank: Rank) -> Result<Permuter, TrtllmError> {
    let count = config.placement.num_local_experts(rank);
    let offset = rank.index() * count;
    Permuter::new(offset..offset + count, config.num_experts(), config.top_k, TILE_TOKENS_DIM)
}

/// Sizes of every temporary of a kernel for `plan`, the same on every rank: all hold equally many experts.
pub(crate) fn sizes(
    config: &MoeConfig,
    plan: &Plan,
    (form, supported): (Form, Supported),
    executor: &Executor,
) -> Result<Sizes, TrtllmError> {
    let (rows, hidden, intermediate) = (plan.max_rows(), config.hidden, config.intermediate);
    let scheme = supported.scheme;
    let permute = permuter(config, Rank(0))?.sizes(rows);
    Ok(Sizes {
        rows,
        permute,
        chosen: if form == Form::Monolithic { rows * config.top_k } else { 0 },
        permuted_weights: match plan.router_weight() {
            RouterWeight::OnInputByExperts => permute.permuted,
            _ => 0,
        },
        gemms: GemmSizes {
            experts: permute.experts,
            entries: permute.permuted,
            intermediate,
            products: hidden,
            input: CodeSizes::of_received(scheme, plan.wire(), [rows, hidden]),
            activated: CodeSizes::of(scheme, [permute.permuted, intermediate]),
            scratch: executor.scratch_bytes(),
        },
    })
}
