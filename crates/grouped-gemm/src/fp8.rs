//! The two 8-bit float formats of expert weights and activations, and their exact widening to bf16.

use half::bf16;

/// Which of the two E4M3 encodings a code is written in. Both have one sign, four exponent and three
/// mantissa bits, so every value of either is exact in bf16, subnormals included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp8Kind {
    /// OCP E4M3 (gfx950, NVIDIA): bias 7, ±448, NaN is `0x7f` and `0xff`, no infinity.
    E4M3Fn,
    /// E4M3 FNUZ (gfx942): bias 8, ±240, NaN is `0x80` only, no negative zero, no infinity.
    E4M3Fnuz,
}

impl Fp8Kind {
    /// The value of `code`. A NaN code gives a quiet NaN.
    ///
    /// ```
    /// use grouped_gemm::Fp8Kind;
    /// assert_eq!(Fp8Kind::E4M3Fn.to_bf16(0x38).to_f32(), 1.0);
    /// assert_eq!(Fp8Kind::E4M3Fnuz.to_bf16(0x38).to_f32(), 0.5);
    /// ```
    pub fn to_bf16(self, code: u8) -> bf16 {
        bf16::from_bits(self.table()[code as usize])
    }

    /// The bf16 bits of all 256 codes.
    pub(crate) const fn table(self) -> &'static [u16; 256] {
        static FN: [u16; 256] = bf16_of_codes(7);
        static FNUZ: [u16; 256] = bf16_of_codes(8);
        match self {
            Fp8Kind::E4M3Fn => &FN,
            Fp8Kind::E4M3Fnuz => &FNUZ,
        }
    }
}

const BF16_NAN: u16 = 0x7fc0;
const BF16_BIAS: i32 = 127;

const fn bf16_of_codes(bias: i32) -> [u16; 256] {
    let mut table = [0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = bf16_of_code(code as u16, bias);
        code += 1;
    }
    table
}

const fn bf16_of_code(code: u16, bias: i32) -> u16 {
    let sign = (code & 0x80) << 8;
    let exponent = ((code >> 3) & 0xf) as i32;
    let mantissa = code & 7;
    let fnuz = bias == 8;
    if (fnuz && code == 0x80) || (!fnuz && code & 0x7f == 0x7f) {
        return sign | BF16_NAN;
    }
    if exponent > 0 {
        return sign | (((exponent - bias + BF16_BIAS) as u16) << 7) | (mantissa << 4);
    }
    if mantissa == 0 {
        return sign;
    }
    // A subnormal is mantissa * 2^(1 - bias - 3); its leading bit becomes the implicit one of bf16.
    let leading = 15 - mantissa.leading_zeros() as i32;
    let exponent = leading - bias - 2 + BF16_BIAS;
    sign | ((exponent as u16) << 7) | ((mantissa << (7 - leading)) & 0x7f)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(Fp8Kind::E4M3Fn, 7, 448.0, 2f32.powi(-9))]
    #[case(Fp8Kind::E4M3Fnuz, 8, 240.0, 2f32.powi(-10))]
    fn every_code_has_the_value_of_its_bits(
        #[case] kind: Fp8Kind,
        #[case] bias: i32,
        #[case] max: f32,
        #[case] min_subnormal: f32,
    ) {
        let mut largest = 0.0f32;
        let mut smallest = f32::MAX;
        for code in 0..=255u8 {
            let got = kind.to_bf16(code).to_f32();
            let nan = match kind {
                Fp8Kind::E4M3Fn => code & 0x7f == 0x7f,
                Fp8Kind::E4M3Fnuz => code == 0x80,
            };
            assert_eq!(got.is_nan(), nan, "{kind:?} {code:#04x}");
            if nan {
                continue;
            }
            let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
            let mantissa = f32::from(code & 7);
            let want = match i32::from(code >> 3) & 0xf {
                0 => sign * mantissa * 2f32.powi(-2 - bias),
                exponent => sign * (8.0 + mantissa) * 2f32.powi(exponent - bias - 3),
            };
            assert_eq!(got.to_bits(), want.to_bits(), "{kind:?} {code:#04x}");
            assert!(got == 0.0 || got.is_normal() && kind.to_bf16(code).is_normal(), "{kind:?} {code:#04x}");
            largest = largest.max(got);
            if got > 0.0 {
                smallest = smallest.min(got);
            }
        }
        assert_eq!((largest, smallest), (max, min_subnormal));
    }
}
