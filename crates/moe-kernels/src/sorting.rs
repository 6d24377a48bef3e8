//! Before stage 3: which rows each local expert has.

use device_runtime::{DeviceError, Stream};

use crate::launch::{BadLaunch, KernelParams, Launch};
use crate::loaded::Kernels;

const SINGLE_PASS: &str = "moe_sorting";
const COUNT: &str = "moe_sorting_count";
const PLACE: &str = "moe_sorting_place";
const THREADS: u32 = 512;
/// Slots of a block of two phases: one for each thread.
const BLOCK_SLOTS: usize = THREADS as usize;
/// Blocks of two phases, at most; each reads the counts of all.
const MAX_BLOCKS: usize = 128;
/// Local experts of two phases: `MOE_SORTING_EXPERTS` in `kernels/experts/moe_sorting.h`.
const MAX_EXPERTS: usize = 256;
/// Slots from which two phases take less time than one, on an H200.
const FEWEST_SLOTS: usize = 2560;

/// How slots are sorted, in AITER's numbers; the results are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SortPolicy {
    /// By the number of slots.
    #[default]
    Auto = 0,
    /// One launch, in which every expert's block reads all slots.
    SinglePass = 1,
    /// Two launches that share the slots out: count, then place. With more than 256 local experts it is one.
    MultiPhase = 2,
}

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
    /// In how many launches.
    pub policy: SortPolicy,
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
    /// [`MoeSorting::counts_bytes`], written.
    pub counts: u64,
}

/// The launches of a call.
#[derive(Clone, Copy, Debug)]
pub enum SortingLaunches {
    /// One.
    SinglePass(Launch<MoeSortingParams>),
    /// Two, in this order.
    MultiPhase([Launch<MoeSortingParams>; 2]),
}

impl SortingLaunches {
    /// In order.
    pub fn as_slice(&self) -> &[Launch<MoeSortingParams>] {
        match self {
            Self::SinglePass(launch) => std::slice::from_ref(launch),
            Self::MultiPhase(launches) => launches,
        }
    }

    /// Puts them on `stream`.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Safety
    /// The buffers are in memory of the device, as large as they should be, and nobody else uses them meanwhile.
    pub unsafe fn enqueue(&self, kernels: &Kernels, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: the caller vouches for the memory.
        self.as_slice().iter().try_for_each(|launch| unsafe { kernels.launch(launch, stream) })
    }

    /// Runs the launches on the CPU.
    ///
    /// # Errors
    /// [`SimtError`](crate::host_simt::SimtError).
    ///
    /// # Safety
    /// As for [`SortingLaunches::enqueue`], with memory of this process.
    #[cfg(feature = "host-simt")]
    pub unsafe fn simulate(
        &self,
        arch: crate::Arch,
        schedule: crate::host_simt::Schedule,
    ) -> Result<(), crate::host_simt::SimtError> {
        // SAFETY: the caller vouches for the memory.
        self.as_slice().iter().try_for_each(|launch| unsafe { crate::host_simt::run(arch, launch, schedule) })
    }
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
    counts: u64,
    slots: u32,
    top_k: u32,
    experts: u32,
    num_experts: u32,
    blocks: u32,
    unused: u32,
}

const _: () = assert!(size_of::<MoeSortingParams>() == 72);

// SAFETY: `repr(C)`, six fields of 8 bytes and six of 4, 72 bytes in all, so there is no padding; the struct in
// `kernels/experts/moe_sorting.h` has the same fields in the same order.
unsafe impl KernelParams for MoeSortingParams {}

impl MoeSorting {
    /// Bytes of [`SortingBuffers::counts`] for any number of rows.
    pub const fn counts_bytes(experts: usize) -> usize {
        MAX_BLOCKS * experts * 4
    }

    /// The call.
    ///
    /// # Errors
    /// [`BadLaunch`] for sizes beyond 32 bits.
    pub fn launches(&self, buffers: SortingBuffers) -> Result<SortingLaunches, BadLaunch> {
        let slots = self.rows.saturating_mul(self.top_k);
        let is_multi_phase = match self.policy {
            SortPolicy::Auto => slots >= FEWEST_SLOTS,
            SortPolicy::SinglePass => false,
            SortPolicy::MultiPhase => true,
        };
        let narrow = |what, size| BadLaunch::narrow(SINGLE_PASS, what, size);
        let SortingBuffers { ids, map, offsets, pair_rows, positions, counts } = buffers;
        let experts = narrow("local experts", self.experts)?;
        let blocks = slots.div_ceil(BLOCK_SLOTS).clamp(1, MAX_BLOCKS) as u32;
        let params = MoeSortingParams {
            ids,
            map,
            offsets,
            pair_rows,
            positions,
            counts,
            slots: narrow("slots", slots)?,
            top_k: narrow("top-k", self.top_k)?,
            experts,
            num_experts: narrow("experts", self.num_experts)?,
            blocks,
            unused: 0,
        };
        let launch = |kernel, grid| Launch { kernel, grid, block: THREADS, shared_bytes: 0, params };
        Ok(if is_multi_phase && (1..=MAX_EXPERTS).contains(&self.experts) {
            SortingLaunches::MultiPhase([launch(COUNT, blocks), launch(PLACE, blocks)])
        } else {
            SortingLaunches::SinglePass(launch(SINGLE_PASS, experts))
        })
    }
}
