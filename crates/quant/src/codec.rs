//! E4M3 codes: OCP ("fn": bias 7, NaN 0x7F and 0xFF) and FNUZ (bias 8, NaN 0x80, no negative zero).
//!
//! Both have a sign, four bits of exponent and three of mantissa. They differ in the bias and in what the two
//! special patterns mean, so one algorithm with a few constants encodes both.

use fused_moe_core::Fp8Format;
use half::bf16;

/// Mantissa bits of f32 beyond the three of E4M3.
const DROPPED_MANTISSA_BITS: u32 = 23 - 3;
const F32_EXPONENT: u32 = 0x7f80_0000;

/// The constants of one [`Fp8Format`] for encoding.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    /// Largest magnitude, [`Fp8Format::max`].
    pub(crate) max: f32,
    /// Bits of the smallest normal magnitude as f32.
    pub(crate) min_normal: u32,
    /// What is added to the bits of a power of two to get the f32 whose unit in the last place is one step of
    /// the codes between that power and the next.
    pub(crate) step: u32,
    /// The code of NaN.
    pub(crate) nan: u32,
    /// The magnitude code that takes no sign bit: zero for FNUZ; none (a value that no code has) for OCP.
    pub(crate) signless: u32,
}

impl Encoder {
    pub(crate) const fn new(format: Fp8Format) -> Self {
        let fnuz = is_fnuz(format);
        Self {
            max: format.max(),
            min_normal: (127 - bias(fnuz) + 1) << 23,
            step: DROPPED_MANTISSA_BITS << 23,
            nan: if fnuz { 0x80 } else { 0x7f },
            signless: if fnuz { 0 } else { u32::MAX },
        }
    }

    /// The code nearest to `x`, ties to the even code.
    ///
    /// The rounding is done by an addition: below `2·2^e` the f32 sum `|x| + 2^(e+20)` has a unit in the last
    /// place of `2^(e-3)`, which is the distance of two codes there, so its low bits count the steps. Clamping
    /// the exponent from below to that of the smallest normal number makes subnormal codes come out of the
    /// same addition, because they have the step of the first binade.
    #[inline(always)]
    pub(crate) fn encode(&self, x: f32) -> u8 {
        let magnitude = x.abs();
        // Written so that NaN gives `max`; the last line replaces it.
        let clamped = if magnitude < self.max { magnitude } else { self.max };
        let exponent = (clamped.to_bits() & F32_EXPONENT).max(self.min_normal);
        let magic = exponent + self.step;
        let steps = (clamped + f32::from_bits(magic)).to_bits() - magic;
        let code = steps + ((exponent - self.min_normal) >> DROPPED_MANTISSA_BITS);
        let sign = if code == self.signless { 0 } else { (x.to_bits() >> 24) & 0x80 };
        (if x.is_nan() { self.nan } else { code | sign }) as u8
    }
}

const fn is_fnuz(format: Fp8Format) -> bool {
    !matches!(format, Fp8Format::E4M3Fn)
}

const fn bias(fnuz: bool) -> u32 {
    if fnuz { 8 } else { 7 }
}

/// The code of `x` after clamping to ±[`Fp8Format::max`], rounded to nearest, ties to even.
///
/// ±Inf saturates. Every NaN becomes the positive NaN code (0x7F for OCP, 0x80 for FNUZ). FNUZ has no negative
/// zero: what rounds to it becomes 0x00.
pub fn encode(format: Fp8Format, x: f32) -> u8 {
    Encoder::new(format).encode(x)
}

/// The value of `code`, exactly.
pub fn decode(format: Fp8Format, code: u8) -> f32 {
    decode_table(format)[usize::from(code)]
}

/// The values of all 256 codes.
pub fn decode_table(format: Fp8Format) -> &'static [f32; 256] {
    if is_fnuz(format) { &FNUZ } else { &FN }
}

/// The values of all 256 codes in bf16, which holds every one of them exactly.
pub fn decode_table_bf16(format: Fp8Format) -> &'static [bf16; 256] {
    if is_fnuz(format) { &FNUZ_BF16 } else { &FN_BF16 }
}

static FN: [f32; 256] = table(false);
static FNUZ: [f32; 256] = table(true);
static FN_BF16: [bf16; 256] = upper_halves(&table(false));
static FNUZ_BF16: [bf16; 256] = upper_halves(&table(true));

const fn table(fnuz: bool) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code as u32 >> 3) & 0xf, code as u32 & 7);
        let magnitude = if exponent == 0 {
            // The step of the subnormal codes is 2^(1 - bias - 3).
            mantissa as f32 * f32::from_bits((127 + 1 - 3 - bias(fnuz)) << 23)
        } else {
            f32::from_bits(((exponent + 127 - bias(fnuz)) << 23) | (mantissa << DROPPED_MANTISSA_BITS))
        };
        let nan = if fnuz { code == 0x80 } else { code & 0x7f == 0x7f };
        values[code] = if nan {
            f32::NAN
        } else if code >= 0x80 {
            -magnitude
        } else {
            magnitude
        };
        code += 1;
    }
    values
}

const fn upper_halves(values: &[f32; 256]) -> [bf16; 256] {
    let mut halves = [bf16::ZERO; 256];
    let mut code = 0;
    while code < 256 {
        halves[code] = bf16::from_bits((values[code].to_bits() >> 16) as u16);
        code += 1;
    }
    halves
}

#[cfg(test)]
mod tests {
    use super::*;
    use Fp8Format::*;

    /// Codes of some numbers as `ml_dtypes` casts them, FNUZ after a clamp to 240.
    #[rstest::rstest]
    #[case(1.0, 0x38, 0x40)]
    #[case(17.0, 0x58, 0x60)]
    #[case(18.0, 0x59, 0x61)]
    #[case(240.0, 0x77, 0x7f)]
    #[case(448.0, 0x7e, 0x7f)]
    #[case(-448.0, 0xfe, 0xff)]
    #[case(464.0, 0x7e, 0x7f)]
    #[case(f32::INFINITY, 0x7e, 0x7f)]
    #[case(f32::NEG_INFINITY, 0xfe, 0xff)]
    #[case(f32::NAN, 0x7f, 0x80)]
    #[case(-0.0, 0x80, 0x00)]
    #[case(-1e-30, 0x80, 0x00)]
    #[case(f32::from_bits(1), 0x00, 0x00)]
    #[case(0.001953125, 0x01, 0x02)]
    #[case(0.0009765625, 0x00, 0x01)]
    fn golden(#[case] x: f32, #[case] fn_code: u8, #[case] fnuz_code: u8) {
        assert_eq!(encode(E4M3Fn, x), fn_code, "fn code of {x}");
        assert_eq!(encode(E4M3Fnuz, x), fnuz_code, "fnuz code of {x}");
    }

    #[test]
    fn max_224_saturates_at_the_largest_converted_code() {
        assert_eq!(encode(E4M3FnuzMax224, 1e9), 0x7e);
        assert_eq!(decode(E4M3FnuzMax224, 0x7e), 224.0);
    }

    #[rstest::rstest]
    #[case(E4M3Fn)]
    #[case(E4M3Fnuz)]
    fn every_code_survives_a_round_trip(#[case] format: Fp8Format) {
        for code in 0..=255 {
            let x = decode(format, code);
            let narrow = decode_table_bf16(format)[usize::from(code)];
            if x.is_nan() {
                assert!(narrow.is_nan());
                assert!(decode(format, encode(format, x)).is_nan());
            } else {
                assert_eq!(narrow.to_f32().to_bits(), x.to_bits(), "bf16 of {code:#04x}");
                assert_eq!(encode(format, x), code, "code {code:#04x} is {x}");
            }
        }
    }
}
