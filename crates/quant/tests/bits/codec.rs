//! The codecs against the search over all values.

use half::f16;
use quant::{decode, encode};
use rand::Rng;

use crate::reference::{self, FORMATS, fresh};

#[test]
fn every_code_has_the_value_of_the_definition() {
    for format in FORMATS {
        for code in 0..=255 {
            let (want, got) = (reference::decode(format, code), f64::from(decode(format, code)));
            assert!(
                want.to_bits() == got.to_bits() || (want.is_nan() && got.is_nan()),
                "{format:?} {code:#04x}: want {want}, got {got}"
            );
        }
    }
}

#[test]
fn f32_numbers_round_to_the_nearest_code() {
    let offset = fresh("strided f32").random_range(0..4096u32);
    for format in FORMATS {
        let reference = reference::Encoder::new(format);
        for i in 0..1 << 20 {
            let x = f32::from_bits((i << 12) + offset);
            assert_eq!(encode(format, x), reference.encode(x), "{format:?} {x:e} ({:#010x})", x.to_bits());
        }
    }
}

#[test]
fn f16_numbers_round_to_the_nearest_code() {
    for format in FORMATS {
        let reference = reference::Encoder::new(format);
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits).to_f32();
            assert_eq!(encode(format, x), reference.encode(x), "{format:?} {x:e} (f16 {bits:#06x})");
        }
    }
}

/// Halfway points and their neighbours are where a rounding can go wrong.
#[test]
fn midpoints_go_to_the_even_code() {
    for format in FORMATS {
        let reference = reference::Encoder::new(format);
        let magnitudes = reference::magnitudes(format);
        for pair in magnitudes.windows(2) {
            let middle = ((pair[0] + pair[1]) / 2.0) as f32;
            for x in [middle.next_down(), middle, middle.next_up()] {
                for x in [x, -x] {
                    assert_eq!(encode(format, x), reference.encode(x), "{format:?} {x:e}");
                }
            }
        }
    }
}

/// The reference can tell a wrong codec: truncation is not rounding.
#[test]
fn the_reference_fails_truncation() {
    let format = FORMATS[0];
    let (reference, magnitudes) = (reference::Encoder::new(format), reference::magnitudes(format));
    let truncate = |x: f32| magnitudes.iter().rposition(|&m| m <= f64::from(x)).unwrap_or(0) as u8;
    assert_ne!(truncate(18.0 - 1e-3), reference.encode(18.0 - 1e-3));
}
