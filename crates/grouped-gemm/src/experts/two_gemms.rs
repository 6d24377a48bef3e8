//! gemm1 with its activation, the second quantisation, gemm2.

use fused_moe_core::{Arena, ViewError, WireFormat};
use half::bf16;

use super::error::ExpertsError;
use super::layout::WeightLayout;
use super::quantize::Codes;
use super::rows::Pitched;
use super::scheme::Scheme;
use super::scratch::{CodeSizes, GroupSlots};
use super::weights::{Gemms, PackedExperts, PackedGemms};
use crate::{Activations, Bf16Rows, Epilogue, Executor, F32Rows, Group, GroupedGemm, PackedWeight, RowSink};

/// Lengths of [`GemmPieces`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmSizes {
    /// Local experts, each of which is a group at most.
    pub experts: usize,
    /// Rows of all groups.
    pub entries: usize,
    /// Columns of the activation's output.
    pub intermediate: usize,
    /// Columns of the products: hidden, or 0 where gemm2 writes elsewhere.
    pub products: usize,
    /// Codes and scales of received rows.
    pub input: CodeSizes,
    /// Codes and scales of the activation's output.
    pub activated: CodeSizes,
    /// Bytes of [`Executor::scratch_bytes`].
    pub scratch: usize,
}

/// What a call keeps beside and between its GEMMs.
#[derive(Debug)]
pub struct GemmPieces<'a> {
    /// Room for a group per expert.
    pub groups: GroupSlots<'a>,
    /// Codes and scales of received rows.
    pub input: Codes<'a>,
    /// `[entries, hidden]` of f32, outputs before they are summed.
    pub products: &'a mut [f32],
    /// What only the GEMMs use.
    pub between: Between<'a>,
}

/// Temporaries of [`TwoGemms`].
#[derive(Debug)]
pub struct Between<'a> {
    /// `[entries, intermediate]`, the activation's output.
    pub activated: &'a mut [bf16],
    /// Its codes.
    pub codes: Codes<'a>,
    /// The executor's.
    pub scratch: &'a mut [u8],
}

impl GemmSizes {
    /// Bytes that [`GemmSizes::take`] takes.
    pub fn bytes(&self) -> usize {
        Arena::bytes_for::<u8>(GroupSlots::bytes(self.experts))
            + self.input.bytes()
            + Arena::bytes_for::<f32>(self.entries * self.products)
            + Arena::bytes_for::<bf16>(self.entries * self.intermediate)
            + self.activated.bytes()
            + Arena::bytes_for::<u8>(self.scratch)
    }

    /// Takes the pieces from a workspace.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] if less is left.
    pub fn take<'a>(&self, arena: &mut Arena<'a>) -> Result<GemmPieces<'a>, ViewError> {
        Ok(GemmPieces {
            groups: GroupSlots::new(arena.take(GroupSlots::bytes(self.experts))?),
            input: self.input.take(arena)?,
            products: arena.take(self.entries * self.products)?,
            between: Between {
                activated: arena.take(self.entries * self.intermediate)?,
                codes: self.activated.take(arena)?,
                scratch: arena.take(self.scratch)?,
            },
        })
    }
}

impl CodeSizes {
    /// For `rows` rows of `columns` elements that arrive in the standard format of `wire`.
    pub fn of_received(scheme: Scheme, wire: WireFormat, dims: [usize; 2]) -> Self {
        match scheme {
            Scheme::Fp8(fp8) if wire.scale.is_some() => CodeSizes::scales_of(fp8, dims),
            _ => CodeSizes::of(scheme, dims),
        }
    }
}

/// The rows of one GEMM.
#[derive(Clone, Copy, Debug)]
pub struct GemmRows<'a> {
    /// As [`GroupedGemm::gather`].
    pub gather: Option<&'a [u32]>,
    /// As [`GroupedGemm::groups`].
    pub groups: &'a [Group],
    /// As [`GroupedGemm::router_weights`].
    pub router_weights: Option<&'a [f32]>,
}

/// What a call multiplies. Groups of `gemm1` have no gaps between them, so that their rows are the rows of the
/// activation's output.
#[derive(Debug)]
pub struct TwoGemms<'a> {
    /// What runs them.
    pub executor: &'a Executor,
    /// Of the weights.
    pub layout: &'a WeightLayout,
    /// What gemm1 stores.
    pub epilogue: Epilogue,
    /// The left side of gemm1.
    pub activations: Activations<'a>,
    /// Rows of gemm1.
    pub gemm1: GemmRows<'a>,
    /// Rows of gemm2, which gathers rows of the activation's output.
    pub gemm2: GemmRows<'a>,
}

impl TwoGemms<'_> {
    /// Writes the rows of gemm2 to those of `products`, `[rows, hidden]` of f32. Without rows nothing is done.
    ///
    /// # Errors
    /// [`ExpertsError::Gemm`] and [`ExpertsError::Quant`].
    pub fn run_f32(
        self,
        weights: &PackedExperts,
        between: Between<'_>,
        products: &mut [f32],
    ) -> Result<(), ExpertsError> {
        let hidden = self.layout.hidden;
        self.run(weights, between, &F32Rows::new(products, hidden, hidden)?)
    }

    /// As [`TwoGemms::run_f32`], rounded to bf16.
    ///
    /// # Errors
    /// As [`TwoGemms::run_f32`].
    pub fn run_bf16(
        self,
        weights: &PackedExperts,
        between: Between<'_>,
        products: &mut [bf16],
    ) -> Result<(), ExpertsError> {
        let hidden = self.layout.hidden;
        self.run(weights, between, &Bf16Rows::new(products, hidden, hidden)?)
    }

    fn run(
        self,
        weights: &PackedExperts,
        between: Between<'_>,
        products: &impl RowSink,
    ) -> Result<(), ExpertsError> {
        let input_scale = weights.input_scales()[1];
        match weights.gemms() {
            PackedGemms::Bf16(gemms) => self.multiply(gemms, input_scale, between, products),
            PackedGemms::Fp8(gemms) => self.multiply(gemms, input_scale, between, products),
            PackedGemms::Fp4(gemms) => self.multiply(gemms, input_scale, between, products),
        }
    }

    fn multiply<W: PackedWeight>(
        self,
        gemms: &Gemms<W>,
        input_scale: f32,
        between: Between<'_>,
        products: &impl RowSink,
    ) -> Result<(), ExpertsError> {
        let Self { executor, layout, epilogue, activations, gemm1, gemm2 } = self;
        let WeightLayout { scheme, intermediate, .. } = *layout;
        let Between { activated, codes, scratch } = between;
        let entries = gemm1.groups.last().map_or(0, |group| group.rows.end);
        if entries == 0 {
            return Ok(());
        }
        let activated = &mut activated[..entries * intermediate];
        let gemm1 = GroupedGemm {
            weights: &gemms.w13,
            activations,
            gather: gemm1.gather,
            groups: gemm1.groups,
            router_weights: gemm1.router_weights,
            epilogue,
        };
        // The rounding to bf16 before the second quantisation is part of the contract.
        executor.run(&gemm1, scratch, &Bf16Rows::new(activated, intermediate, intermediate)?)?;
        let gemm2 = GroupedGemm {
            weights: &gemms.w2,
            activations: scheme.activations(Pitched::dense(&*activated, intermediate), input_scale, codes)?,
            gather: gemm2.gather,
            groups: gemm2.groups,
            router_weights: gemm2.router_weights,
            epilogue: Epilogue::Products,
        };
        Ok(executor.run(&gemm2, scratch, products)?)
    }
}
