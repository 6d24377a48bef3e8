//! What joins a gate and an up value, element by element, without branches so that rows are joined in vectors.

/// What joins a gate and an up value. Computed in f32, with the same bits on every instruction set. NaN stays NaN.
///
/// `σ` is the logistic function, `Φ` the distribution function of the normal distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `gate · σ(gate) · up`.
    Silu,
    /// `gate · Φ(gate) · up`.
    Gelu,
    /// `gate · ½ · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) · up`.
    GeluTanh,
    /// `g · σ(alpha · g) · (u + 1)` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)` (gpt-oss).
    SwigluOai {
        /// Factor inside the logistic function.
        alpha: f32,
        /// Where gate is cut above and up on both sides.
        limit: f32,
    },
    /// `g · σ(g) · u` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)`.
    SiluClamped {
        /// Where gate is cut above and up on both sides.
        limit: f32,
    },
}

#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x · Φ(x)`.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    let tail = normal_tail(x.abs());
    x * if x > 0.0 { 1.0 - tail } else { tail }
}

/// `x · ½ · (1 + tanh(u))` is `x · σ(2u)`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    /// `2 · √(2/π)`.
    const TWICE: f32 = 1.595_769;
    x / (1.0 + exp(-(TWICE * (x + 0.044_715 * (x * x * x)))))
}

#[inline(always)]
pub(crate) fn swiglu_oai(gate: f32, up: f32, [alpha, limit]: [f32; 2]) -> f32 {
    let gate = at_most(gate, limit);
    gate / (1.0 + exp(-(alpha * gate))) * (at_least(at_most(up, limit), -limit) + 1.0)
}

#[inline(always)]
pub(crate) fn silu_clamped(gate: f32, up: f32, limit: f32) -> f32 {
    silu(at_most(gate, limit)) * at_least(at_most(up, limit), -limit)
}

/// The smaller of the two; NaN if `x` is.
#[inline(always)]
fn at_most(x: f32, limit: f32) -> f32 {
    if x > limit { limit } else { x }
}

/// The larger of the two; NaN if `x` is.
#[inline(always)]
fn at_least(x: f32, limit: f32) -> f32 {
    if x < limit { limit } else { x }
}

/// `1 − Φ(x)` for `x ≥ 0`, with a relative error below 1e-6 as far as f32 has normal numbers.
///
/// It is `½ · exp(−x²/2) · t · Q(t)` with `t = 1 / (1 + 0.3 · x/√2)`, where `t · Q(t)` stands for the scaled
/// complementary error function; `Q` was interpolated at the Chebyshev nodes of `x/√2` in [0, 9.5] (relative error
/// 2.4e-8). The square is taken in two parts, since an error of x² is one of the result.
#[inline(always)]
fn normal_tail(x: f32) -> f32 {
    const Q: [f32; 9] = [
        -4.596_419_7e-5,
        -1.589_039_2e-4,
        4.886_832e-4,
        5.867_014_6e-3,
        2.630_262_2e-2,
        7.834_32e-2,
        0.174_374_12,
        0.302_249_2,
        0.412_580_03,
    ];
    /// Behind it the tail is not a normal number, and before 13.4, where the interpolation ends.
    const END: f32 = 13.2;
    let x = at_most(x, END);
    let t = 1.0 / (1.0 + (0.3 * std::f32::consts::FRAC_1_SQRT_2) * x);
    let s = (t - 0.629_870_1) * 2.701_754_4;
    let mut q = Q[0];
    for coefficient in &Q[1..] {
        q = q * s + coefficient;
    }
    // Twelve significant bits, whose square is exact.
    let high = f32::from_bits(x.to_bits() & 0xffff_f000);
    let low = (x - high) * (x + high);
    0.5 * t * q * exp(-0.5 * high * high) * exp(-0.5 * low)
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

    /// Largest relative error over [-86, 86] in steps of 1e-4, of results above `floor`.
    fn worst(got: impl Fn(f32) -> f32, want: impl Fn(f64) -> f64, floor: f64) -> f64 {
        let mut worst = 0.0f64;
        for i in -860_000..=860_000 {
            let x = i as f32 * 1e-4;
            let want = want(f64::from(x));
            worst = worst.max((f64::from(got(x)) - want).abs() / want.abs().max(floor));
        }
        worst
    }

    #[test]
    fn silu_is_accurate_over_the_whole_range() {
        let error = worst(silu, |x| x / (1.0 + (-x).exp()), 1e-30);
        assert!(error < 4e-7, "relative error {error}");
    }

    #[test]
    fn silu_of_extreme_values() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(f32::MAX), f32::MAX);
        assert!(silu(-1e4).abs() < 1e-30 && silu(f32::MIN).is_finite());
        assert!(silu(f32::NAN).is_nan());
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
    }

    /// `1 − Φ(x)` by the alternating series around 0 and the continued fraction of Laplace far from it.
    fn tail(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x > 3.0 {
            let fraction = (1..200).rev().fold(x, |rest, k| x + f64::from(k) / rest);
            return density / fraction;
        }
        let (mut term, mut sum) = (x, 0.0);
        for k in 0..200 {
            sum += term;
            term *= x * x / f64::from(2 * k + 3);
        }
        0.5 - density * sum
    }

    #[test]
    fn gelu_is_accurate_over_the_whole_range() {
        // Known values of the normal distribution.
        assert!((tail(1.0) - 0.158_655_253_931_457_05).abs() < 1e-15);
        assert!((tail(5.0) / 2.866_515_718_791_939e-7 - 1.0).abs() < 1e-12);
        let error = worst(gelu, |x| x * if x > 0.0 { 1.0 - tail(x) } else { tail(-x) }, 1e-30);
        assert!(error < 1e-6, "relative error {error}");
    }

    #[test]
    fn gelu_tanh_is_accurate() {
        let want = |x: f64| {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            x / (1.0 + (-2.0 * u).exp())
        };
        // In the tail the rounding of the exponential's argument is that of the result.
        let error = worst(gelu_tanh, want, 1e-3);
        assert!(error < 2e-6, "relative error {error}");
        let error = worst(gelu_tanh, want, 1e-30);
        assert!(error < 3e-5, "relative error of the tail {error}");
    }

    #[test]
    fn extreme_values_of_gelu() {
        for f in [gelu, gelu_tanh] {
            assert_eq!((f(0.0), f(f32::MAX), f(f32::INFINITY)), (0.0, f32::MAX, f32::INFINITY));
            assert!(f(-1e4).abs() < 1e-30 && f(f32::MIN).is_finite());
            assert!(f(f32::NAN).is_nan());
        }
    }

    #[test]
    fn clamped_activations_stop_at_the_limit() {
        let oai = |gate, up| swiglu_oai(gate, up, [1.702, 7.0]);
        let want = |g: f64, u: f64| g / (1.0 + (-1.702 * g).exp()) * (u + 1.0);
        for (gate, up) in [(0.3f32, 0.2f32), (-2.0, -6.5), (7.0, 7.0)] {
            let want = want(f64::from(gate), f64::from(up));
            assert!((f64::from(oai(gate, up)) - want).abs() < 1e-6 * want.abs(), "{gate} {up}");
            let want = f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(up);
            assert!((f64::from(silu_clamped(gate, up, 7.0)) - want).abs() < 1e-6 * want.abs(), "{gate} {up}");
        }
        // Gate is cut above only, up on both sides.
        assert_eq!(oai(100.0, 50.0), oai(7.0, 7.0));
        assert_eq!(oai(1.0, -50.0), oai(1.0, -7.0));
        assert!(oai(-9.0, 1.0) != oai(-7.0, 1.0));
        assert_eq!(silu_clamped(f32::INFINITY, f32::MIN, 2.0), silu_clamped(2.0, -2.0, 2.0));
        for f in [oai, |gate, up| silu_clamped(gate, up, 7.0)] {
            assert!(f(f32::NAN, 1.0).is_nan() && f(1.0, f32::NAN).is_nan());
        }
    }
}
