//! The built kernel: number the valid rows, gemm1 with its activation, gemm2.
//!
//! The batches have room for every token of every rank at each expert, and most of it is empty. So the temporaries
//! are dense: valid rows are *entries*, numbered expert by expert. gemm1 gathers entries out of the batches, gemm2
//! writes to the rows of the batches and gathers their entries.

use fused_moe_core::{
    Arrived, DType, Dispatched, ExecCx, ExpertWeights, ExpertsCaps, ExpertsModular, MoeConfig, Plan, Rank,
    Result, TensorView, TensorViewMut, WireFormat,
};
use grouped_gemm::experts::{
    Codes, ExpertsError, GemmRows, PackedExperts, Pitched, SCALES, Scaling, Scheme, TwoGemms, WeightLayout,
    check_plan, check_scale,
};
use grouped_gemm::{ActivationScale, Activations, Epilogue, Executor, Group};
use half::bf16;

use crate::scheme::{MAX_ROWS, caps, most_local_experts, supported};
use crate::workspace::Sizes;
use crate::{BatchedError, NAME};

/// Experts of one rank for one configuration and plan.
#[derive(Debug)]
pub(crate) struct BatchedKernel {
    caps: ExpertsCaps,
    epilogue: Epilogue,
    wire: WireFormat,
    layout: WeightLayout,
    max_rows: usize,
    sizes: Sizes,
    executor: Executor,
}

/// The left side of gemm1.
struct Input<'a> {
    activations: Activations<'a>,
    /// Row of each entry; `None` if rows are entries.
    gather: Option<&'a [u32]>,
}

/// Sizes of the temporaries of a kernel for `plan`, the same on every rank.
pub(crate) fn sizes(config: &MoeConfig, plan: &Plan, executor: &Executor) -> Result<Sizes, BatchedError> {
    Ok(Sizes::new(config, plan, supported(config)?.scheme, executor.scratch_bytes()))
}

impl BatchedKernel {
    pub(crate) fn new(
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
        executor: Executor,
    ) -> Result<Self, BatchedError> {
        let supported = supported(config)?;
        let caps = caps(config);
        check_plan(plan, &caps)?;
        let rows = plan.max_rows().saturating_mul(most_local_experts(config));
        if rows >= MAX_ROWS {
            return Err(ExpertsError::TooManyRows { rows, max: MAX_ROWS - 1 }.into());
        }
        let layout = WeightLayout::new(supported.scheme, config, rank);
        let sizes = sizes(config, plan, &executor)?;
        let (wire, isa, max_rows) = (plan.wire(), executor.isa(), plan.max_rows());
        tracing::debug!(%layout, %wire, %isa, workspace_bytes = sizes.bytes(), "built experts");
        Ok(Self { caps, epilogue: supported.epilogue, wire, layout, max_rows, sizes, executor })
    }

    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        mut out: TensorViewMut<'_>,
    ) -> Result<(), BatchedError> {
        let packed = PackedExperts::of(weights, NAME, &self.layout)?;
        let Arrived::Batched { tokens } = input.arrived else {
            let (tensor, wanted) = ("the received batch", "one batch per expert".into());
            let found = "[rows, hidden] with top-k".into();
            return Err(ExpertsError::Tensor { tensor, wanted, found }.into());
        };
        let counts = tokens.0.as_slice::<i32>()?;
        self.check_counts(counts)?;
        self.fits("the output", &out.as_view(), DType::Bf16, self.layout.hidden)?;
        let out = out.as_mut_slice::<bf16>()?;

        let pieces = self.sizes.carve(&mut cx.workspace.reborrow())?;
        let dense = pieces.gemms.groups.fill(self.groups(counts).map(|(entries, group)| {
            for (entry, row) in entries.clone().zip(group.rows) {
                pieces.row_of_entry[entry] = row as u32;
                pieces.entry_of_row[row] = entry as u32;
            }
            Group { rows: entries, expert: group.expert }
        }));
        let batched = pieces.batched.fill(self.groups(counts).map(|(_, group)| group));
        let entries = dense.last().map_or(0, |group| group.rows.end);
        let row_of_entry = &pieces.row_of_entry[..entries];
        let input_scale = packed.input_scales()[0];
        let x = self.input(input, row_of_entry, input_scale, pieces.gemms.input)?;
        let gemms = TwoGemms {
            executor: &self.executor,
            layout: &self.layout,
            epilogue: self.epilogue,
            activations: x.activations,
            gemm1: GemmRows { gather: x.gather, groups: dense, router_weights: None },
            gemm2: GemmRows { gather: Some(pieces.entry_of_row), groups: batched, router_weights: None },
        };
        Ok(gemms.run_bf16(packed, pieces.gemms.between, out)?)
    }

    /// Entries and rows of the experts that have some, in ascending order.
    fn groups<'c>(
        &self,
        counts: &'c [i32],
    ) -> impl Iterator<Item = (std::ops::Range<usize>, Group)> + use<'c> {
        let (max_rows, mut next) = (self.max_rows, 0);
        counts.iter().enumerate().filter(|&(_, &count)| count > 0).map(move |(expert, &count)| {
            let (entry, row, count) = (next, expert * max_rows, count as usize);
            next += count;
            (entry..next, Group { rows: row..row + count, expert })
        })
    }

    fn check_counts(&self, counts: &[i32]) -> Result<(), BatchedError> {
        let (experts, max) = (self.layout.experts, self.max_rows);
        if counts.len() != experts {
            let (tensor, wanted) = ("tokens per expert", format!("[{experts}]"));
            let found = format!("[{}]", counts.len());
            return Err(ExpertsError::Tensor { tensor, wanted, found }.into());
        }
        let mut rows = 0;
        for (expert, &count) in counts.iter().enumerate() {
            match usize::try_from(count) {
                Ok(valid) if valid <= max => rows += valid,
                _ => return Err(BatchedError::RowsOfExpert { expert, count, max }),
            }
        }
        let max = self.sizes.gemms.entries;
        if rows > max { Err(ExpertsError::TooManyRows { rows, max }.into()) } else { Ok(()) }
    }

    /// Checks that a tensor has the batches' shape.
    fn fits(
        &self,
        tensor: &'static str,
        view: &TensorView<'_>,
        dtype: DType,
        columns: usize,
    ) -> Result<(), ExpertsError> {
        let wanted = [self.layout.experts, self.max_rows, columns];
        if view.dims() == wanted && view.dtype() == dtype {
            return Ok(());
        }
        Err(ExpertsError::tensor(tensor, view, format!("{wanted:?} of {dtype}")))
    }

    /// The received rows as gemm1 reads them.
    fn input<'a>(
        &self,
        input: &Dispatched<'a>,
        row_of_entry: &'a [u32],
        input_scale: f32,
        codes: Codes<'a>,
    ) -> Result<Input<'a>, ExpertsError> {
        let columns = self.layout.hidden;
        self.fits("the received tensor", &input.hidden, self.wire.payload, columns)?;
        check_scale(self.wire, input.scale)?;
        let gather = Some(row_of_entry);
        match (self.layout.scheme, input.scale) {
            (Scheme::Fp8(fp8), Some(scales)) => {
                let per_row = fp8.scaling.scales_per_row(columns);
                self.fits(SCALES, &scales, DType::F32, per_row)?;
                let scales = Pitched::dense(scales.as_slice::<f32>()?, per_row);
                let activations = Activations::Fp8 {
                    codes: Pitched::dense(input.hidden.as_slice::<u8>()?, columns).for_gemm(),
                    kind: fp8.kind,
                    scale: match fp8.scaling {
                        Scaling::Block => ActivationScale::Group128(scales.for_gemm()),
                        // A scale per tensor came once per row, because every source rank has its own.
                        Scaling::Token | Scaling::Tensor | Scaling::Static => {
                            ActivationScale::PerToken(scales.values)
                        }
                    },
                };
                Ok(Input { activations, gather })
            }
            (scheme, _) => {
                let rows = Pitched::dense(input.hidden.as_slice::<bf16>()?, columns);
                if scheme.reads_bf16() {
                    return Ok(Input { activations: Activations::Bf16(rows.for_gemm()), gather });
                }
                let activations = scheme.quantize_gathered((rows, row_of_entry), input_scale, codes)?;
                Ok(Input { activations, gather: None })
            }
        }
    }
}

impl ExpertsModular for BatchedKernel {
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
