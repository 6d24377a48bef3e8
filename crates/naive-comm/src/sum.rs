//! Partial sums of this rank's own rows, and their sum.

use half::bf16;

/// Elements that are summed at a time: their f32 accumulators fit in registers and the first cache.
const CHUNK: usize = 128;

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

impl Partials<'_> {
    /// Sums row `row` over the ranks, in rank order in f32, and writes each element rounded once to `out`.
    pub(crate) fn sum_row<T>(&self, row: usize, out: &mut [T], round: impl Fn(f32) -> T) {
        for (index, out) in out.chunks_mut(CHUNK).enumerate() {
            let mut sums = [0f32; CHUNK];
            let sums = &mut sums[..out.len()];
            let start = row * self.hidden + index * CHUNK;
            for (rank, slots) in self.elements.chunks_exact(self.max_tokens * self.hidden).enumerate() {
                let partial = &slots[start..start + sums.len()];
                if rank == 0 {
                    // Assigned, not added to +0, so that the sum of one negative zero keeps its sign.
                    sums.iter_mut().zip(partial).for_each(|(sum, x)| *sum = x.to_f32());
                } else {
                    sums.iter_mut().zip(partial).for_each(|(sum, x)| *sum += x.to_f32());
                }
            }
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = round(*sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_the_ranks_and_the_rounding_is_one() {
        // 2^24 + 1 + 1 in f32 is 2^24 from the left, and 2^24 + 2 from the right.
        let (max_tokens, hidden) = (2, CHUNK + 3);
        let of_rank = |x: f32| vec![bf16::from_f32(x); max_tokens * hidden];
        let elements = [of_rank(16_777_216.0), of_rank(1.0), of_rank(1.0)].concat();
        let partials = Partials { elements: &elements, max_tokens, hidden };
        let mut out = vec![f32::NAN; hidden];
        partials.sum_row(1, &mut out, |x| x);
        assert_eq!(out, vec![16_777_216.0; hidden]);

        let elements = [of_rank(1.0), of_rank(1.0), of_rank(16_777_216.0)].concat();
        Partials { elements: &elements, max_tokens, hidden }.sum_row(0, &mut out, |x| x);
        assert_eq!(out, vec![16_777_218.0; hidden]);
    }

    #[test]
    fn one_rank_is_copied_bit_for_bit() {
        let elements: Vec<bf16> = (0..300u16).map(|i| bf16::from_bits((i * 211) & 0xbfff)).collect();
        let mut out = vec![bf16::NAN; 150];
        Partials { elements: &elements, max_tokens: 2, hidden: 150 }.sum_row(1, &mut out, bf16::from_f32);
        let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&out), bits(&elements[150..]));
    }
}
