//! Seeds: fresh ones every run, and the numbers that follow from one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// What all random numbers of a run follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seed(pub u64);

impl Seed {
    /// A seed that no earlier call returned, from the clock.
    pub fn fresh() -> Self {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
        Self(nanos).derive(CALLS.fetch_add(1, Ordering::Relaxed))
    }

    /// A seed of its own for part `part` of what this seed is for.
    #[must_use]
    pub fn derive(self, part: u64) -> Self {
        // The finaliser of SplitMix64: neighbouring parts get unrelated seeds.
        let mut z = self.0 ^ part.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(z ^ (z >> 31))
    }

    /// The numbers of this seed.
    pub(crate) fn rng(self) -> Pcg64Mcg {
        Pcg64Mcg::seed_from_u64(self.0)
    }
}

impl std::fmt::Display for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A number that is close to normal with mean 0 and variance 1: four uniform ones added up.
pub(crate) fn normal(rng: &mut Pcg64Mcg) -> f32 {
    let bits = rng.random::<u64>().to_le_bytes();
    let (quarters, _) = bits.as_chunks::<2>();
    let sum: f32 = quarters.iter().map(|&q| f32::from(u16::from_le_bytes(q))).sum();
    // A uniform number of 0..65536 has mean 32767.5 and variance 65536²/12.
    (sum - 4.0 * 32767.5) / (65536.0 / 3f32.sqrt())
}
