//! What this machine can do at most, measured in the process that wants to compare itself to it.

use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::Isa;
use crate::aligned::Aligned;
use crate::kernel::{Ahead, Kernel, TILE_ROWS, Tile};
use crate::panel::{PANEL, PanelPairs};
use crate::portable::Portable;

/// How long each probe measures, without its preparation.
const MEASURED: Duration = Duration::from_millis(100);
/// Bytes that all threads together read in one pass, well beyond common shared caches.
const READ_BYTES: usize = 512 << 20;

/// The rate of bf16 products on `threads` threads in flop/s (a product and its addition are two), with
/// the machine's fastest instruction set and operands in registers (AVX-512) or L1 (others).
pub fn peak_bf16_flops(threads: NonZeroUsize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    match Isa::detect() {
        Isa::Avx512Bf16 => {
            if let Some(kernel) = crate::avx512::Avx512::new() {
                return total_rate(threads, |_| move || crate::avx512::spin_products(kernel, 50_000));
            }
        }
        Isa::Avx2Fma => {
            if let Some(kernel) = crate::avx2::Avx2::new() {
                return peak_of_tiles(kernel, threads);
            }
        }
        Isa::Portable => {}
    }
    peak_of_tiles(Portable, threads)
}

/// The rate of f32 products, as [`peak_bf16_flops`].
pub fn peak_f32_flops(threads: NonZeroUsize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    match Isa::detect() {
        Isa::Avx512Bf16 => {
            if let Some(kernel) = crate::avx512::Avx512::new() {
                return total_rate(threads, |_| move || crate::avx512::spin_f32_products(kernel, 50_000));
            }
        }
        Isa::Avx2Fma => {
            if let Some(kernel) = crate::avx2::Avx2::new() {
                return peak_of_f32_tiles(kernel, threads);
            }
        }
        Isa::Portable => {}
    }
    peak_of_f32_tiles(Portable, threads)
}

fn peak_of_tiles(kernel: impl Kernel, threads: NonZeroUsize) -> f64 {
    peak_of(kernel, threads, |panel| PanelPairs::Bf16(panel), 4)
}

fn peak_of_f32_tiles(kernel: impl Kernel, threads: NonZeroUsize) -> f64 {
    peak_of(kernel, threads, |panel| PanelPairs::F32(panel), 2)
}

/// The rate of whole tiles whose operands lie in L1, of so many operations to a word and column.
fn peak_of(
    kernel: impl Kernel,
    threads: NonZeroUsize,
    panel_of: impl Fn(&[u32]) -> PanelPairs<'_> + Copy + Send + Sync,
    flops: usize,
) -> f64 {
    total_rate(threads, |_| {
        const PAIRS: usize = 64;
        let words = vec![0x3f80_3f80; TILE_ROWS * PAIRS];
        let panel = vec![0x3f80_3f80; PAIRS * PANEL];
        let mut sums = vec![0.0; TILE_ROWS * PANEL];
        move || {
            for _ in 0..200 {
                let tile = Tile {
                    rows: TILE_ROWS,
                    words: &words,
                    pitch: PAIRS,
                    sums: &mut sums,
                    sums_pitch: PANEL,
                    scales: None,
                    ahead: Ahead::NOTHING,
                };
                kernel.multiply(tile, panel_of(std::hint::black_box(&panel)));
            }
            (200 * TILE_ROWS * PANEL * PAIRS * flops) as f64
        }
    })
}

/// The rate at which `threads` threads together read memory, in byte/s. Each reads its own part of
/// 512 MiB, which is allocated for the probe. Caches larger than that make it too high.
pub fn read_bandwidth(threads: NonZeroUsize) -> f64 {
    let words = READ_BYTES / size_of::<u32>() / threads;
    total_rate(threads, |thread| {
        // Memory as weights have it, on huge pages if those are.
        let mut memory = Aligned::<u32>::zeroed(words);
        memory.as_mut_slice().fill(thread as u32 + 1);
        move || {
            #[cfg(target_arch = "x86_64")]
            if let Some(kernel) = crate::avx512::Avx512::new() {
                std::hint::black_box(kernel.vectorize(
                    #[inline(always)]
                    || sum(memory.as_slice()),
                ));
                return size_of_val(memory.as_slice()) as f64;
            }
            std::hint::black_box(sum(memory.as_slice()));
            size_of_val(memory.as_slice()) as f64
        }
    })
}

#[inline(always)]
fn sum(memory: &[u32]) -> u32 {
    memory.iter().fold(0u32, |sum, word| sum.wrapping_add(*word))
}

/// Runs one unit of work per thread again and again, all threads at once, and returns the sum of the
/// threads' median rates.
fn total_rate<W: FnMut() -> f64>(threads: NonZeroUsize, prepare: impl Fn(usize) -> W + Sync) -> f64 {
    let barrier = Barrier::new(threads.get());
    let median_rate = |thread| {
        let mut work = prepare(thread);
        let mut rates = Vec::new();
        barrier.wait();
        let start = Instant::now();
        while rates.len() < 3 || start.elapsed() < MEASURED {
            let begin = Instant::now();
            let amount = work();
            rates.push(amount / begin.elapsed().as_secs_f64());
        }
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads.get())
            .map(|thread| {
                let median_rate = &median_rate;
                scope.spawn(move || median_rate(thread))
            })
            .collect();
        running.into_iter().map(|thread| thread.join().expect("a probe thread does not panic")).sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_measure_something() {
        let one = NonZeroUsize::MIN;
        assert!(peak_bf16_flops(one) > 1e9);
        assert!(peak_f32_flops(one) > 1e9);
        assert!(read_bandwidth(one) > 1e8);
    }
}
