//! FP4 codes and their scales, written from the formulas alone, to judge crate `quant` as well as the backends.

use fused_moe_core::Fp8Format;
use half::bf16;

use super::codec::Codec;

/// Columns that share a scale in MXFP4.
pub(crate) const MX_GROUP: usize = 32;

/// Columns that share a block scale in NVFP4.
pub(crate) const NV_GROUP: usize = 16;

/// Largest magnitude of a code.
pub(crate) const MAX: f32 = 6.0;

/// Values of the eight codes without sign.
const MAGNITUDES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The value of a 4-bit code.
pub(crate) fn decode(code: u8) -> f64 {
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The code nearest to `x` clamped to ±6, ties to the even code.
pub(crate) fn encode(x: f32) -> u8 {
    let magnitude = f64::from(x.abs().min(MAX));
    let above = MAGNITUDES.iter().position(|&m| m >= magnitude).unwrap_or(7);
    let below = above.saturating_sub(1);
    let (down, up) = (magnitude - MAGNITUDES[below], MAGNITUDES[above] - magnitude);
    let code = match down.total_cmp(&up) {
        std::cmp::Ordering::Less => below,
        std::cmp::Ordering::Greater => above,
        std::cmp::Ordering::Equal if below % 2 == 0 => below,
        std::cmp::Ordering::Equal => above,
    };
    code as u8 | if x.is_sign_negative() { 8 } else { 0 }
}

/// The code of column `column` in a row of packed pairs.
pub(crate) fn unpack(row: &[u8], column: usize) -> u8 {
    row[column / 2] >> (4 * (column % 2)) & 0xf
}

/// Puts a code into a row of packed pairs.
pub(crate) fn pack(row: &mut [u8], column: usize, code: u8) {
    let shift = 4 * (column % 2);
    row[column / 2] = row[column / 2] & !(0xf << shift) | code << shift;
}

/// The value of an E8M0 scale; NaN for 0xFF.
pub(crate) fn decode_e8m0(code: u8) -> f64 {
    if code == 0xff { f64::NAN } else { 2f64.powi(i32::from(code) - 127) }
}

/// The E8M0 scale of a group: the smallest power of two under which `amax` fits the codes.
pub(crate) fn mx_scale(amax: f32) -> u8 {
    let exponent = (f64::from(amax.max(1e-10)) / f64::from(MAX)).log2().ceil();
    (exponent as i32 + 127).clamp(0, 254) as u8
}

/// The block scale of a group under the global scale `global`: the FP8 code of `amax / 6 / global`.
pub(crate) fn nv_scale(codec: &Codec, amax: f32, global: f32) -> u8 {
    codec.encode((amax * (1.0 / MAX) * (1.0 / global)).min(448.0))
}

/// The code of `x` under a block scale and a global scale; 0 where the block scale is 0.
pub(crate) fn nv_code(x: f32, block: f64, global: f32) -> u8 {
    let scale = block as f32 * global;
    if scale == 0.0 { 0 } else { encode(x * (1.0 / scale)) }
}

/// Rows of activations after a trip through NVFP4 codes.
pub(crate) fn nv_rows(rows: &[bf16], width: usize, global: f32) -> Vec<f64> {
    let codec = Codec::new(Fp8Format::E4M3Fn);
    let mut values = Vec::with_capacity(rows.len());
    for row in rows.chunks_exact(width) {
        for group in row.chunks(NV_GROUP) {
            let amax = group.iter().fold(0f32, |m, x| m.max(x.to_f32().abs()));
            let block = codec.decode(nv_scale(&codec, amax, global));
            let value = |x: &bf16| decode(nv_code(x.to_f32(), block, global)) * block * f64::from(global);
            values.extend(group.iter().map(value));
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_and_ties_go_to_even() {
        for code in 0..16 {
            assert_eq!(encode(decode(code) as f32), code);
        }
        // Half way between neighbours.
        let ties = [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (9.0, 7)];
        for (x, code) in ties {
            assert_eq!((encode(x), encode(-x)), (code, code | 8), "{x}");
        }
    }

    #[test]
    fn scales_bring_the_largest_into_range() {
        assert_eq!(decode_e8m0(mx_scale(6.0)), 1.0);
        assert_eq!(decode_e8m0(mx_scale(6.1)), 2.0);
        assert_eq!(decode_e8m0(mx_scale(0.0)), 2f64.powi(-35));
        let codec = Codec::new(Fp8Format::E4M3Fn);
        assert_eq!(codec.decode(nv_scale(&codec, 12.0, 0.5)), 4.0);
        assert_eq!(codec.decode(nv_scale(&codec, 1e9, 0.5)), 448.0);
    }

    #[test]
    fn codes_are_packed_in_pairs_the_even_column_low() {
        let mut row = [0xffu8; 2];
        for (column, code) in [1, 2, 3, 4].into_iter().enumerate() {
            pack(&mut row, column, code);
        }
        assert_eq!(row, [0x21, 0x43]);
        assert_eq!(unpack(&row, 2), 3);
    }
}
