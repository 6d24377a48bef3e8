//! The reference: the definition of the formats in f64 and search instead of arithmetic. It shares no code with
//! the crate.

use fused_moe_core::Fp8Format::{self, E4M3Fn, E4M3Fnuz, E4M3FnuzMax224};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

pub const FORMATS: [Fp8Format; 3] = [E4M3Fn, E4M3Fnuz, E4M3FnuzMax224];

/// Row lengths around the width of vectors and groups.
pub const LENGTHS: [usize; 10] = [0, 1, 7, 15, 17, 127, 128, 129, 300, 1024];

/// A generator with a fresh seed, which is printed so that a failing run can be repeated.
pub fn fresh(test: &str) -> Pcg64Mcg {
    let seed = rand::random::<u64>();
    println!("{test}: seed {seed}");
    Pcg64Mcg::seed_from_u64(seed)
}

/// The magnitudes of a format, in order of their codes.
pub fn magnitudes(format: Fp8Format) -> Vec<f64> {
    let (bias, codes) = match format {
        E4M3Fn => (7, 0..0x7f),
        _ => (8, 0..0x80),
    };
    codes
        .map(|code| {
            let (exponent, mantissa) = (code / 8, f64::from(code % 8));
            if exponent == 0 {
                mantissa / 8.0 * 2f64.powi(1 - bias)
            } else {
                (1.0 + mantissa / 8.0) * 2f64.powi(exponent - bias)
            }
        })
        .collect()
}

/// The value of a code.
pub fn decode(format: Fp8Format, code: u8) -> f64 {
    if format != E4M3Fn && code == 0x80 {
        return f64::NAN;
    }
    let magnitude = magnitudes(format).get(usize::from(code & 0x7f)).copied().unwrap_or(f64::NAN);
    if code >= 0x80 { -magnitude } else { magnitude }
}

/// Finds codes by searching all values.
pub struct Encoder {
    format: Fp8Format,
    magnitudes: Vec<f64>,
}

impl Encoder {
    pub fn new(format: Fp8Format) -> Self {
        Self { format, magnitudes: magnitudes(format) }
    }

    /// The code whose value is nearest to `x`, the even one of two.
    pub fn encode(&self, x: f32) -> u8 {
        let fnuz = self.format != E4M3Fn;
        if x.is_nan() {
            return if fnuz { 0x80 } else { 0x7f };
        }
        let magnitude = f64::from(x.abs()).min(f64::from(self.format.max()));
        let distance = |code: usize| (self.magnitudes[code] - magnitude).abs();
        let mut best = 0;
        for code in 1..self.magnitudes.len() {
            if distance(code) < distance(best) || (distance(code) == distance(best) && code % 2 == 0) {
                best = code;
            }
        }
        let negative = x.is_sign_negative() && !(fnuz && best == 0);
        best as u8 | if negative { 0x80 } else { 0 }
    }
}

/// What a group is worth: its scale and its codes, by the normative formula.
pub fn quantize(format: Fp8Format, group: &[f32]) -> (f32, Vec<u8>) {
    let amax = group.iter().filter(|x| x.is_finite()).fold(0f32, |amax, x| amax.max(x.abs()));
    let scale = amax.max(1e-10) * (1.0 / format.max());
    (scale, quantize_scaled(format, group, scale))
}

/// The codes of `group / scale`.
pub fn quantize_scaled(format: Fp8Format, group: &[f32], scale: f32) -> Vec<u8> {
    let (encoder, inverse) = (Encoder::new(format), 1.0 / scale);
    group.iter().map(|x| encoder.encode(x * inverse)).collect()
}

/// What can be wrong with a row.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Normal,
    Zero,
    NegativeZero,
    Tiny,
    Subnormal,
    Huge,
    AnyBits,
    SomeNan,
    SomeInf,
    OnlyNan,
    OnlyInf,
}

pub const KINDS: [Kind; 11] = [
    Kind::Normal,
    Kind::Zero,
    Kind::NegativeZero,
    Kind::Tiny,
    Kind::Subnormal,
    Kind::Huge,
    Kind::AnyBits,
    Kind::SomeNan,
    Kind::SomeInf,
    Kind::OnlyNan,
    Kind::OnlyInf,
];

/// A row of `len` bf16 numbers.
pub fn row(rng: &mut Pcg64Mcg, kind: Kind, len: usize) -> Vec<bf16> {
    (0..len)
        .map(|_| {
            let unit = rng.random_range(-1.0f32..1.0);
            let rare = rng.random_bool(0.05);
            bf16::from_f32(match kind {
                Kind::Normal => unit * 2f32.powi(rng.random_range(-12..6)),
                Kind::Zero => 0.0,
                Kind::NegativeZero => -0.0,
                Kind::Tiny => unit * 1e-11,
                Kind::Subnormal => unit * f32::MIN_POSITIVE,
                Kind::Huge => unit * 3e38,
                Kind::AnyBits => bf16::from_bits(rng.random()).to_f32(),
                Kind::SomeNan => {
                    if rare {
                        f32::NAN.copysign(unit)
                    } else {
                        unit
                    }
                }
                Kind::SomeInf => {
                    if rare {
                        f32::INFINITY.copysign(unit)
                    } else {
                        unit
                    }
                }
                Kind::OnlyNan => f32::NAN.copysign(unit),
                Kind::OnlyInf => f32::INFINITY.copysign(unit),
            })
        })
        .collect()
}

pub fn widen(row: &[bf16]) -> Vec<f32> {
    row.iter().map(|x| x.to_f32()).collect()
}
