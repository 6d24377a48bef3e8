//! How fast memory can be copied at most, measured in the process that wants to compare itself to it.

use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::streaming::copy_streaming;

/// How long a probe measures, without its preparation.
const MEASURED: Duration = Duration::from_millis(100);
/// Bytes that are copied between two looks at the clock, at least.
const PASS: usize = 1 << 20;

/// How a copy writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// As the platform's `memcpy` does for a row.
    Ordinary,
    /// Past the caches, as [`copy_streaming`].
    NonTemporal,
}

/// Bytes per second that `threads` threads together copy in rows of `row_bytes`. Each copies `rows` rows of its own
/// memory to other rows of its own, again and again; of its passes the median counts. 0 for rows of no bytes.
pub fn copy_bandwidth(threads: NonZeroUsize, rows: NonZeroUsize, row_bytes: usize, stores: Stores) -> f64 {
    if row_bytes == 0 {
        return 0.0;
    }
    let barrier = Barrier::new(threads.get());
    let median_rate = || {
        // Written, so that no page is the shared page of zeros.
        let source = vec![1_u8; rows.get() * row_bytes];
        let mut target = vec![2_u8; rows.get() * row_bytes];
        let passes = PASS.div_ceil(source.len());
        let mut rates = Vec::new();
        barrier.wait();
        let start = Instant::now();
        while rates.len() < 3 || start.elapsed() < MEASURED {
            let begin = Instant::now();
            for _ in 0..passes {
                for (to, from) in target.chunks_exact_mut(row_bytes).zip(source.chunks_exact(row_bytes)) {
                    match stores {
                        Stores::Ordinary => to.copy_from_slice(from),
                        Stores::NonTemporal => copy_streaming(to, from),
                    }
                }
                std::hint::black_box(&mut target);
            }
            rates.push((passes * source.len()) as f64 / begin.elapsed().as_secs_f64());
        }
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.get()).map(|_| scope.spawn(median_rate)).collect();
        running.into_iter().map(|thread| thread.join().expect("a probe thread does not panic")).sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_measured() {
        let (one, rows) = (NonZeroUsize::MIN, NonZeroUsize::new(8).unwrap());
        for stores in [Stores::Ordinary, Stores::NonTemporal] {
            assert!(copy_bandwidth(one, rows, 7168, stores) > 1e8);
        }
        assert_eq!(copy_bandwidth(one, rows, 0, Stores::Ordinary), 0.0);
    }
}
