//! eˣ of negative numbers and ln(1 + x) in f32 of operations that IEEE 754 rounds in one way: every host has the same bits, and the device
//! kernel `kernels/router`, which has the same formulas, chooses the same experts.

/// 1.5 · 2²³: what is added to it is rounded to an integer, which is in the last bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// From where on eˣ is 0: just above what is no longer a normal f32.
const LEAST: f32 = -87.0;

/// eˣ for x ≤ 0, to less than one unit in the last place; 0 below -87.
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x * core::f32::consts::LOG2_E + ROUND;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let whole = shifted - ROUND;
    // ln 2 in two parts, of which the first has so few bits that its product is exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    let rest = (x - whole * LN_2_HIGH) - whole * -2.121_944_4e-4;
    // The polynomial of degree 6 that is best on [-ln 2 / 2, ln 2 / 2], relative to eˣ.
    let mut p = 1.381_431_8e-3;
    for coefficient in [8.368_852e-3, 4.166_84e-2, 1.666_652e-1, 0.499_999_94] {
        p = p * rest + coefficient;
    }
    let fraction = (p * (rest * rest) + rest) + 1.0;
    let y = f32::from_bits(fraction.to_bits().wrapping_add(power << 23));
    if x < LEAST { 0.0 } else { y }
}

/// ln(1 + x) for x in 0..=1, to three units in the last place.
pub(crate) fn ln_1p(x: f32) -> f32 {
    // The series of 2 artanh(s), all of whose terms have one sign.
    let s = x * (1.0 / (x + 2.0));
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
        for bits in ((-0.0f32).to_bits()..=LEAST.to_bits()).step_by(1_009) {
            let x = f32::from_bits(bits);
            let off = ulps(exp(x), f64::from(x).exp());
            assert!(off < 1.0, "exp({x:e}) is off by {off} units");
        }
    }

    #[test]
    fn exp_has_ends() {
        assert_eq!([0.0, -0.0, f32::NEG_INFINITY, -1e30, -87.1].map(exp), [1.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(exp(LEAST).is_normal());
    }

    #[test]
    fn ln_1p_is_off_by_less_than_three_units() {
        for bits in (0..=1f32.to_bits()).step_by(20_011) {
            let x = f32::from_bits(bits);
            let off = ulps(ln_1p(x), f64::from(x).ln_1p());
            assert!(off < 3.0, "ln_1p({x:e}) is off by {off} units");
        }
    }

    /// What the device kernel has to have, too: a change of one bit may change which experts are chosen.
    #[test]
    fn the_bits_do_not_change() {
        let bits = |values: [f32; 4], f: fn(f32) -> f32| values.map(|x| f(x).to_bits());
        assert_eq!(
            bits([-0.1, -3.3, -16.939_9, -86.5], exp),
            [0x3f67_a36d, 0x3d17_12ce, 0x333c_d2b3, 0x0113_bc74]
        );
        assert_eq!(bits([0.01, 0.3, 0.77, 1.0], ln_1p), [0x3c23_06b6, 0x3e86_549d, 0x3f12_2bb7, 0x3f31_7218]);
    }
}
