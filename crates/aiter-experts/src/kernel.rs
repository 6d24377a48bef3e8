//! The built kernel: sort, gemm1 with its activation, gemm2, sum.

use fused_moe_core::{
    Arrived, Dispatched, ExecCx, ExpertMask, ExpertWeights, ExpertsCaps, ExpertsModular, MoeConfig, Plan,
    Rank, Result, RouterWeight, TensorViewMut, WireFormat,
};
use grouped_gemm::experts::ExpertsError;
use grouped_gemm::experts::{
    CodeSizes, Codes, Gemms, PackedExperts, PackedGemms, Pitched, PitchedMut, Scheme, WeightLayout,
    check_plan,
};
use grouped_gemm::{Activations, Bf16Rows, Epilogue, Executor, F32Rows, Group, GroupedGemm, PackedWeight};
use half::bf16;

use crate::moe_sorting::{MAX_TOKENS, MoeSorting, SortPolicy, SortedTokens};
use crate::reduce::sum_slots;
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
    let input = match scheme {
        Scheme::Fp8(fp8) if plan.wire().scale.is_some() => CodeSizes::scales_of(fp8, [rows, hidden]),
        _ => CodeSizes::of(scheme, [rows, hidden]),
    };
    let activated = CodeSizes::of(scheme, [sort.entries, intermediate]);
    Ok(Sizes { sort, rows, hidden, intermediate, input, activated, gemm_scratch: executor.scratch_bytes() })
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

/// The sorted rows of a call as the GEMMs take them.
struct Work<'a> {
    sorted: &'a SortedTokens<'a>,
    /// Received row of each entry.
    gather: &'a [u32],
    groups: &'a [Group],
}

/// Temporaries between the two GEMMs.
struct Between<'a> {
    activated: &'a mut [bf16],
    codes: Codes<'a>,
    /// By which the second quantisation divides, if the scheme says so.
    input_scale: f32,
    scratch: &'a mut [u8],
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
            return Err(AiterError::TooManyRows { rows: plan.max_rows(), max: MAX_TOKENS - 1 });
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
        let input_scales = packed.input_scales();
        let Arrived::Standard { topk, rows } = input.arrived else {
            let (tensor, wanted) = ("the received batch", "[rows, hidden] with top-k".into());
            let found = "one batch per expert".into();
            return Err(ExpertsError::Tensor { tensor, wanted, found }.into());
        };
        let (rows, hidden) = (rows.on_host()?, self.layout.hidden);
        if rows > self.sizes.rows {
            return Err(AiterError::TooManyRows { rows, max: self.sizes.rows });
        }
        let out = PitchedMut::new("the output", out, [rows, hidden])?;
        let pieces = self.sizes.carve(&mut cx.workspace.reborrow())?;
        let sorted = self.sorting.sort(topk, rows, pieces.sort)?;
        let x = self.activations(input, rows, input_scales[0], pieces.input)?;

        for (row, id) in pieces.gather.iter_mut().zip(sorted.token_ids) {
            *row = id.token() as u32;
        }
        let groups = sorted.experts().map(|(expert, rows)| Group { rows, expert: expert.0 as usize });
        let work = Work { sorted: &sorted, gather: pieces.gather, groups: pieces.groups.fill(groups) };
        let between = Between {
            activated: pieces.activated,
            codes: pieces.activated_codes,
            input_scale: input_scales[1],
            scratch: pieces.gemm_scratch,
        };
        if !work.groups.is_empty() {
            let products = &mut *pieces.products;
            match packed.gemms() {
                PackedGemms::Bf16(gemms) => self.multiply(gemms, x, work, between, products)?,
                PackedGemms::Fp8(gemms) => self.multiply(gemms, x, work, between, products)?,
                PackedGemms::Fp4(gemms) => self.multiply(gemms, x, work, between, products)?,
            }
        }
        sum_slots(&sorted, Pitched::dense(pieces.products, hidden), out);
        Ok(())
    }

    /// The received rows as gemm1 reads them.
    fn activations<'a>(
        &self,
        input: &Dispatched<'a>,
        rows: usize,
        input_scale: f32,
        codes: Codes<'a>,
    ) -> Result<Activations<'a>, ExpertsError> {
        const HIDDEN: &str = "the received tensor";
        const SCALES: &str = "the received scale tensor";
        let columns = self.layout.hidden;
        if input.hidden.dtype() != self.wire.payload {
            return Err(ExpertsError::tensor(HIDDEN, &input.hidden, self.wire.payload.to_string()));
        }
        if input.scale.is_some() != self.wire.scale.is_some() {
            let [wanted, found] = [self.wire.scale.is_some(), input.scale.is_some()]
                .map(|is_there| if is_there { "there" } else { "absent" }.to_string());
            return Err(ExpertsError::Tensor { tensor: SCALES, wanted, found });
        }
        match (self.layout.scheme, input.scale) {
            (Scheme::Fp8(fp8), Some(scales)) => {
                let hidden = Pitched::new(HIDDEN, input.hidden, [rows, columns])?;
                let scales = Pitched::new(SCALES, scales, [rows, fp8.scaling.scales_per_row(columns)])?;
                Ok(fp8.arrived(hidden, scales, codes))
            }
            (scheme, _) => {
                let hidden = Pitched::new(HIDDEN, input.hidden, [rows, columns])?;
                scheme.activations(hidden, input_scale, codes)
            }
        }
    }

    /// gemm1, activation, second quantisation, gemm2: writes the weighted `products`, `[entries, hidden]`.
    fn multiply<W: PackedWeight>(
        &self,
        gemms: &Gemms<W>,
        x: Activations<'_>,
        work: Work<'_>,
        between: Between<'_>,
        products: &mut [f32],
    ) -> Result<(), AiterError> {
        let WeightLayout { scheme, hidden, intermediate, .. } = self.layout;
        let Between { activated, codes, input_scale, scratch } = between;
        let weights = Some(work.sorted.weights);
        let activated = &mut activated[..work.sorted.token_ids.len() * intermediate];
        let gemm1 = GroupedGemm {
            weights: &gemms.w13,
            activations: x,
            gather: Some(work.gather),
            groups: work.groups,
            router_weights: weights.filter(|_| self.weight_stage1),
            epilogue: self.epilogue,
        };
        // The rounding to bf16 before the second quantisation is part of the contract.
        self.executor.run(&gemm1, scratch, &Bf16Rows::new(activated, intermediate, intermediate)?)?;
        let activated = Pitched::dense(&*activated, intermediate);
        let gemm2 = GroupedGemm {
            weights: &gemms.w2,
            activations: scheme.activations(activated, input_scale, codes)?,
            gather: None,
            groups: work.groups,
            router_weights: weights.filter(|_| !self.weight_stage1),
            epilogue: Epilogue::Products,
        };
        Ok(self.executor.run(&gemm2, scratch, &F32Rows::new(products, hidden, hidden)?)?)
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
