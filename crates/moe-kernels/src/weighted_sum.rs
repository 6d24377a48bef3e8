//! The end of stage 3: the outputs of a token's experts, weighted and summed.

use crate::launch::{BadLaunch, Float, KernelParams, Launch};

const NAME: &str = "weighted_sum";
const THREADS: u32 = 256;
/// Columns of a lane.
const LANE: usize = 8;

/// Rows to sum, in f32 and in the order of their slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightedSum {
    /// Rows; may be 0.
    pub rows: usize,
    /// Slots of a row.
    pub top_k: usize,
    /// Columns, a multiple of 8.
    pub hidden: usize,
    /// What is read.
    pub products: Float,
    /// What is written.
    pub out: Float,
}

/// Addresses in the device's memory, aligned to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumBuffers {
    /// `[pairs, hidden]`.
    pub products: u64,
    /// `[rows, top_k]` i32: the pair of each slot; negative ones are left out.
    pub positions: u64,
    /// `[rows, top_k]` f32.
    pub weights: u64,
    /// `[rows, hidden]`, written; 0 for rows without pairs.
    pub out: u64,
}

/// The argument of the kernel: `WeightedSumParams` in `kernels/experts/weighted_sum.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightedSumParams {
    products: u64,
    positions: u64,
    weights: u64,
    out: u64,
    rows: u32,
    top_k: u32,
    hidden: u32,
    blocks_per_row: u32,
    products_are_bf16: u32,
    out_is_bf16: u32,
}

const _: () = assert!(size_of::<WeightedSumParams>() == 56);

// SAFETY: `repr(C)`, four fields of 8 bytes and six of 4, 56 bytes in all, so there is no padding; the struct in
// `kernels/experts/weighted_sum.h` has the same fields in the same order.
unsafe impl KernelParams for WeightedSumParams {}

impl WeightedSum {
    /// The call.
    ///
    /// # Errors
    /// [`BadLaunch`] for a hidden size that is no multiple of 8, and for sizes beyond 32 bits.
    pub fn launch(&self, buffers: SumBuffers) -> Result<Launch<WeightedSumParams>, BadLaunch> {
        let narrow = |what, size| BadLaunch::narrow(NAME, what, size);
        let SumBuffers { products, positions, weights, out } = buffers;
        BadLaunch::multiple(NAME, "hidden", self.hidden, LANE)?;
        let blocks_per_row = self.hidden.div_ceil(THREADS as usize * LANE);
        Ok(Launch {
            kernel: NAME,
            grid: narrow("blocks", self.rows.saturating_mul(blocks_per_row))?,
            block: THREADS,
            shared_bytes: 0,
            params: WeightedSumParams {
                products,
                positions,
                weights,
                out,
                rows: narrow("rows", self.rows)?,
                top_k: narrow("top-k", self.top_k)?,
                hidden: narrow("hidden", self.hidden)?,
                blocks_per_row: narrow("blocks of a row", blocks_per_row)?,
                products_are_bf16: self.products.is_bf16(),
                out_is_bf16: self.out.is_bf16(),
            },
        })
    }
}
