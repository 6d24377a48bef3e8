//! How far an output is from another, as one number.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_nan_and_missing_rows_are_far() {
        let want = vec![1.0; 64];
        assert_eq!(relative_l2(&[1.0; 64], &want), 0.0);
        assert_eq!(relative_l2(&[0.0; 64], &want), 1.0);
        assert_eq!(relative_l2(&[f32::NAN; 64], &want), f64::INFINITY);
        assert_eq!(relative_l2(&[1.0; 32], &want), f64::INFINITY);
        assert_eq!((calc_diff(&[1.0; 64], &want), calc_diff(&[-1.0; 64], &want)), (0.0, 2.0));
    }
}
