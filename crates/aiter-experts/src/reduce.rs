//! The sum over the local experts of a row.

use grouped_gemm::experts::{Pitched, PitchedMut, rows_per_task};
use half::bf16;
use rayon::prelude::*;

use crate::moe_sorting::SortedTokens;

/// Columns that are summed at once, in registers and L1.
const COLUMNS: usize = 256;

/// `out[row] = Σ over the slots of row, in slot order, products[entry of slot]`, in f32 and rounded once; zero for
/// a row without local experts. `products` are already weighted. Writes as many rows as were sorted.
///
/// The order of the sum is that of the slots and not of the experts, so it does not depend on how tokens were
/// sorted or in which order experts finished.
pub(crate) fn sum_slots(sorted: &SortedTokens<'_>, products: Pitched<'_, f32>, out: PitchedMut<'_, bf16>) {
    let PitchedMut { values, pitch, columns } = out;
    if sorted.num_tokens == 0 {
        return;
    }
    let top_k = sorted.positions.len() / sorted.num_tokens;
    let rows = values.par_chunks_mut(pitch).zip(sorted.positions.par_chunks(top_k));
    rows.with_min_len(rows_per_task(columns)).for_each(|(out, positions)| {
        for (block, out) in out[..columns].chunks_mut(COLUMNS).enumerate() {
            let mut sums = [0.0; COLUMNS];
            let sums = &mut sums[..out.len()];
            for entry in positions.iter().filter_map(|&position| usize::try_from(position).ok()) {
                let product = &products.row(entry)[block * COLUMNS..];
                for (sum, product) in sums.iter_mut().zip(product) {
                    *sum += product;
                }
            }
            for (out, &sum) in out.iter_mut().zip(&*sums) {
                *out = bf16::from_f32(sum);
            }
        }
    });
}
