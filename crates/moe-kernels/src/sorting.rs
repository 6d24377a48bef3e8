//! Before stage 3: which rows each local expert has.

use crate::launch::{BadLaunch, KernelParams, Launch};

const NAME: &str = "moe_sorting";
const THREADS: u32 = 512;

/// Slots to sort by local expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeSorting {
    /// Rows; may be 0.
    pub rows: usize,
    /// Slots of a row.
    pub top_k: usize,
    /// Local experts.
    pub experts: usize,
    /// Experts over all ranks.
    pub num_experts: usize,
}

/// Addresses in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SortingBuffers {
    /// `[rows, top_k]` i32: global experts. Negative is none, and so is a number that no expert has.
    pub ids: u64,
    /// `[num_experts]` i32: local expert of each global one, negative if it is elsewhere. 0 if they are the same.
    pub map: u64,
    /// `[experts + 1]` u32, written: where the pairs of each local expert begin.
    pub offsets: u64,
    /// `[rows · top_k]` u32, written as far as there are pairs: the row of each, ascending within an expert.
    pub pair_rows: u64,
    /// `[rows, top_k]` i32, written: the pair of each slot, -1 if its expert is not here.
    pub positions: u64,
}

/// The argument of the kernel: `MoeSortingParams` in `kernels/experts/moe_sorting.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeSortingParams {
    ids: u64,
    map: u64,
    offsets: u64,
    pair_rows: u64,
    positions: u64,
    slots: u32,
    top_k: u32,
    experts: u32,
    num_experts: u32,
}

const _: () = assert!(size_of::<MoeSortingParams>() == 56);

// SAFETY: `repr(C)`, five fields of 8 bytes and four of 4, 56 bytes in all, so there is no padding; the struct in
// `kernels/experts/moe_sorting.h` has the same fields in the same order.
unsafe impl KernelParams for MoeSortingParams {}

impl MoeSorting {
    /// The call.
    ///
    /// # Errors
    /// [`BadLaunch`] for sizes beyond 32 bits.
    pub fn launch(&self, buffers: SortingBuffers) -> Result<Launch<MoeSortingParams>, BadLaunch> {
        let narrow = |what, size| BadLaunch::narrow(NAME, what, size);
        let SortingBuffers { ids, map, offsets, pair_rows, positions } = buffers;
        let experts = narrow("local experts", self.experts)?;
        Ok(Launch {
            kernel: NAME,
            grid: experts,
            block: THREADS,
            shared_bytes: 0,
            params: MoeSortingParams {
                ids,
                map,
                offsets,
                pair_rows,
                positions,
                slots: narrow("slots", self.rows.saturating_mul(self.top_k))?,
                top_k: narrow("top-k", self.top_k)?,
                experts,
                num_experts: narrow("experts", self.num_experts)?,
            },
        })
    }
}
