//! Kernels that test host SIMT itself; they are not built for devices.

use crate::launch::{KernelParams, Launch};

const THREADS: u32 = 128;

/// The argument of the kernels: `SelftestParams` in `kernels/selftest/selftest.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SelftestParams {
    /// Address of `[blocks, 128]` u32.
    pub input: u64,
    /// Address of `[blocks, 128]` u32, written.
    pub output: u64,
}

const _: () = assert!(size_of::<SelftestParams>() == 16);

// SAFETY: `repr(C)`, two fields of 8 bytes, so there is no padding; the struct in `kernels/selftest/selftest.h` has the
// same fields in the same order.
unsafe impl KernelParams for SelftestParams {}

/// The call of `kernel` on `blocks` blocks.
pub fn launch(kernel: &'static str, blocks: u32, params: SelftestParams) -> Launch<SelftestParams> {
    Launch { kernel, grid: blocks, block: THREADS, shared_bytes: 0, params }
}

/// The call of `kernel` on one wave. Its input is an operand a of each lane and an operand b of each; its output their sums, f32.
pub fn wave(kernel: &'static str, params: SelftestParams) -> Launch<SelftestParams> {
    Launch { kernel, grid: 1, block: 64, shared_bytes: 0, params }
}
