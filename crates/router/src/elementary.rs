//! eˣ and ln(1 + x) in f32 of operations that IEEE 754 rounds in one way: every host has the same bits, and the device
//! kernel `kernels/router`, which has the same formulas, chooses the same experts.

/// 1.5 · 2²³: what is added to it is rounded to an integer, which is in the last bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// eˣ to less than one unit in the last place, subnormal results too; ∞ from where it is more than an f32, 0 from where
/// it is less than half of the least.
pub(crate) fn exp(x: f32) -> f32 {
    // The ends are ∞ and 0.
    let x = x.clamp(-104.0, 89.0);
    let shifted = x * core::f32::consts::LOG2_E + ROUND;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let whole = shifted - ROUND;
    // ln 2 in two parts, of which the first has so few bits that its product is exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    let rest = (x - whole * LN_2_HIGH) - whole * -2.121_944_4e-4;
    // Cephes' polynomial for [-ln 2 / 2, ln 2 / 2].
    let mut p = 1.987_569_2e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * rest + coefficient;
    }
    let fraction = (p * (rest * rest) + rest) + 1.0;
    // In two steps, as 2ⁿ itself need not be an f32. Only the second can round.
    let half = power >> 1;
    fraction * power_of_two(half) * power_of_two(power - half)
}

/// 2ⁿ for n in -126..=127.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// ln(1 + x) for x in 0..=1, to two units in the last place.
pub(crate) fn ln_1p(x: f32) -> f32 {
    // The series of 2 artanh(s), all of whose terms have one sign.
    let s = x / (x + 2.0);
    let square = s * s;
    let mut p = 2.0 / 13.0;
    for coefficient in [2.0 / 11.0, 2.0 / 9.0, 2.0 / 7.0, 0.4, 2.0 / 3.0] {
        p = p * square + coefficient;
    }
    (p * square) * s + 2.0 * s
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units in the last place of the f32 nearest to `want` by which `got` is off.
    fn ulps(got: f32, want: f64) -> f64 {
        let near = want as f32;
        let unit = f64::from(near.next_up()) - f64::from(near);
        (f64::from(got) - want).abs() / unit
    }

    #[test]
    fn exp_is_off_by_less_than_one_unit() {
        for bits in (0..=u32::MAX).step_by(20_011) {
            let x = f32::from_bits(bits);
            if (-103.9..=88.72).contains(&x) {
                let off = ulps(exp(x), f64::from(x).exp());
                assert!(off < 1.0, "exp({x:e}) is off by {off} units");
            }
        }
    }

    #[test]
    fn exp_has_ends() {
        assert_eq!([0.0, -0.0, f32::NEG_INFINITY, -104.0].map(exp), [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(exp(-103.9), f32::from_bits(1));
        assert_eq!([88.8, f32::INFINITY].map(exp), [f32::INFINITY; 2]);
        assert!(exp(88.722_83).is_finite());
    }

    #[test]
    fn ln_1p_is_off_by_two_units_at_most() {
        for bits in (0..=1f32.to_bits()).step_by(20_011) {
            let x = f32::from_bits(bits);
            let off = ulps(ln_1p(x), f64::from(x).ln_1p());
            assert!(off <= 2.0, "ln_1p({x:e}) is off by {off} units");
        }
    }

    /// What the device kernel has to have, too: a change of one bit may change which experts are chosen.
    #[test]
    fn the_bits_do_not_change() {
        let bits = |values: [f32; 4], f: fn(f32) -> f32| values.map(|x| f(x).to_bits());
        assert_eq!(
            bits([-0.1, -3.3, -16.939_9, -95.0], exp),
            [0x3f67_a36d, 0x3d17_12ce, 0x333c_d2b3, 0x0f64]
        );
        assert_eq!(bits([0.01, 0.3, 0.77, 1.0], ln_1p), [0x3c23_06b6, 0x3e86_549d, 0x3f12_2bb7, 0x3f31_7218]);
    }
}
