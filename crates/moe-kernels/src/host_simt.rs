//! The kernels on the CPU: what a device would run, thread by thread, in a random order.
//!
//! For tests. A result that depends on the order of threads between two barriers differs from seed to seed, and shared
//! memory holds NaN before it is written.

use std::ffi::c_void;

use crate::arch::Arch;
use crate::launch::{KernelParams, Launch};

/// In which order threads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Of the random order.
    pub seed: u64,
    /// Blocks that run at the same time; as many as there are for kernels whose blocks wait for each other.
    pub resident: u32,
}

impl Schedule {
    /// Few blocks at a time, in the order of `seed`.
    pub fn of(seed: u64) -> Self {
        Self { seed, resident: 1 + (seed % 3) as u32 }
    }
}

/// Why a kernel did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimtError {
    /// The device that is played has no such kernel.
    #[error("{arch} has no kernel {kernel}")]
    NoKernel {
        /// The kernel.
        kernel: &'static str,
        /// The device.
        arch: Arch,
    },
    /// Threads wait for others that never come.
    #[error("{kernel}: threads wait for others that have ended or wait for something else")]
    Stuck {
        /// The kernel.
        kernel: &'static str,
    },
    /// More threads than the kernel is made for, none, or a part of a warp.
    #[error("{kernel} cannot run on blocks of {block} threads")]
    BadBlock {
        /// The kernel.
        kernel: &'static str,
        /// Threads of a block.
        block: u32,
    },
}

/// `moe::simt::Launch`.
#[repr(C)]
struct RawLaunch {
    grid: u32,
    block: u32,
    shared_bytes: u32,
    resident: u32,
    seed: u64,
}

type Entry = unsafe extern "C" fn(*const c_void, *const RawLaunch) -> i32;

macro_rules! entries {
    ($($kernel:literal: $($arch:ident $symbol:ident),+;)*) => {
        unsafe extern "C" {
            $($(fn $symbol(params: *const c_void, launch: *const RawLaunch) -> i32;)+)*
        }
        /// The kernels, and by which functions each device runs them.
        const ENTRIES: &[(&str, Arch, Entry)] = &[$($(($kernel, Arch::$arch, $symbol as Entry),)+)*];
    };
}

entries! {
    "quantize_1x128":
        Sm90a moe_sm_90a_quantize_1x128, Gfx942 moe_gfx942_quantize_1x128, Gfx950 moe_gfx950_quantize_1x128;
    "quantize_per_token":
        Sm90a moe_sm_90a_quantize_per_token, Gfx942 moe_gfx942_quantize_per_token, Gfx950 moe_gfx950_quantize_per_token;
    "moe_sorting":
        Sm90a moe_sm_90a_moe_sorting, Gfx942 moe_gfx942_moe_sorting, Gfx950 moe_gfx950_moe_sorting;
    "moe_sorting_count":
        Sm90a moe_sm_90a_moe_sorting_count, Gfx942 moe_gfx942_moe_sorting_count, Gfx950 moe_gfx950_moe_sorting_count;
    "moe_sorting_place":
        Sm90a moe_sm_90a_moe_sorting_place, Gfx942 moe_gfx942_moe_sorting_place, Gfx950 moe_gfx950_moe_sorting_place;
    "router_128":
        Sm90a moe_sm_90a_router_128, Gfx942 moe_gfx942_router_128, Gfx950 moe_gfx950_router_128;
    "router_256":
        Sm90a moe_sm_90a_router_256, Gfx942 moe_gfx942_router_256, Gfx950 moe_gfx950_router_256;
    "router_512":
        Sm90a moe_sm_90a_router_512, Gfx942 moe_gfx942_router_512, Gfx950 moe_gfx950_router_512;
    "router_1024":
        Sm90a moe_sm_90a_router_1024, Gfx942 moe_gfx942_router_1024, Gfx950 moe_gfx950_router_1024;
    "weighted_sum":
        Sm90a moe_sm_90a_weighted_sum, Gfx942 moe_gfx942_weighted_sum, Gfx950 moe_gfx950_weighted_sum;
    "grouped_gemm_bf16_16":
        Gfx942 moe_gfx942_grouped_gemm_bf16_16, Gfx950 moe_gfx950_grouped_gemm_bf16_16;
    "grouped_gemm_bf16_32":
        Gfx942 moe_gfx942_grouped_gemm_bf16_32, Gfx950 moe_gfx950_grouped_gemm_bf16_32;
    "grouped_gemm_bf16_64":
        Gfx942 moe_gfx942_grouped_gemm_bf16_64, Gfx950 moe_gfx950_grouped_gemm_bf16_64;
    "grouped_gemm_bf16_128":
        Gfx942 moe_gfx942_grouped_gemm_bf16_128, Gfx950 moe_gfx950_grouped_gemm_bf16_128;
    "grouped_gemm_fp8_block_16":
        Gfx942 moe_gfx942_grouped_gemm_fp8_block_16, Gfx950 moe_gfx950_grouped_gemm_fp8_block_16;
    "grouped_gemm_fp8_block_32":
        Gfx942 moe_gfx942_grouped_gemm_fp8_block_32, Gfx950 moe_gfx950_grouped_gemm_fp8_block_32;
    "grouped_gemm_fp8_block_64":
        Gfx942 moe_gfx942_grouped_gemm_fp8_block_64, Gfx950 moe_gfx950_grouped_gemm_fp8_block_64;
    "grouped_gemm_fp8_block_128":
        Gfx942 moe_gfx942_grouped_gemm_fp8_block_128, Gfx950 moe_gfx950_grouped_gemm_fp8_block_128;
    "grouped_gemm_fp8_row_16":
        Gfx942 moe_gfx942_grouped_gemm_fp8_row_16, Gfx950 moe_gfx950_grouped_gemm_fp8_row_16;
    "grouped_gemm_fp8_row_32":
        Gfx942 moe_gfx942_grouped_gemm_fp8_row_32, Gfx950 moe_gfx950_grouped_gemm_fp8_row_32;
    "grouped_gemm_fp8_row_64":
        Gfx942 moe_gfx942_grouped_gemm_fp8_row_64, Gfx950 moe_gfx950_grouped_gemm_fp8_row_64;
    "grouped_gemm_fp8_row_128":
        Gfx942 moe_gfx942_grouped_gemm_fp8_row_128, Gfx950 moe_gfx950_grouped_gemm_fp8_row_128;
    "selftest_reverse":
        Sm90a moe_sm_90a_selftest_reverse, Gfx942 moe_gfx942_selftest_reverse;
    "selftest_reverse_without_barrier":
        Sm90a moe_sm_90a_selftest_reverse_without_barrier, Gfx942 moe_gfx942_selftest_reverse_without_barrier;
    "selftest_warp_sum":
        Sm90a moe_sm_90a_selftest_warp_sum, Gfx942 moe_gfx942_selftest_warp_sum;
    "selftest_stuck":
        Sm90a moe_sm_90a_selftest_stuck, Gfx942 moe_gfx942_selftest_stuck;
    "selftest_mfma_bf16_16":
        Gfx942 moe_gfx942_selftest_mfma_bf16_16, Gfx950 moe_gfx950_selftest_mfma_bf16_16;
    "selftest_mfma_bf16_32":
        Gfx942 moe_gfx942_selftest_mfma_bf16_32, Gfx950 moe_gfx950_selftest_mfma_bf16_32;
    "selftest_mfma_fp8_16":
        Gfx942 moe_gfx942_selftest_mfma_fp8_16, Gfx950 moe_gfx950_selftest_mfma_fp8_16;
    "selftest_mfma_fp8_32":
        Gfx942 moe_gfx942_selftest_mfma_fp8_32, Gfx950 moe_gfx950_selftest_mfma_fp8_32;
    "grouped_gemm_other_lanes_16":
        Gfx942 moe_gfx942_grouped_gemm_other_lanes_16;
    "grouped_gemm_other_lanes_32":
        Gfx942 moe_gfx942_grouped_gemm_other_lanes_32;
    "grouped_gemm_without_barrier_32":
        Gfx942 moe_gfx942_grouped_gemm_without_barrier_32;
}

/// Runs `launch` as `arch` would. Addresses in its params are those of this process.
///
/// # Errors
/// [`SimtError`].
///
/// # Safety
/// The kernel reads and writes what its params say: the memory must be there, and nobody else may use it meanwhile.
pub unsafe fn run<P: KernelParams>(
    arch: Arch,
    launch: &Launch<P>,
    schedule: Schedule,
) -> Result<(), SimtError> {
    let Launch { kernel, grid, block, shared_bytes, params, .. } = launch;
    let known = ENTRIES.iter().find(|(name, of, _)| name == kernel && *of == arch);
    let (_, _, entry) = known.ok_or(SimtError::NoKernel { kernel, arch })?;
    let Schedule { seed, resident } = schedule;
    let raw = RawLaunch { grid: *grid, block: *block, shared_bytes: *shared_bytes, resident, seed };
    // SAFETY: `KernelParams` is the struct that the kernel reads; the caller vouches for the memory that it names.
    match unsafe { entry(std::ptr::from_ref(params).cast(), &raw) } {
        0 => Ok(()),
        1 => Err(SimtError::Stuck { kernel }),
        _ => Err(SimtError::BadBlock { kernel, block: *block }),
    }
}
