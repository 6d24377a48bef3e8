//! Sums of products in f32 or by tensor cores, and how far they may be from the exact ones.

use fused_moe_core::Accumulation;

/// Unit roundoff of f32.
pub(crate) const U: f64 = 1.0 / 16_777_216.0;

/// Standard deviations of a sum's error that are allowed, see [`Products::error`].
pub(super) const DEVIATIONS: f64 = 3.0;

/// Roundings of a single product besides its place in the sum: code times scale for both factors, the product.
const PER_PRODUCT: usize = 3;

/// Smallest normal f32: what an instruction that flushes subnormals may lose of a product.
const FLUSHED: f64 = 1.1754943508222875e-38;

/// A value of the oracle and how far an f32 backend may be from it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Bounded {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

/// Sums over the products of two rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Products {
    /// Σ xw.
    pub(crate) sum: f64,
    /// Σ (xw)².
    pub(crate) squares: f64,
    /// What tensor cores may have cut off.
    pub(crate) cut_off: f64,
    /// How many products.
    pub(crate) count: usize,
}

impl Products {
    /// The sums of `a · b`, in eight lanes, which the compiler vectorises, for a backend that adds up as `accumulation` says.
    pub(crate) fn of(a: &[f64], b: &[f64], accumulation: Accumulation) -> Self {
        let (mut sums, mut squares) = ([0.0; 8], [0.0; 8]);
        let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
        let tail = Self::plain(a_chunks.remainder(), b_chunks.remainder());
        for (a, b) in a_chunks.zip(b_chunks) {
            for (((sum, square), x), y) in sums.iter_mut().zip(&mut squares).zip(a).zip(b) {
                let product = x * y;
                *sum += product;
                *square += product * product;
            }
        }
        Self {
            sum: sums.iter().sum::<f64>() + tail.sum,
            squares: squares.iter().sum::<f64>() + tail.squares,
            cut_off: match accumulation {
                Accumulation::Aligned { bits, step, promoted } => cut_off((a, b), bits, step, promoted),
                _ => 0.0,
            },
            count: a.len(),
        }
    }

    fn plain(a: &[f64], b: &[f64]) -> Self {
        a.iter().zip(b).fold(Self::default(), |so_far, (x, y)| Self {
            sum: so_far.sum + x * y,
            squares: so_far.squares + (x * y).powi(2),
            cut_off: 0.0,
            count: so_far.count + 1,
        })
    }

    /// How far a sum of the products may be off, in whatever order and in however many parts it is taken:
    /// `λ · u · √((K + 3) · (s² + Σ(xw)²))` with `λ` = 3 in f32, and what tensor cores cut off besides; see the
    /// [module](super).
    pub(crate) fn error(&self) -> f64 {
        let roundings = (self.count + PER_PRODUCT) as f64;
        let spread = self.sum * self.sum + self.squares;
        DEVIATIONS * U * (roundings * spread).sqrt() + 2.0 * self.count as f64 * FLUSHED + self.cut_off
    }

    /// `factor · sum + bias` as an f32 backend computes it.
    pub(crate) fn affine(&self, factor: f64, bias: f64) -> Bounded {
        let scaled = factor * self.sum;
        let mut error = factor.abs() * self.error();
        if factor != 1.0 {
            error += U * scaled.abs();
        }
        if bias != 0.0 {
            error += U * (scaled + bias).abs() + 2.0 * U * error;
        }
        Bounded { value: scaled + bias, error }
    }
}

/// How far off sums of the products of `a` and `b` are when `step` of them and the sum so far are aligned to the largest and cut to `bits`
/// bits behind its first one: every addend loses up to a unit, towards zero; see the [module](super).
fn cut_off((a, b): (&[f64], &[f64]), bits: u32, step: usize, promoted: usize) -> f64 {
    let sign = |x: f64| f64::from(i8::from(x > 0.0) - i8::from(x < 0.0));
    let (mut variance, mut drift) = (0.0, 0.0);
    for (a, b) in a.chunks(promoted).zip(b.chunks(promoted)) {
        let mut so_far = 0f64;
        for (a, b) in a.chunks(step).zip(b.chunks(step)) {
            let (mut largest, mut sum, mut excess) = (so_far.abs(), so_far, sign(so_far));
            for (x, y) in a.iter().zip(b) {
                let product = x * y;
                largest = if product.abs() > largest { product.abs() } else { largest };
                sum += product;
                excess += sign(product);
            }
            let unit = largest / f64::from(bits).exp2();
            variance += (a.len() + 1) as f64 / 3.0 * unit * unit;
            drift += excess * unit / 2.0;
            so_far = sum;
        }
    }
    DEVIATIONS * f64::sqrt(variance) + drift.abs()
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;
    use crate::seed::{Seed, normal};

    /// Sums in order, backwards, in sixteen lanes and by halves, of factors that are exact in bf16.
    #[test]
    fn sums_in_any_order_are_within_the_error() {
        let seed = Seed::fresh();
        println!("seed {seed}");
        let mut rng = seed.rng();
        let mut worst = 0f64;
        for _ in 0..400 {
            let count = rng.random_range(1..3000);
            let outlier = rng.random_range(1..100);
            let mut factor = |i: usize| {
                let large = if i % 97 == outlier { 30.0 } else { 1.0 };
                half::bf16::from_f32(large * normal(&mut rng)).to_f32()
            };
            let a: Vec<f32> = (0..count).map(&mut factor).collect();
            let b: Vec<f32> = (0..count).map(&mut factor).collect();
            let wide = |xs: &[f32]| xs.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let products = Products::of(&wide(&a), &wide(&b), Accumulation::F32);
            let terms: Vec<f32> = a.iter().zip(&b).map(|(x, y)| x * y).collect();
            let forward: f32 = terms.iter().sum();
            let backward: f32 = terms.iter().rev().sum();
            let mut lanes = [0f32; 16];
            terms.iter().enumerate().for_each(|(i, x)| lanes[i % 16] += x);
            for sum in [forward, backward, lanes.iter().sum(), halves(&terms)] {
                worst = worst.max((f64::from(sum) - products.sum).abs() / products.error());
            }
        }
        println!("largest part of the error that is used: {worst:.3}");
        assert!(worst < 0.6, "{worst}");
        // A sum in bf16 is far outside.
        let terms: Vec<f64> = (0..512).map(|i| f64::from(i % 7) - 2.9).collect();
        let products = Products::of(&terms, &vec![1.0; 512], Accumulation::F32);
        let narrow = terms.iter().fold(half::bf16::ZERO, |s, &x| half::bf16::from_f64(s.to_f64() + x));
        assert!((narrow.to_f64() - products.sum).abs() > products.error());
    }

    /// One step of tensor cores: addends cut to a multiple of the unit of the largest.
    fn aligned(sum: f64, products: &[f64], bits: i32) -> f64 {
        let addends = || products.iter().copied().chain([sum]);
        let largest = addends().fold(0f64, |most, x| most.max(x.abs()));
        if largest == 0.0 {
            return 0.0;
        }
        let unit = (largest.log2().floor() - f64::from(bits)).exp2();
        addends().map(|x| (x / unit).trunc() * unit).sum()
    }

    /// Sums of E4M3-like factors with outliers, by steps that are cut off.
    #[test]
    fn what_tensor_cores_cut_off_is_within_the_error() {
        let seed = Seed::fresh();
        println!("seed {seed}");
        let mut rng = seed.rng();
        let (step, promoted) = (32, 128);
        let model = Accumulation::Aligned { bits: 13, step, promoted };
        let (mut worst, mut too_few_bits) = (0f64, 0);
        for round in 0..2000 {
            let count = rng.random_range(1..20) * 128;
            let drift = f64::from(round % 3);
            let mut factor = |i: usize| {
                let large = if i % 97 == 5 { 30.0 } else { 1.0 };
                (large * (f64::from(normal(&mut rng)) + drift) * 8.0).round() / 8.0
            };
            let a: Vec<f64> = (0..count).map(&mut factor).collect();
            let b: Vec<f64> = (0..count).map(&mut factor).collect();
            let products = Products::of(&a, &b, model);
            let terms: Vec<f64> = a.iter().zip(&b).map(|(x, y)| x * y).collect();
            let sum = |bits| -> f64 {
                let part = |terms: &[f64]| terms.chunks(step).fold(0.0, |sum, step| aligned(sum, step, bits));
                terms.chunks(promoted).map(part).sum()
            };
            worst = worst.max((sum(13) - products.sum).abs() / products.error());
            too_few_bits += usize::from((sum(7) - products.sum).abs() > products.error());
        }
        println!(
            "largest part of the error that is used: {worst:.3}, {too_few_bits} of 2000 with 7 bits are outside"
        );
        assert!(worst < 1.0, "{worst}");
        assert!(too_few_bits > 1000, "{too_few_bits}");
    }

    fn halves(terms: &[f32]) -> f32 {
        match terms {
            [] => 0.0,
            [x] => *x,
            _ => {
                let (low, high) = terms.split_at(terms.len() / 2);
                halves(low) + halves(high)
            }
        }
    }

    #[test]
    fn sums_are_those_of_the_products() {
        let a: Vec<f64> = (0..19).map(f64::from).collect();
        let products = Products::of(&a, &[2.0; 19], Accumulation::F32);
        assert_eq!((products.sum, products.squares, products.count), (342.0, 8436.0, 19));
        assert_eq!(products.affine(-0.5, 1.0).value, -170.0);
    }
}
