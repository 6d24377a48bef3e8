//! Host SIMT itself: what is right runs, and what lacks a barrier is found.

use moe_kernels::Arch;
use moe_kernels::host_simt::{Schedule, SimtError, run};
use moe_kernels::selftest::{SelftestParams, launch};
use rstest::rstest;

const BLOCKS: usize = 5;
const THREADS: usize = 128;

fn outcome(kernel: &'static str, arch: Arch, seed: u64) -> Result<Vec<u32>, SimtError> {
    let input: Vec<u32> = (0..(BLOCKS * THREADS) as u32).map(|i| i * 7 + 3).collect();
    let mut output = vec![u32::MAX; input.len()];
    let params = SelftestParams { input: input.as_ptr() as u64, output: output.as_mut_ptr() as u64 };
    // SAFETY: the kernels read and write one element per thread of these two.
    unsafe { run(arch, &launch(kernel, BLOCKS as u32, params), Schedule::of(seed)) }.map(|()| output)
}

fn reversed() -> Vec<u32> {
    let of = |block: usize, thread: usize| (block * THREADS + THREADS - 1 - thread) as u32 * 7 + 3;
    (0..BLOCKS).flat_map(|block| (0..THREADS).map(move |thread| of(block, thread))).collect()
}

#[rstest]
fn threads_meet_at_a_barrier(#[values(Arch::Sm90a, Arch::Gfx942)] arch: Arch) {
    for seed in 0..50 {
        assert_eq!(outcome("selftest_reverse", arch, seed).unwrap(), reversed(), "seed {seed}");
    }
}

#[rstest]
fn a_missing_barrier_is_found(#[values(Arch::Sm90a, Arch::Gfx942)] arch: Arch) {
    for seed in 0..10 {
        let output = outcome("selftest_reverse_without_barrier", arch, seed).unwrap();
        assert_ne!(output, reversed(), "seed {seed} has hidden it");
        assert!(output.contains(&u32::MAX), "shared memory was not poisoned");
    }
}

#[rstest]
fn lanes_of_a_warp_exchange(#[values(Arch::Sm90a, Arch::Gfx942)] arch: Arch) {
    let warp = arch.warp() as usize;
    let output = outcome("selftest_warp_sum", arch, 7).unwrap();
    for (index, &sum) in output.iter().enumerate() {
        let first = index / warp * warp;
        let wanted: u32 = (first..first + warp).map(|i| i as u32 * 7 + 3).sum();
        assert_eq!(sum, wanted, "thread {index}");
    }
}

#[test]
fn threads_that_wait_for_nobody_are_an_error() {
    let stuck = SimtError::Stuck { kernel: "selftest_stuck" };
    assert_eq!(outcome("selftest_stuck", Arch::Sm90a, 1), Err(stuck));
    let unknown = SimtError::NoKernel { kernel: "selftest_stuck", arch: Arch::Gfx950 };
    assert_eq!(outcome("selftest_stuck", Arch::Gfx950, 1), Err(unknown));
}
