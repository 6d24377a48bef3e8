//! OCP codes to FNUZ codes, for checkpoints that run on gfx942.

use crate::error::{QuantError, check_scale};

/// Turns E4M3 OCP weights into E4M3 FNUZ weights of the same value, in place and exactly.
///
/// The same bits mean half as much in FNUZ (its bias is 8, not 7), so the codes stay and the scales double.
/// Negative zero (0x80), which is NaN in FNUZ, becomes zero. The OCP NaN codes would silently become ±240.
///
/// Both buffers are unchanged if an error is returned.
///
/// # Errors
/// [`QuantError::NanCode`] for the first code 0x7F or 0xFF; [`QuantError::BadScale`] for the first scale that
/// is not positive and finite when doubled.
pub fn e4m3fn_to_e4m3fnuz(codes: &mut [u8], scales: &mut [f32]) -> Result<(), QuantError> {
    if let Some(index) = codes.iter().position(|code| code & 0x7f == 0x7f) {
        return Err(QuantError::NanCode { index, code: codes[index] });
    }
    for (index, &scale) in scales.iter().enumerate() {
        check_scale(index, scale)?;
        if (scale * 2.0).is_infinite() {
            return Err(QuantError::BadScale { index, scale });
        }
    }
    for code in codes.iter_mut().filter(|code| **code == 0x80) {
        *code = 0;
    }
    for scale in scales {
        *scale *= 2.0;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use fused_moe_core::Fp8Format;

    use super::*;
    use crate::codec::decode;

    #[test]
    fn all_254_numbers_keep_their_value() {
        let ocp: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
        let (mut fnuz, mut scales) = (ocp.clone(), [0.3, 1e-20]);
        e4m3fn_to_e4m3fnuz(&mut fnuz, &mut scales).unwrap();
        for (&before, &after) in ocp.iter().zip(&fnuz) {
            for (old, new) in [0.3, 1e-20].into_iter().zip(scales) {
                let want = decode(Fp8Format::E4M3Fn, before) * old;
                let got = decode(Fp8Format::E4M3Fnuz, after) * new;
                assert_eq!(got, want, "code {before:#04x} became {after:#04x}");
            }
        }
    }

    #[rstest::rstest]
    #[case(0x7f)]
    #[case(0xff)]
    fn a_nan_is_refused_and_nothing_changes(#[case] code: u8) {
        let (mut codes, mut scales) = ([0x80, 3, code], [1.0]);
        let error = e4m3fn_to_e4m3fnuz(&mut codes, &mut scales).unwrap_err();
        assert_eq!(error, QuantError::NanCode { index: 2, code });
        assert_eq!((codes, scales), ([0x80, 3, code], [1.0]));
    }

    #[rstest::rstest]
    #[case(f32::NAN)]
    #[case(0.0)]
    #[case(-1.0)]
    #[case(f32::MAX)]
    fn a_bad_scale_is_refused_and_nothing_changes(#[case] bad: f32) {
        let (mut codes, mut scales) = ([0x80], [1.0, bad]);
        let error = e4m3fn_to_e4m3fnuz(&mut codes, &mut scales).unwrap_err();
        assert!(matches!(error, QuantError::BadScale { index: 1, .. }), "{error}");
        assert_eq!((codes[0], scales[0]), (0x80, 1.0));
    }
}
