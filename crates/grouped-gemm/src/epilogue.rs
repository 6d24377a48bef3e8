//! From finished sums to result rows: scales, router weights, activation.

use crate::panel::PANEL;

/// What joins a gate and an up value. Computed in f32, with the same bits on every instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `gate / (1 + exp(-gate)) * up`.
    Silu,
}

/// What a call stores of its products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// The products, N columns. For plainly packed weights.
    Products,
    /// `activation(gate) * up`, N / 2 columns. For weights packed as gate/up pairs.
    GateUp(Activation),
}

impl Epilogue {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Epilogue::Products => "products",
            Epilogue::GateUp(_) => "an activation of gate and up",
        }
    }
}

/// Factors on one row of finished sums, in the order in which they are applied.
pub(crate) struct RowFactors<'a> {
    /// Weight scale of each packed column.
    pub(crate) columns: Option<&'a [f32]>,
    /// Activation scale of the row.
    pub(crate) activation: Option<f32>,
    /// Router weight of the row.
    pub(crate) router: Option<f32>,
}

impl RowFactors<'_> {
    #[inline(always)]
    pub(crate) fn apply(&self, sums: &mut [f32]) {
        if let Some(columns) = self.columns {
            for (sum, scale) in sums.iter_mut().zip(columns) {
                *sum *= scale;
            }
        }
        for factor in [self.activation, self.router].into_iter().flatten() {
            for sum in sums.iter_mut() {
                *sum *= factor;
            }
        }
    }
}

/// Replaces each panel of 32 gate and 32 up values by its 32 results, moved to the front of `sums`.
#[inline(always)]
pub(crate) fn join_gate_up(activation: Activation, sums: &mut [f32]) {
    const HALF: usize = PANEL / 2;
    for panel in 0..sums.len() / PANEL {
        let mut joined = [0.0; HALF];
        let pair = &sums[panel * PANEL..][..PANEL];
        match activation {
            Activation::Silu => {
                for (i, joined) in joined.iter_mut().enumerate() {
                    *joined = silu(pair[i]) * pair[HALF + i];
                }
            }
        }
        sums[panel * HALF..][..HALF].copy_from_slice(&joined);
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `e^x` within 2 ulp for x in [-87, 88], clamped outside; NaN stays NaN. Cody and Waite reduction by
/// ln 2 in two parts and the degree-5 polynomial of Cephes' `expf`, without branches.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it leaves the rounded value in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2[0] - n * LN2[1];
    let mut tail = POLYNOMIAL[0];
    for coefficient in &POLYNOMIAL[1..] {
        tail = tail * r + coefficient;
    }
    let mantissa = tail * r * r + r + 1.0;
    // The shift leaves only the low bits of n, which are an exponent once the bias is added.
    mantissa * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_is_accurate_over_the_whole_range() {
        let mut worst = 0.0f64;
        for i in -860_000..=860_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            worst = worst.max((f64::from(silu(x)) - want).abs() / want.abs().max(1e-30));
        }
        assert!(worst < 4e-7, "relative error {worst}");
    }

    #[test]
    fn silu_of_extreme_values() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(f32::MAX), f32::MAX);
        assert!(silu(-1e4).abs() < 1e-30 && silu(f32::MIN).is_finite());
        assert!(silu(f32::NAN).is_nan());
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
    }
}
