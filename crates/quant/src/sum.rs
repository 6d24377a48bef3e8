//! Weighted sums of bf16 rows, term by term in f32 and rounded once: what a combine computes.
//!
//! Products are rounded before they are added and the order of the terms is kept, so every instruction set gives the
//! same bits.

use half::bf16;

use crate::isa::Isa;
use crate::kernel::{Job, Lanes};

/// Vectors of the sum that are computed at a time, in registers.
const BLOCK: usize = 4;

/// How far ahead of the sum every row is fetched, in elements. Rows lie anywhere and are short, so a processor sees
/// little of a stream that it could fetch by itself.
const AHEAD: usize = 512;

/// A row and its factor.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// The elements.
    pub row: &'a [bf16],
    /// What they are multiplied by; a weight of 1 changes none.
    pub weight: f32,
}

impl<'a> Term<'a> {
    /// The row as it is.
    pub const fn of(row: &'a [bf16]) -> Self {
        Self { row, weight: 1.0 }
    }
}

/// An element type that a sum is written in.
pub trait SumElement: Sealed {}

/// What a sum does with its element type; nameless outside, which closes the set.
pub trait Sealed: Copy {
    /// Zero.
    const ZERO: Self;
    /// Rounds a sum to the type.
    fn of(sum: f32) -> Self;
    /// # Safety
    /// As the methods of [`Lanes`]; `dst` is writable for `V::LANES` elements.
    unsafe fn store<V: Lanes>(sums: V, dst: *mut Self);
}

impl SumElement for f32 {}

impl Sealed for f32 {
    const ZERO: Self = 0.0;

    fn of(sum: f32) -> Self {
        sum
    }

    #[inline(always)]
    unsafe fn store<V: Lanes>(sums: V, dst: *mut Self) {
        // SAFETY: the caller's contract is that of `store_f32`.
        unsafe { sums.store_f32(dst) }
    }
}

impl SumElement for bf16 {}

impl Sealed for bf16 {
    const ZERO: Self = bf16::ZERO;

    fn of(sum: f32) -> Self {
        bf16::from_f32(sum)
    }

    #[inline(always)]
    unsafe fn store<V: Lanes>(sums: V, dst: *mut Self) {
        // SAFETY: the caller's contract is that of `store_bf16`.
        unsafe { sums.store_bf16(dst) }
    }
}

/// Writes the sum of `terms`, added up in their order in f32, to `out`, rounded to its type (nearest, ties to even;
/// NaN stays NaN). The sum of one row is that row, of none it is zero.
///
/// # Panics
/// If a row is not as long as `out`.
pub fn sum_rows<T: SumElement>(isa: Isa, terms: &[Term<'_>], out: &mut [T]) {
    for term in terms {
        assert_eq!(term.row.len(), out.len(), "a row and the sum have the same elements");
    }
    match terms.split_first() {
        Some((&first, rest)) => isa.run(Sum { first, rest, out }),
        None => out.fill(T::ZERO),
    }
}

struct Sum<'a, 't, T> {
    first: Term<'t>,
    rest: &'a [Term<'t>],
    out: &'a mut [T],
}

impl<T: Sealed> Job for Sum<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(mut self) {
        let len = self.out.len();
        let mut at = 0;
        // SAFETY: the caller's contract covers the vector methods; the vectors lie within `len` elements.
        unsafe {
            while at + BLOCK * V::LANES <= len {
                self.block::<V, BLOCK>(at);
                at += BLOCK * V::LANES;
            }
            while at + V::LANES <= len {
                self.block::<V, 1>(at);
                at += V::LANES;
            }
        }
        for at in at..len {
            let product = |term: &Term<'_>| term.row[at].to_f32() * term.weight;
            let sum = self.rest.iter().fold(product(&self.first), |sum, term| sum + product(term));
            self.out[at] = T::of(sum);
        }
    }
}

impl<T: Sealed> Sum<'_, '_, T> {
    /// Sums `N` vectors from element `at`.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; all rows and `out` have that many elements.
    #[inline(always)]
    unsafe fn block<V: Lanes, const N: usize>(&mut self, at: usize) {
        let fetches = at + AHEAD + N * V::LANES <= self.out.len();
        // SAFETY: the caller's contract; what is fetched lies inside the row.
        let products = |term: &Term<'_>| unsafe {
            let row = term.row.as_ptr().add(at);
            if fetches {
                V::prefetch::<N>(row.add(AHEAD));
            }
            std::array::from_fn::<V, N, _>(|i| V::load_bf16(row.add(i * V::LANES)).mul(term.weight))
        };
        let mut sums = products(&self.first);
        for term in self.rest {
            let products = products(term);
            for (sum, product) in sums.iter_mut().zip(products) {
                // SAFETY: the caller's contract.
                *sum = unsafe { sum.add(product) };
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe { T::store(sum, self.out.as_mut_ptr().add(at + i * V::LANES)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    /// Bits, but one NaN for all: which one it is may depend on the order of the operands.
    fn bits(sum: impl IntoIterator<Item = f32>) -> Vec<u32> {
        sum.into_iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = rand_pcg::Pcg64::new(seed.into(), 1);
        for len in [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 100, 600, 7168, 7171] {
            // All bit patterns: subnormals, infinities and NaN among them.
            let mut any = || (0..len).map(|_| bf16::from_bits(rng.random())).collect::<Vec<_>>();
            let rows = [any(), any(), any(), any()];
            let weights = [1.0, -0.3, rng.random_range(-1.0..1.0), 1.0];
            for count in 0..=rows.len() {
                let terms: Vec<_> =
                    rows.iter().zip(weights).take(count).map(|(row, weight)| Term { row, weight }).collect();
                let product = |term: &Term<'_>, i: usize| term.row[i].to_f32() * term.weight;
                let sum = |i| terms.iter().map(|term| product(term, i)).reduce(|sum, x| sum + x);
                let want: Vec<f32> = (0..len).map(|i| sum(i).unwrap_or(0.0)).collect();
                let narrow = bits(want.iter().map(|&x| bf16::from_f32(x).to_f32()));
                for &isa in Isa::available() {
                    let (mut f32s, mut bf16s) = (vec![f32::NAN; len], vec![bf16::NAN; len]);
                    sum_rows(isa, &terms, &mut f32s);
                    sum_rows(isa, &terms, &mut bf16s);
                    assert_eq!(bits(f32s), bits(want.clone()), "{isa}, {count} rows of {len}");
                    let found = bits(bf16s.iter().map(|x| x.to_f32()));
                    assert_eq!(found, narrow, "{isa}, {count} rows of {len}");
                }
            }
        }
    }

    #[test]
    fn the_sum_of_one_row_is_that_row() {
        let row: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|x| !x.is_nan()).collect();
        for &isa in Isa::available() {
            let mut sum = vec![bf16::NAN; row.len()];
            sum_rows(isa, &[Term::of(&row)], &mut sum);
            assert!(sum.iter().zip(&row).all(|(sum, x)| sum.to_bits() == x.to_bits()), "{isa}");
        }
    }

    #[test]
    #[should_panic(expected = "the same elements")]
    fn a_row_of_another_length_is_a_broken_contract() {
        sum_rows(Isa::SCALAR, &[Term::of(&[bf16::ONE; 3])], &mut [0f32; 4]);
    }
}
