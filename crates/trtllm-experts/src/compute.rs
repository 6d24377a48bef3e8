//! What both forms run once the experts of every row are known: permute, gemm1 with its activation, gemm2,
//! finalize.

use fused_moe_core::{
    ExpertWeights, ExpertsCaps, MoeConfig, Plan, Rank, RouterWeight, TensorView, TensorViewMut, TopK,
    WireFormat,
};
use grouped_gemm::experts::{
    CodeSizes, Codes, ExpertsError, Gemms, PackedExperts, PackedGemms, Pitched, PitchedMut, Scheme,
    Supported, WeightLayout, check_plan,
};
use grouped_gemm::{Activations, Bf16Rows, Epilogue, Executor, F32Rows, Group, GroupedGemm, PackedWeight};
use half::bf16;

use crate::TrtllmError;
use crate::finalize::finalize;
use crate::permute::{Permutation, Permuter};
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

/// What a call has received.
pub(crate) struct Received<'a> {
    pub(crate) hidden: TensorView<'a>,
    pub(crate) scale: Option<TensorView<'a>>,
    /// Valid rows.
    pub(crate) rows: usize,
    pub(crate) topk: TopK<'a>,
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

/// The permuted rows of a call as the GEMMs take them.
struct Work<'a> {
    permuted: &'a Permutation<'a>,
    groups: &'a [Group],
    /// A factor on the products of gemm1.
    input_weights: Option<&'a [f32]>,
}

/// Temporaries between the two GEMMs.
struct Between<'a> {
    activated: &'a mut [bf16],
    codes: Codes<'a>,
    /// Of what gemm2 reads, where it comes with the weights.
    input_scale: f32,
    scratch: &'a mut [u8],
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

    /// Checks the number of received rows before anything is computed from it.
    pub(crate) fn check_rows(&self, rows: usize) -> Result<(), TrtllmError> {
        let max = self.sizes.rows;
        if rows > max { Err(TrtllmError::TooManyRows { rows, max }) } else { Ok(()) }
    }

    /// Runs the local experts of all received rows and writes as many rows of `out`.
    pub(crate) fn run(
        &self,
        weights: &ExpertWeights,
        received: Received<'_>,
        pieces: WorkPieces<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), TrtllmError> {
        let packed = PackedExperts::of(weights, self.backend, &self.layout)?;
        let input_scales = packed.input_scales();
        let Received { rows, topk, .. } = received;
        self.check_rows(rows)?;
        let out = PitchedMut::new("the output", out, [rows, self.layout.hidden])?;
        let slots = [rows, topk.ids.dims().get(1).copied().unwrap_or(0)];
        let router_weights = Pitched::<f32>::new("the top-k weights", topk.weights, slots)?;
        let permuted = self.permuter.permute(topk.ids, rows, pieces.permute)?;
        let x = self.activations(&received, input_scales[0], pieces.input)?;

        let groups = pieces.groups.fill(permuted.experts().map(|(expert, rows)| Group { rows, expert }));
        let input_weights = self.weight_on_input.then(|| {
            let rows = permuted.expanded_idx_to_permuted_idx.chunks(slots[1].max(1));
            for (row, slots) in rows.enumerate() {
                for (&permuted, &weight) in slots.iter().zip(router_weights.row(row)) {
                    if let Ok(permuted) = usize::try_from(permuted) {
                        pieces.permuted_weights[permuted] = weight;
                    }
                }
            }
            &*pieces.permuted_weights
        });
        let work = Work { permuted: &permuted, groups, input_weights };
        let between = Between {
            activated: pieces.activated,
            codes: pieces.activated_codes,
            input_scale: input_scales[1],
            scratch: pieces.gemm_scratch,
        };
        if !groups.is_empty() {
            let products = &mut *pieces.products;
            match packed.gemms() {
                PackedGemms::Bf16(gemms) => self.multiply(gemms, x, work, between, products)?,
                PackedGemms::Fp8(gemms) => self.multiply(gemms, x, work, between, products)?,
                PackedGemms::Fp4(gemms) => self.multiply(gemms, x, work, between, products)?,
            }
        }
        let products = Pitched::dense(&*pieces.products, self.layout.hidden);
        finalize(&permuted, products, (!self.weight_on_input).then_some(router_weights), out, rows);
        Ok(())
    }

    /// The received rows as gemm1 reads them.
    fn activations<'a>(
        &self,
        received: &Received<'a>,
        input_scale: f32,
        codes: Codes<'a>,
    ) -> Result<Activations<'a>, ExpertsError> {
        const HIDDEN: &str = "the received tensor";
        const SCALES: &str = "the received scale tensor";
        let (rows, columns) = (received.rows, self.layout.hidden);
        if received.hidden.dtype() != self.wire.payload {
            return Err(ExpertsError::tensor(HIDDEN, &received.hidden, self.wire.payload.to_string()));
        }
        if received.scale.is_some() != self.wire.scale.is_some() {
            let [wanted, found] = [self.wire.scale.is_some(), received.scale.is_some()]
                .map(|is_there| if is_there { "there" } else { "absent" }.to_string());
            return Err(ExpertsError::Tensor { tensor: SCALES, wanted, found });
        }
        match (self.layout.scheme, received.scale) {
            (Scheme::Fp8(fp8), Some(scales)) => {
                let hidden = Pitched::new(HIDDEN, received.hidden, [rows, columns])?;
                let scales = Pitched::new(SCALES, scales, [rows, fp8.scaling.scales_per_row(columns)])?;
                Ok(fp8.arrived(hidden, scales, codes))
            }
            (scheme, _) => {
                let hidden = Pitched::new(HIDDEN, received.hidden, [rows, columns])?;
                scheme.activations(hidden, input_scale, codes)
            }
        }
    }

    /// gemm1, activation, second quantisation, gemm2: writes `products`, `[permuted, hidden]`.
    fn multiply<W: PackedWeight>(
        &self,
        gemms: &Gemms<W>,
        x: Activations<'_>,
        work: Work<'_>,
        between: Between<'_>,
        products: &mut [f32],
    ) -> Result<(), TrtllmError> {
        let WeightLayout { scheme, hidden, intermediate, .. } = self.layout;
        let Between { activated, codes, input_scale, scratch } = between;
        let activated = &mut activated[..work.permuted.permuted_idx_size() * intermediate];
        let gemm1 = GroupedGemm {
            weights: &gemms.w13,
            activations: x,
            gather: Some(work.permuted.permuted_idx_to_token_idx),
            groups: work.groups,
            router_weights: work.input_weights,
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
            router_weights: None,
            epilogue: Epilogue::Products,
        };
        Ok(self.executor.run(&gemm2, scratch, &F32Rows::new(products, hidden, hidden)?)?)
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
    let input = match scheme {
        Scheme::Fp8(fp8) if plan.wire().scale.is_some() => CodeSizes::scales_of(fp8, [rows, hidden]),
        _ => CodeSizes::of(scheme, [rows, hidden]),
    };
    Ok(Sizes {
        rows,
        permute,
        chosen: if form == Form::Monolithic { rows * config.top_k } else { 0 },
        permuted_weights: match plan.router_weight() {
            RouterWeight::OnInputByExperts => permute.permuted,
            _ => 0,
        },
        hidden,
        intermediate,
        input,
        activated: CodeSizes::of(scheme, [permute.permuted, intermediate]),
        gemm_scratch: executor.scratch_bytes(),
    })
}
