//! The weighted sum over the local experts of a row.

use grouped_gemm::experts::{Pitched, PitchedMut, rows_per_task};
use half::bf16;
use rayon::prelude::*;

use crate::permute::Permutation;

/// Columns that are summed at once, in registers and L1.
const COLUMNS: usize = 256;

/// `out[row] = Σ over the slots of row, in slot order, weight of slot · products[permuted row of slot]`, in f32 and
/// rounded once; zero for a row without local experts. Without `weights` they are 1. Writes as many rows as
/// were permuted.
///
/// Rows gather what is theirs, so there are no atomics, and the order of the sum is that of the slots.
pub(crate) fn finalize(
    permuted: &Permutation<'_>,
    products: Pitched<'_, f32>,
    weights: Option<Pitched<'_, f32>>,
    out: PitchedMut<'_, bf16>,
    rows: usize,
) {
    let PitchedMut { values, pitch, columns } = out;
    if rows == 0 {
        return;
    }
    let top_k = permuted.expanded_idx_to_permuted_idx.len() / rows;
    let slots = permuted.expanded_idx_to_permuted_idx.par_chunks(top_k);
    let rows = values.par_chunks_mut(pitch).zip(slots).enumerate();
    rows.with_min_len(rows_per_task(columns)).for_each(|(row, (out, slots))| {
        let weights = weights.map(|weights| weights.row(row));
        for (block, out) in out[..columns].chunks_mut(COLUMNS).enumerate() {
            let mut sums = [0.0; COLUMNS];
            let sums = &mut sums[..out.len()];
            for (slot, &permuted) in slots.iter().enumerate() {
                let Ok(permuted) = usize::try_from(permuted) else { continue };
                let weight = weights.map_or(1.0, |weights| weights[slot]);
                let product = &products.row(permuted)[block * COLUMNS..];
                for (sum, product) in sums.iter_mut().zip(product) {
                    *sum += weight * product;
                }
            }
            for (out, &sum) in out.iter_mut().zip(&*sums) {
                *out = bf16::from_f32(sum);
            }
        }
    });
}
