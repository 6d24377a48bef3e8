//! An FP8 quantiser written from the formula alone, to judge crate `quant` as well as the backends.

use fused_moe_core::{Fp8Format, Granularity};
use half::bf16;

/// Bits of an f32 that do not choose where a search begins.
const BUCKET_BITS: u32 = 20;

/// The codes of one format as a table of magnitudes, searched for the nearest.
#[derive(Clone, Debug)]
pub struct Codec {
    max: f32,
    fnuz: bool,
    /// Value of the codes without sign, ascending.
    magnitudes: Vec<f64>,
    /// Where to begin the search, by exponent and three bits of mantissa of the f32.
    begin: Vec<usize>,
}

impl Codec {
    /// The codec of `format`.
    pub fn new(format: Fp8Format) -> Self {
        let fnuz = format != Fp8Format::E4M3Fn;
        let (bias, codes) = if fnuz { (8, 0x80) } else { (7, 0x7f) };
        let magnitude = |code: i32| {
            let (exponent, mantissa) = (code >> 3, f64::from(code & 7));
            match exponent {
                0 => mantissa * 2f64.powi(1 - bias - 3),
                _ => (8.0 + mantissa) * 2f64.powi(exponent - bias - 3),
            }
        };
        let magnitudes: Vec<f64> = (0..codes).map(magnitude).collect();
        let least = |bucket: u32| f64::from(f32::from_bits(bucket << BUCKET_BITS));
        let begin = |bucket| magnitudes.partition_point(|&m| m <= least(bucket));
        let begin = (0..f32::INFINITY.to_bits() >> BUCKET_BITS).map(begin).collect();
        Self { max: format.max(), fnuz, magnitudes, begin }
    }

    /// The value of `code`; NaN for the NaN codes.
    pub fn decode(&self, code: u8) -> f64 {
        let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
        match self.magnitudes.get(usize::from(code & 0x7f)) {
            Some(_) if self.fnuz && code == 0x80 => f64::NAN,
            Some(magnitude) => sign * magnitude,
            None => f64::NAN,
        }
    }

    /// The code nearest to `x` clamped to ±max, ties to the even code; NaN to the NaN code.
    pub fn encode(&self, x: f32) -> u8 {
        if x.is_nan() {
            return if self.fnuz { 0x80 } else { 0x7f };
        }
        let clamped = x.abs().min(self.max);
        let magnitude = f64::from(clamped);
        let mut above = self.begin[(clamped.to_bits() >> BUCKET_BITS) as usize];
        while self.magnitudes.get(above).is_some_and(|&m| m <= magnitude) {
            above += 1;
        }
        let below = above - 1;
        let code = match self.magnitudes.get(above) {
            None => below,
            Some(upper) => {
                let (down, up) = (magnitude - self.magnitudes[below], upper - magnitude);
                let even = if below.is_multiple_of(2) { below } else { above };
                if down < up {
                    below
                } else if up < down {
                    above
                } else {
                    even
                }
            }
        };
        let negative = x.is_sign_negative() && !(self.fnuz && code == 0);
        code as u8 | if negative { 0x80 } else { 0 }
    }

    /// The scale of a group whose largest magnitude is `amax`: `max(amax, 1e-10) · (1/max)` in f32.
    pub fn scale(&self, amax: f32) -> f32 {
        amax.max(1e-10) * (1.0 / self.max)
    }

    /// The code of `x` under `scale`: `x · (1/scale)` in f32, then [`Codec::encode`].
    pub fn quantize(&self, x: f32, scale: f32) -> u8 {
        self.encode(x * (1.0 / scale))
    }
}

/// Activations as they travel: codes and scales.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantizedRows {
    /// `[tokens, hidden]`.
    pub codes: Vec<u8>,
    /// `[tokens, scales_per_token]`; a per-tensor scale is repeated for every token.
    pub scales: Vec<f32>,
}

/// Quantises `rows`, `[tokens, hidden]`, all of which share a scale if `granularity` is per tensor.
pub fn quantize_rows(
    format: Fp8Format,
    granularity: Granularity,
    rows: &[bf16],
    hidden: usize,
) -> QuantizedRows {
    quantize_rows_scaled(format, granularity, (rows, hidden), None)
}

/// As [`quantize_rows`], by the static scale if there is one.
pub fn quantize_rows_scaled(
    format: Fp8Format,
    granularity: Granularity,
    (rows, hidden): (&[bf16], usize),
    static_scale: Option<f32>,
) -> QuantizedRows {
    let codec = Codec::new(format);
    let amax = |xs: &[bf16]| xs.iter().fold(0f32, |m, x| m.max(x.to_f32().abs()));
    let tensor = static_scale.unwrap_or_else(|| codec.scale(amax(rows)));
    let mut quantized = QuantizedRows::default();
    for row in rows.chunks_exact(hidden) {
        let group = match granularity {
            Granularity::Group(n) => n.get(),
            _ => hidden,
        };
        for group in row.chunks(group) {
            let scale = if granularity == Granularity::Tensor { tensor } else { codec.scale(amax(group)) };
            quantized.scales.push(scale);
            quantized.codes.extend(group.iter().map(|x| codec.quantize(x.to_f32(), scale)));
        }
    }
    quantized
}

/// The values of quantised rows, `code · scale` without rounding.
pub fn dequantize_rows(
    format: Fp8Format,
    granularity: Granularity,
    rows: &QuantizedRows,
    hidden: usize,
) -> Vec<f64> {
    let codec = Codec::new(format);
    let values: Vec<f64> = (0..=255).map(|code| codec.decode(code)).collect();
    let group = match granularity {
        Granularity::Group(n) => n.get(),
        _ => hidden,
    };
    let groups = rows.codes.chunks(hidden).flat_map(|row| row.chunks(group));
    let scaled = groups.zip(&rows.scales).flat_map(|(codes, &scale)| {
        let values = &values;
        codes.iter().map(move |&code| values[usize::from(code)] * f64::from(scale))
    });
    scaled.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_codes() {
        let (ocp, fnuz) = (Codec::new(Fp8Format::E4M3Fn), Codec::new(Fp8Format::E4M3Fnuz));
        let rows: [(f32, u8, u8); 8] = [
            (1.0, 0x38, 0x40),
            (17.0, 0x58, 0x60),
            (-448.0, 0xfe, 0xff),
            (f32::NAN, 0x7f, 0x80),
            (-0.0, 0x80, 0x00),
            (f32::INFINITY, 0x7e, 0x7f),
            (0.001953125, 0x01, 0x02),
            (0.0009765625, 0x00, 0x01),
        ];
        for (x, ocp_code, fnuz_code) in rows {
            assert_eq!((ocp.encode(x), fnuz.encode(x)), (ocp_code, fnuz_code), "{x}");
        }
        assert_eq!(Codec::new(Fp8Format::E4M3FnuzMax224).encode(1e9), 0x7e);
    }

    #[test]
    fn every_code_survives() {
        for format in [Fp8Format::E4M3Fn, Fp8Format::E4M3Fnuz] {
            let codec = Codec::new(format);
            for code in (0..=255).filter(|&c| !codec.decode(c).is_nan()) {
                assert_eq!(codec.encode(codec.decode(code) as f32), code, "{format:?}");
            }
        }
    }
}
