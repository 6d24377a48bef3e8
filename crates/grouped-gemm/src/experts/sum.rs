//! The sum over the local experts of a row.

use half::bf16;
use rayon::prelude::*;

use super::quantize::rows_per_task;
use super::rows::{Pitched, PitchedMut};

/// Columns that are summed at once, in registers and L1.
const COLUMNS: usize = 256;

/// `out[row] = Σ over the slots of row, in slot order, weight of slot · products[entry of slot]`, in f32 and rounded
/// once, for the first `rows` rows; zero for a row without local experts. Without `weights` they are 1.
///
/// `entries` are `[rows, top_k]`, -1 for a slot that is not here. Rows gather what is theirs, so there are no atomics,
/// and the order of the sum is that of the slots and not of the experts.
pub fn sum_slots(
    (entries, rows): (&[i32], usize),
    products: Pitched<'_, f32>,
    weights: Option<Pitched<'_, f32>>,
    out: PitchedMut<'_, bf16>,
) {
    let PitchedMut { values, pitch, columns } = out;
    if rows == 0 {
        return;
    }
    let top_k = entries.len() / rows;
    let rows = values.par_chunks_mut(pitch).zip(entries.par_chunks(top_k)).enumerate();
    rows.with_min_len(rows_per_task(columns)).for_each(|(row, (out, slots))| {
        let weights = weights.map(|weights| weights.row(row));
        for (block, out) in out[..columns].chunks_mut(COLUMNS).enumerate() {
            let mut sums = [0.0; COLUMNS];
            let sums = &mut sums[..out.len()];
            for (slot, &entry) in slots.iter().enumerate() {
                let Ok(entry) = usize::try_from(entry) else { continue };
                let weight = weights.map_or(1.0, |weights| weights[slot]);
                let product = &products.row(entry)[block * COLUMNS..];
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
