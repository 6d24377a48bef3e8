//! Partial sums of this rank's own rows, and their sum.

use half::bf16;
use quant::{Isa, SumElement, Term, sum_rows};
use smallvec::SmallVec;

/// `[ranks, max_tokens, hidden]`: what the experts of each rank contribute to this rank's tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Partials<'a> {
    /// The partial sums.
    pub(crate) elements: &'a [bf16],
    /// Rows per rank, valid or not.
    pub(crate) max_tokens: usize,
    /// Elements per row.
    pub(crate) hidden: usize,
}

impl<'a> Partials<'a> {
    /// Sums row `row` over the ranks, in rank order in f32, and writes each element rounded once to `out`.
    pub(crate) fn sum_row<T: SumElement>(&self, row: usize, out: &mut [T]) {
        let of_rank = |slots: &'a [bf16]| Term::of(&slots[row * self.hidden..][..self.hidden]);
        let ranks = self.elements.chunks_exact(self.max_tokens * self.hidden);
        // More ranks than these are rare, and cost an allocation.
        let terms: SmallVec<[Term<'_>; 16]> = ranks.map(of_rank).collect();
        sum_rows(Isa::detect(), &terms, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_the_ranks_and_the_rounding_is_one() {
        // 2^24 + 1 + 1 in f32 is 2^24 from the left, and 2^24 + 2 from the right.
        let (max_tokens, hidden) = (2, 131);
        let of_rank = |x: f32| vec![bf16::from_f32(x); max_tokens * hidden];
        let elements = [of_rank(16_777_216.0), of_rank(1.0), of_rank(1.0)].concat();
        let partials = Partials { elements: &elements, max_tokens, hidden };
        let mut out = vec![f32::NAN; hidden];
        partials.sum_row(1, &mut out);
        assert_eq!(out, vec![16_777_216.0; hidden]);

        let elements = [of_rank(1.0), of_rank(1.0), of_rank(16_777_216.0)].concat();
        Partials { elements: &elements, max_tokens, hidden }.sum_row(0, &mut out);
        assert_eq!(out, vec![16_777_218.0; hidden]);
    }

    #[test]
    fn one_rank_is_copied_bit_for_bit() {
        let elements: Vec<bf16> = (0..300u16).map(|i| bf16::from_bits((i * 211) & 0xbfff)).collect();
        let mut out = vec![bf16::NAN; 150];
        Partials { elements: &elements, max_tokens: 2, hidden: 150 }.sum_row(1, &mut out);
        let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&out), bits(&elements[150..]));
    }
}
