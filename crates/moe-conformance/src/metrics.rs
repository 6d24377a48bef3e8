//! How far an output is from the oracle, and how far it may be.

use fused_moe_core::QuantScheme;

/// `‖got − want‖ / ‖want‖`; 0 if both are zero, infinite if only `want` is or anything is NaN.
pub fn relative_l2(got: &[f32], want: &[f64]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &want) in got.iter().zip(want) {
        error += (f64::from(got) - want).powi(2);
        norm += want * want;
    }
    if got.len() != want.len() || error.is_nan() {
        f64::INFINITY
    } else if error == 0.0 {
        0.0
    } else {
        (error / norm).sqrt()
    }
}

/// `1 − 2·Σxy / Σ(x² + y²)`: the metric of DeepGEMM and of AITER's own tests, which fail above 0.01.
pub fn calc_diff(got: &[f32], want: &[f64]) -> f64 {
    let (mut product, mut squares) = (0.0, 0.0);
    for (&got, &want) in got.iter().zip(want) {
        product += f64::from(got) * want;
        squares += f64::from(got).powi(2) + want * want;
    }
    if got.len() != want.len() || product.is_nan() {
        f64::INFINITY
    } else if squares == 0.0 {
        0.0
    } else {
        1.0 - 2.0 * product / squares
    }
}

/// Largest [`relative_l2`] of a conforming layer against the oracle.
///
/// Both quantise at the same points, so what is left is: the rounding of every rank's partial row to bf16
/// (2⁻⁹ at most, 1.1e-3 in the mean square), the rounding of the activation to bf16 from an f32 instead of an
/// f64 sum, and f32 accumulation (≤ 2⁻²⁴·√K). Without FP8 these sum to about 2e-3. With FP8, an activation that
/// falls on the other side of a rounding boundary moves by one code, up to 1/8 of its value, and one that is the
/// largest of its group moves the group's scale; that is rare but not smoothed out in small batches.
pub fn tolerance(quant: QuantScheme) -> f64 {
    if quantises(quant) { 1.5e-2 } else { 1e-2 }
}

/// Whether activations are quantised, so that one can be off by a code.
fn quantises(quant: QuantScheme) -> bool {
    quant.fp8().is_some() || quant == QuantScheme::Nvfp4
}

/// How much further than the whole a single row may be off: code flips average out over a batch, not over a row.
const ROW_FACTOR: f64 = 10.0;

/// An output that is too far from the oracle's.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "relative L2 error {error:.3e} (calc_diff {calc_diff:.3e}) exceeds {allowed:.1e}; worst is row {row} with {row_error:.3e}, \
     which begins {got:?}, wanted {want:?}"
)]
pub struct TooFar {
    /// Relative L2 error of the whole.
    pub error: f64,
    /// [`calc_diff`] of the whole.
    pub calc_diff: f64,
    /// The error that is allowed for the whole.
    pub allowed: f64,
    /// The worst row.
    pub row: usize,
    /// Relative L2 error of that row.
    pub row_error: f64,
    /// Its first elements.
    pub got: Vec<f32>,
    /// What they should be.
    pub want: Vec<f64>,
}

/// Fewest rows of a batch of which one may be left out of the whole.
const ROWS_FOR_A_FLIP: usize = 8;

/// Compares `[rows, hidden]` of a layer of `quant` with the oracle's: the whole within [`tolerance`], every row within
/// ten times as much.
///
/// The rows of a layer differ much in size, so that one of them can make up most of the whole. If the largest
/// activation of just that row lies on a rounding boundary of bf16, an f32 and an f64 sum give it different scales
/// and with them other codes, and the whole is as far off as the row. Under FP8, and only there, the whole of a batch
/// of eight rows or more is therefore also good without the row that is furthest off.
///
/// # Errors
/// [`TooFar`], with the worst row.
pub fn compare(got: &[f32], want: &[f64], hidden: usize, quant: QuantScheme) -> Result<f64, Box<TooFar>> {
    let allowed = tolerance(quant);
    let error = relative_l2(got, want);
    let rows = got.chunks(hidden.max(1)).zip(want.chunks(hidden.max(1)));
    let energy: f64 = want.iter().map(|x| x * x).sum();
    // A row that cancels to almost nothing is measured against a thousandth of the usual row.
    let floor = 1e-3 * (energy / (want.len().max(1) as f64)).sqrt() * (hidden as f64).sqrt();
    let measured = rows.enumerate().map(|(row, (got, want))| {
        let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
        let relative = relative_l2(got, want);
        let scaled = if norm < floor && relative.is_finite() { relative * norm / floor } else { relative };
        (row, scaled)
    });
    let worst = measured.max_by(|a, b| a.1.total_cmp(&b.1));
    let (row, row_error) = worst.unwrap_or((0, 0.0));
    let flips = quantises(quant);
    let whole_fits = error <= allowed || (flips && without_furthest_row(got, want, hidden) <= allowed);
    if whole_fits && row_error <= ROW_FACTOR * allowed {
        return Ok(error);
    }
    let (first, last) = (row * hidden, (row * hidden + 4).min(got.len()));
    Err(Box::new(TooFar {
        error,
        calc_diff: calc_diff(got, want),
        allowed,
        row,
        row_error,
        got: got.get(first..last).unwrap_or_default().to_vec(),
        want: want.get(first..last).unwrap_or_default().to_vec(),
    }))
}

/// [`relative_l2`] without the row that adds most to it; infinite for a batch of few rows.
fn without_furthest_row(got: &[f32], want: &[f64], hidden: usize) -> f64 {
    if got.len() != want.len() || got.len() < ROWS_FOR_A_FLIP * hidden.max(1) {
        return f64::INFINITY;
    }
    let rows = got.chunks(hidden).zip(want.chunks(hidden));
    let squares = rows.map(|(got, want)| {
        let error: f64 = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum();
        (error, want.iter().map(|w| w * w).sum::<f64>())
    });
    let (mut error, mut norm, mut furthest) = (0.0, 0.0, (0.0, 0.0));
    for (row_error, row_norm) in squares {
        (error, norm) = (error + row_error, norm + row_norm);
        if row_error > furthest.0 {
            furthest = (row_error, row_norm);
        }
    }
    let left = ((error - furthest.0).max(0.0) / (norm - furthest.1)).sqrt();
    if left.is_nan() { f64::INFINITY } else { left }
}

#[cfg(test)]
mod tests {
    use fused_moe_core::Fp8Format;

    use super::*;

    const FP8: QuantScheme = QuantScheme::Fp8Block(Fp8Format::E4M3Fn);

    #[test]
    fn zero_nan_and_missing_rows_are_far() {
        let want = vec![1.0; 64];
        assert_eq!(relative_l2(&[1.0; 64], &want), 0.0);
        assert_eq!(relative_l2(&[0.0; 64], &want), 1.0);
        assert_eq!(relative_l2(&[f32::NAN; 64], &want), f64::INFINITY);
        assert_eq!(relative_l2(&[1.0; 32], &want), f64::INFINITY);
        let mut one_row_missing = [1.0; 64];
        one_row_missing[8..16].fill(0.0);
        let far = compare(&one_row_missing, &want, 8, FP8).expect_err("a row is missing");
        assert_eq!((far.row, far.row_error), (1, 1.0));
    }

    #[test]
    fn one_row_of_many_may_be_off_by_a_code() {
        // Row 3 makes up nearly all of the batch and is off by 3 %; two such rows are too many.
        let mut want = vec![1.0; 16 * 8];
        want[24..32].fill(100.0);
        let mut got: Vec<f32> = want.iter().map(|&x| x as f32).collect();
        got[24..32].fill(103.0);
        assert!(compare(&got, &want, 8, FP8).is_ok());
        assert!(compare(&got, &want, 8, QuantScheme::Unquantized).is_err(), "no code to be off by");
        assert!(compare(&got[24..40], &want[24..40], 8, FP8).is_err(), "a batch of two rows");
        got[24..32].fill(120.0);
        assert!(compare(&got, &want, 8, FP8).is_err(), "a row that is wrong");
        got[24..32].fill(103.0);
        got[32..40].fill(1.1);
        assert!(compare(&got, &want, 8, FP8).is_err(), "two rows");
    }
}
