//! What stands for the experts: values that show who contributed what, and whose sums are exact.

use fused_moe_core::{CombineWire, ExpertPlacement, PartialSums, Rank};
use half::bf16;

use crate::bound::{Bounded, U, travelled};
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

/// What a combine does to rows on their way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Returning {
    pub(super) partial_sums: PartialSums,
    pub(super) combine_wire: CombineWire,
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
        (values, returning): (Values, Returning),
        hidden: usize,
    ) -> Self {
        let zeros = vec![0.0; rows.len() * hidden];
        let mut expected = Self { sums: zeros.clone(), magnitudes: zeros.clone(), bounds: zeros };
        let exactly = |x: &bf16| Bounded { value: x.to_f64(), error: 0.0 };
        let mut output = vec![bf16::ZERO; hidden];
        if weighted {
            let top_k = input.ids.len() / rows.len().max(1);
            for (slot, &id) in input.ids.iter().enumerate() {
                let Some(owner) = placement.rank_of_slot(id) else { continue };
                batched(&rows[slot / top_k], (id as u32, owner), values, &mut output);
                let weight = f64::from(input.weights[slot]);
                let terms = output.iter().map(|x| Bounded { value: weight * x.to_f64(), error: 0.0 });
                expected.add(slot / top_k * hidden, terms);
            }
            return expected;
        }
        let Returning { partial_sums, combine_wire } = returning;
        // Exact values are exact in f32, in whatever order they are added, if nothing was quantised.
        let exact = values == Values::Exact && combine_wire == CombineWire::InDtype;
        let mut of_node = vec![Bounded::default(); rows.len() * hidden];
        for rank in (0..placement.ep_size() as u32).map(Rank) {
            let mut outputs = Vec::with_capacity(rows.len() * hidden);
            for row in rows {
                partial(row, (placement, rank), values, &mut output);
                outputs.extend(output.iter().map(exactly));
            }
            let outputs = travelled(combine_wire, &outputs, hidden);
            let PartialSums::OfNodes { ranks_per_node } = partial_sums else {
                expected.add(0, outputs.into_iter());
                continue;
            };
            for (sum, Bounded { value, error }) in of_node.iter_mut().zip(outputs) {
                sum.value += value;
                sum.error += error + if exact { 0.0 } else { ranks_per_node as f64 * U * value.abs() };
            }
            if (rank.index() + 1).is_multiple_of(ranks_per_node) {
                expected.add(0, travelled(combine_wire, &of_node, hidden).into_iter());
                of_node.fill(Bounded::default());
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
