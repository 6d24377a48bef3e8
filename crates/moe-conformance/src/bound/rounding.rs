//! Rounding to bf16 of values that are known up to an error.

use half::bf16;

use super::sums::Bounded;

/// `value` rounded to bf16, and how far from that a backend may be that rounds something within the error: nothing,
/// unless a boundary between two bf16 lies within.
pub(crate) fn to_bf16(exact: Bounded) -> Bounded {
    let (low, near, high) = neighbours(exact);
    let value = near.to_f64();
    Bounded { value, error: (value - low.to_f64()).max(high.to_f64() - value) }
}

/// The least, the nearest and the largest bf16 that a value within the error may be rounded to.
pub(crate) fn neighbours(exact: Bounded) -> (bf16, bf16, bf16) {
    let Bounded { value, error } = exact;
    (nearest(value - error), nearest(value), nearest(value + error))
}

/// The bf16 nearest to `value`, ties to even. `bf16::from_f64` drops the low half of the mantissa before it looks for
/// ties, so what is a little more than half way goes down with it.
pub(crate) fn nearest(value: f64) -> bf16 {
    let single = value as f32;
    let back = f64::from(single);
    // Rounded to odd: a bit that is lost leaves a trace in the last place, which is no tie of bf16.
    let towards_zero = if back.abs() > value.abs() { single.to_bits() - 1 } else { single.to_bits() };
    let sticky = if back == value || value.is_nan() { towards_zero } else { towards_zero | 1 };
    bf16::from_f32(f32::from_bits(sticky))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_just_above_a_tie_goes_up() {
        let half_way = 1.0 + 2f64.powi(-8);
        assert_eq!(nearest(half_way).to_f64(), 1.0);
        for bit in 20..=52 {
            let above = half_way + 2f64.powi(-bit);
            assert_eq!(nearest(above).to_f64(), 1.0 + 2f64.powi(-7), "2^-{bit}");
            assert_eq!(nearest(-above).to_f64(), -1.0 - 2f64.powi(-7), "2^-{bit}");
        }
        for value in [0.0, -0.0, 3.5, 1e-42, f64::MAX, -1e39, f64::INFINITY] {
            assert_eq!(nearest(value), bf16::from_f32(value as f32), "{value}");
        }
        assert!(nearest(f64::NAN).is_nan());
    }

    #[test]
    fn only_a_boundary_leaves_a_choice() {
        let ulp = 2f64.powi(-7);
        let rounded = |value, error| to_bf16(Bounded { value, error });
        assert_eq!(rounded(1.0 + 0.3 * ulp, 0.1 * ulp), Bounded { value: 1.0, error: 0.0 });
        assert_eq!(rounded(1.0 + 0.45 * ulp, 0.1 * ulp), Bounded { value: 1.0, error: ulp });
        assert_eq!(rounded(1.0 + 0.55 * ulp, 0.1 * ulp), Bounded { value: 1.0 + ulp, error: ulp });
        // Below a power of two the step is half as large; an error of several steps counts them all.
        assert_eq!(rounded(1.0, 0.3 * ulp), Bounded { value: 1.0, error: ulp / 2.0 });
        assert_eq!(rounded(-1.25, 2.0 * ulp), Bounded { value: -1.25, error: 2.0 * ulp });
        assert_eq!(rounded(0.0, 0.0), Bounded::default());
    }
}
