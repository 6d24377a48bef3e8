//! Stage 3 as a whole on one device: sort, gemm1 with its activation, quantise again, gemm2, weight and sum.
//!
//! Everything that is needed is known before: the worst case of the sizes says how much workspace there is and which grids.
//! Counts are read on the device, so a call is captured once and replayed with other inputs.

use device_runtime::{DeviceError, Stream};
use fused_moe_core::ScaleOrder;

use crate::arch::Arch;
use crate::grouped_gemm::{GemmBuffers, GemmScheme, GroupedGemm, GroupedGemmParams, TokenTile};
use crate::launch::{BadLaunch, Float, Launch};
use crate::loaded::Kernels;
use crate::quantize::{
    Quantize1x128, Quantize1x128Params, QuantizeBuffers, QuantizePerToken, QuantizePerTokenParams,
};
use crate::sorting::{MoeSorting, SortPolicy, SortingBuffers, SortingLaunches};
use crate::weighted_sum::{SumBuffers, WeightedSum, WeightedSumParams};

/// Alignment of every piece of the workspace.
const ALIGN: usize = 256;

/// Sizes of a layer on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsShape {
    /// Where it runs.
    pub arch: Arch,
    /// What is multiplied.
    pub scheme: GemmScheme,
    /// Elements of a token, a multiple of 128.
    pub hidden: usize,
    /// Elements between the GEMMs, a multiple of 128.
    pub intermediate: usize,
    /// Slots of a row.
    pub top_k: usize,
    /// Local experts, at most 256.
    pub experts: usize,
    /// Experts over all ranks.
    pub num_experts: usize,
    /// What an expert's output is between gemm2 and the sum. bf16 is rounded once more, and half the way to memory.
    pub products: Float,
    /// What the sum is written as.
    pub out: Float,
    /// Multiprocessors of the device.
    pub compute_units: u32,
}

/// The packed weights of a layer, as addresses in the device's memory; see [`crate::pack`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsWeights {
    /// Gate and up of all experts.
    pub gate_up: u64,
    /// Their map, see [`crate::pack::map`].
    pub gate_up_map: u64,
    /// Their scales; 0 for bf16.
    pub gate_up_scales: u64,
    /// Down of all experts.
    pub down: u64,
    /// Its map.
    pub down_map: u64,
    /// Its scales; 0 for bf16.
    pub down_scales: u64,
}

/// What a call reads and writes, as addresses in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsCall {
    /// Rows of this call; the grids are theirs.
    pub rows: usize,
    /// `[rows, hidden]` in the scheme's type.
    pub tokens: u64,
    /// f32: `[rows, hidden / 128]` for blocks, `[rows]` for rows; 0 for bf16.
    pub token_scales: u64,
    /// `[rows, top_k]` i32, global.
    pub ids: u64,
    /// `[rows, top_k]` f32.
    pub weights: u64,
    /// `[num_experts]` i32, local of global; 0 if they are the same.
    pub map: u64,
    /// [`ExpertsShape::workspace_bytes`] for as many rows, aligned to 256.
    pub workspace: u64,
    /// `[rows, hidden]` as [`ExpertsShape::out`], written.
    pub out: u64,
    /// Tokens of a tile. On sm_90a the results are the same bits for all; on CDNA for those of 32 and more.
    pub tile: TokenTile,
}

/// Where in the workspace a call leaves what is between its stages, in bytes from its start: for tests, which judge every stage
/// by what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// `[experts + 1]` u32: where the pairs of each expert begin.
    pub offsets: usize,
    /// `[pairs]` u32: the row of each pair.
    pub pair_rows: usize,
    /// `[rows, top_k]` i32: the pair of each slot, -1 if its expert is not here.
    pub positions: usize,
    /// Of the sort.
    pub counts: usize,
    /// `[pairs, intermediate]` bf16.
    pub activated: usize,
    /// `[pairs, intermediate]` FP8; empty for bf16.
    pub codes: usize,
    /// f32 `[pairs, intermediate / 128]`, or `[pairs]`; empty for bf16.
    pub scales: usize,
    /// `[pairs, hidden]` as [`ExpertsShape::products`].
    pub products: usize,
    /// Its size.
    pub total: usize,
}

/// The launches of a call, in order.
#[derive(Clone, Copy, Debug)]
pub struct ExpertsLaunches {
    sort: SortingLaunches,
    gate_up: Launch<GroupedGemmParams>,
    quantize: Requantize,
    down: Launch<GroupedGemmParams>,
    sum: Launch<WeightedSumParams>,
}

#[derive(Clone, Copy, Debug)]
enum Requantize {
    Not,
    Block(Launch<Quantize1x128Params>),
    Row(Launch<QuantizePerTokenParams>),
}

impl ExpertsShape {
    /// Pairs of a row and a local expert, at most.
    fn pairs(&self, rows: usize) -> usize {
        rows * self.top_k.min(self.experts)
    }

    /// The pieces of the workspace of a call of `rows` rows.
    pub fn pieces(&self, rows: usize) -> Pieces {
        let (pairs, slots) = (self.pairs(rows), rows * self.top_k);
        let mut end = 0;
        let mut piece = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(ALIGN);
            start
        };
        let (codes, scales) = match self.scheme {
            GemmScheme::Bf16 => (0, 0),
            GemmScheme::Fp8Block => (pairs * self.intermediate, pairs * self.intermediate.div_ceil(128) * 4),
            GemmScheme::Fp8Row => (pairs * self.intermediate, pairs * 4),
        };
        Pieces {
            offsets: piece((self.experts + 1) * 4),
            pair_rows: piece(slots * 4),
            positions: piece(slots * 4),
            counts: piece(MoeSorting::counts_bytes(self.experts)),
            activated: piece(pairs * self.intermediate * 2),
            codes: piece(codes),
            scales: piece(scales),
            products: piece(pairs * self.hidden * self.products.bytes()),
            total: end,
        }
    }

    /// Bytes of workspace of a call of `rows` rows.
    pub fn workspace_bytes(&self, rows: usize) -> usize {
        self.pieces(rows).total
    }

    /// The launches of a call.
    ///
    /// # Errors
    /// [`BadLaunch`] for sizes that the kernels cannot do.
    pub fn launches(&self, weights: ExpertsWeights, call: ExpertsCall) -> Result<ExpertsLaunches, BadLaunch> {
        let Self {
            arch,
            scheme,
            hidden,
            intermediate,
            top_k,
            experts,
            num_experts,
            products,
            out,
            compute_units,
        } = *self;
        let (rows, pairs, pieces) = (call.rows, self.pairs(call.rows), self.pieces(call.rows));
        let at = |offset: usize| call.workspace + offset as u64;
        let gemm = |n, k, has_activation| GroupedGemm {
            arch,
            scheme,
            experts,
            n,
            k,
            has_activation,
            products,
            tile: call.tile,
            compute_units,
        };
        let sort = MoeSorting { rows, top_k, experts, num_experts, policy: SortPolicy::Auto };
        let sort = sort.launches(SortingBuffers {
            ids: call.ids,
            map: call.map,
            offsets: at(pieces.offsets),
            pair_rows: at(pieces.pair_rows),
            positions: at(pieces.positions),
            counts: at(pieces.counts),
        })?;
        let gate_up = gemm(2 * intermediate, hidden, true).launch(GemmBuffers {
            weights: weights.gate_up,
            weights_map: weights.gate_up_map,
            weight_scales: weights.gate_up_scales,
            tokens: call.tokens,
            token_scales: call.token_scales,
            pair_rows: at(pieces.pair_rows),
            offsets: at(pieces.offsets),
            out: at(pieces.activated),
        })?;
        // As many pairs as there are: the end of the last expert.
        let buffers = QuantizeBuffers {
            input: at(pieces.activated),
            codes: at(pieces.codes),
            scales: at(pieces.scales),
            count: at(pieces.offsets + experts * 4),
        };
        let format = arch.fp8();
        let quantize = match scheme {
            GemmScheme::Bf16 => Requantize::Not,
            GemmScheme::Fp8Block => {
                let (hidden, scales) = (intermediate, ScaleOrder::RowMajor);
                let job = Quantize1x128 { rows: pairs, hidden, input_stride: hidden, scales, format };
                Requantize::Block(job.launch(buffers)?)
            }
            GemmScheme::Fp8Row => {
                let job = QuantizePerToken {
                    rows: pairs,
                    hidden: intermediate,
                    input_stride: intermediate,
                    format,
                };
                Requantize::Row(job.launch(buffers)?)
            }
        };
        let is_quantized = scheme != GemmScheme::Bf16;
        let down = gemm(hidden, intermediate, false).launch(GemmBuffers {
            weights: weights.down,
            weights_map: weights.down_map,
            weight_scales: weights.down_scales,
            tokens: if is_quantized { at(pieces.codes) } else { at(pieces.activated) },
            token_scales: at(pieces.scales),
            pair_rows: 0,
            offsets: at(pieces.offsets),
            out: at(pieces.products),
        })?;
        let sum = WeightedSum { rows, top_k, hidden, products, out }.launch(SumBuffers {
            products: at(pieces.products),
            positions: at(pieces.positions),
            weights: call.weights,
            out: call.out,
        })?;
        Ok(ExpertsLaunches { sort, gate_up, quantize, down, sum })
    }
}

impl ExpertsLaunches {
    /// Runs the call on the CPU.
    ///
    /// # Errors
    /// [`SimtError`](crate::host_simt::SimtError).
    ///
    /// # Safety
    /// As for [`ExpertsLaunches::enqueue`], with memory of this process.
    #[cfg(feature = "host-simt")]
    pub unsafe fn simulate(
        &self,
        arch: Arch,
        schedule: crate::host_simt::Schedule,
    ) -> Result<(), crate::host_simt::SimtError> {
        use crate::host_simt::run;
        // SAFETY: as in `enqueue`.
        unsafe {
            self.sort.simulate(arch, schedule)?;
            run(arch, &self.gate_up, schedule)?;
            match &self.quantize {
                Requantize::Not => {}
                Requantize::Block(launch) => run(arch, launch, schedule)?,
                Requantize::Row(launch) => run(arch, launch, schedule)?,
            }
            run(arch, &self.down, schedule)?;
            run(arch, &self.sum, schedule)
        }
    }

    /// Puts the call on `stream`.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Safety
    /// All that the shape, the weights and the call name is in memory of the device, as large as they say, and stays there
    /// until the call has run; nobody else writes it, or reads what the call writes, meanwhile.
    pub unsafe fn enqueue(&self, kernels: &Kernels, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: the caller vouches for the memory; the pieces of the workspace do not overlap, and the kernels run in order.
        unsafe {
            self.sort.enqueue(kernels, stream)?;
            kernels.launch(&self.gate_up, stream)?;
            match &self.quantize {
                Requantize::Not => {}
                Requantize::Block(launch) => kernels.launch(launch, stream)?,
                Requantize::Row(launch) => kernels.launch(launch, stream)?,
            }
            kernels.launch(&self.down, stream)?;
            kernels.launch(&self.sum, stream)
        }
    }
}
