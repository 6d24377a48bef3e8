//! What stands for the experts: values that show who contributed what, and whose sums are exact.

use fused_moe_core::{ExpertPlacement, PartialSums, Rank};
use half::bf16;

use crate::bound::{Bounded, U, to_bf16};
use crate::case::RankInput;
use crate::wire::WireRow;

/// Which values the rows of a round get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Values {
    /// Integers times a power of two that depends on the rank: sums are exact in f32 and not in bf16.
    Exact,
    /// Thirds, rounded to bf16: sums depend on their order, which must be the same every time.
    Rounded,
}

impl Values {
    fn finish(self, sum: f32) -> bf16 {
        match self {
            Values::Exact => bf16::from_f32(sum),
            Values::Rounded => bf16::from_f32(sum / 3.0),
        }
    }
}

/// Element `column` of what `expert` on `owner` makes of the row with `key`.
fn element(key: u64, expert: u32, owner: Rank, column: usize) -> f32 {
    let mut hash = key ^ (u64::from(expert) << 32 | column as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let integer = ((hash >> 40) % 31) as f32 - 15.0;
    integer * [1.0, 16.0, 256.0][owner.index() % 3]
}

/// Adds what the experts of `rank` contribute to a row, `weight` of it for each.
pub(super) fn partial(
    row: &WireRow,
    (placement, rank): (&ExpertPlacement, Rank),
    values: Values,
    out: &mut [bf16],
) {
    let key = row.key();
    let local = row.ids.iter().filter(|&&id| placement.rank_of_slot(id) == Some(rank));
    let local: Vec<u32> = match row.logits.is_empty() {
        true => local.map(|&id| id as u32).collect(),
        // Without ids every rank contributes, in its own name.
        false => vec![rank.0],
    };
    for (column, out) in out.iter_mut().enumerate() {
        let sum: f32 = local.iter().map(|&expert| element(key, expert, rank, column)).sum();
        *out = values.finish(sum);
    }
}

/// What one expert makes of a row of the batched format.
pub(super) fn batched(row: &WireRow, (expert, owner): (u32, Rank), values: Values, out: &mut [bf16]) {
    let key = row.key();
    for (column, out) in out.iter_mut().enumerate() {
        *out = values.finish(element(key, expert, owner, column));
    }
}

/// What combine must give for the tokens of one rank: the sum, the sum of magnitudes, and how far off a right backend
/// may be because it rounds on the way, `[tokens, hidden]`.
pub(super) struct Expected {
    pub(super) sums: Vec<f64>,
    pub(super) magnitudes: Vec<f64>,
    pub(super) bounds: Vec<f64>,
}

impl Expected {
    /// For `rows` as a source sent them. `weighted` if combine applies the weights of `input`.
    pub(super) fn new(
        rows: &[WireRow],
        (placement, input, weighted): (&ExpertPlacement, &RankInput, bool),
        (values, partial_sums): (Values, PartialSums),
        hidden: usize,
    ) -> Self {
        let zeros = vec![0.0; rows.len() * hidden];
        let mut expected = Self { sums: zeros.clone(), magnitudes: zeros.clone(), bounds: zeros };
        let exactly = |value| Bounded { value, error: 0.0 };
        let mut node = vec![Bounded::default(); hidden];
        let mut partial_row = vec![bf16::ZERO; hidden];
        let top_k = input.ids.len() / rows.len().max(1);
        for (token, row) in rows.iter().enumerate() {
            let at = token * hidden;
            if weighted {
                for slot in token * top_k..(token + 1) * top_k {
                    let Some(owner) = placement.rank_of_slot(input.ids[slot]) else { continue };
                    batched(row, (input.ids[slot] as u32, owner), values, &mut partial_row);
                    let weight = f64::from(input.weights[slot]);
                    expected.add(at, partial_row.iter().map(|x| exactly(weight * x.to_f64())));
                }
                continue;
            }
            for rank in (0..placement.ep_size() as u32).map(Rank) {
                partial(row, (placement, rank), values, &mut partial_row);
                let PartialSums::OfNodes { ranks_per_node } = partial_sums else {
                    expected.add(at, partial_row.iter().map(|x| exactly(x.to_f64())));
                    continue;
                };
                for (sum, x) in node.iter_mut().zip(&partial_row) {
                    sum.value += x.to_f64();
                    // Exact values are exact in f32, in whatever order they are added.
                    if values == Values::Rounded {
                        sum.error += ranks_per_node as f64 * U * x.to_f64().abs();
                    }
                }
                if (rank.index() + 1).is_multiple_of(ranks_per_node) {
                    expected.add(at, node.iter_mut().map(|sum| to_bf16(std::mem::take(sum))));
                }
            }
        }
        expected
    }

    /// Adds a term to each of the elements from `at` on.
    fn add(&mut self, at: usize, terms: impl Iterator<Item = Bounded>) {
        for (at, Bounded { value, error }) in (at..).zip(terms) {
            self.sums[at] += value;
            self.magnitudes[at] += value.abs();
            self.bounds[at] += error;
        }
    }
}
