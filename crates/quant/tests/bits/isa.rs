//! Every instruction set writes the bits of the reference.

use std::num::NonZeroUsize;

use fused_moe_core::{Fp8Format, Granularity};
use half::bf16;
use quant::{Isa, RowQuantizer, Unrounded};
use rand::Rng;

use crate::reference::{FORMATS, KINDS, LENGTHS, fresh, quantize, quantize_scaled, row, widen};

struct Case<'a, T> {
    quantizer: RowQuantizer,
    row: &'a [T],
    /// What is quantised: the row, after its factor.
    values: &'a [f32],
    what: String,
}

fn check<T: Unrounded>(case: Case<'_, T>) {
    let Case { quantizer, row, values, what } = case;
    let format = quantizer.format();

    let (want_scale, want) = quantize(format, values);
    let mut codes = vec![0xaa; row.len()];
    let scale = quantizer.quantize_per_token(row, &mut codes).unwrap();
    assert_eq!(scale.to_bits(), want_scale.to_bits(), "per-token scale {scale:e} {want_scale:e}: {what}");
    assert_eq!(codes, want, "per-token codes: {what}");

    codes.fill(0xaa);
    quantizer.quantize_scaled(row, 0.37, &mut codes).unwrap();
    assert_eq!(codes, quantize_scaled(format, values, 0.37), "codes of a given scale: {what}");

    for group in [128, 32, 5] {
        let granularity = Granularity::Group(NonZeroUsize::new(group).unwrap());
        let mut scales = vec![f32::NAN; row.len().div_ceil(group)];
        codes.fill(0xaa);
        quantizer.quantize_per_group(row, granularity, &mut codes, &mut scales).unwrap();
        for (i, values) in values.chunks(group).enumerate() {
            let (want_scale, want) = quantize(format, values);
            assert_eq!(scales[i].to_bits(), want_scale.to_bits(), "scale {i} of 1x{group}: {what}");
            assert_eq!(&codes[i * group..][..values.len()], want, "group {i} of 1x{group}: {what}");
        }
    }
}

#[test]
fn rows_of_every_kind_and_length() {
    let mut rng = fresh("rows");
    for &isa in Isa::available() {
        for format in FORMATS {
            for kind in KINDS {
                for len in LENGTHS {
                    let narrow = row(&mut rng, kind, len);
                    let wide = widen(&narrow);
                    let quantizer = RowQuantizer::new(format).with_isa(isa);
                    let what = format!("{isa}, {format:?}, {kind:?}, {len} elements");
                    check(Case { quantizer, row: &narrow, values: &wide, what: format!("bf16, {what}") });
                    check(Case { quantizer, row: &wide, values: &wide, what: format!("f32, {what}") });
                }
            }
        }
    }
}

#[test]
fn f32_rows_of_any_bits() {
    let mut rng = fresh("f32 bits");
    for len in LENGTHS {
        let wide: Vec<f32> = (0..len).map(|_| f32::from_bits(rng.random())).collect();
        for &isa in Isa::available() {
            let quantizer = RowQuantizer::new(Fp8Format::E4M3Fn).with_isa(isa);
            check(Case { quantizer, row: &wide, values: &wide, what: format!("{isa}, {len} elements") });
        }
    }
}

#[test]
fn the_row_factor_is_rounded_to_bf16_first() {
    let mut rng = fresh("row factor");
    for kind in KINDS {
        for factor in [0.0, 0.3, -1.7, 1e30, f32::INFINITY, f32::NAN, rng.random()] {
            let narrow = row(&mut rng, kind, 300);
            let wide = widen(&narrow);
            let weighted: Vec<f32> = wide.iter().map(|x| bf16::from_f32(x * factor).to_f32()).collect();
            for &isa in Isa::available() {
                let quantizer =
                    RowQuantizer::new(Fp8Format::E4M3Fnuz).with_isa(isa).with_row_factor(Some(factor));
                let what = format!("{isa}, {kind:?}, factor {factor}");
                check(Case { quantizer, row: &narrow, values: &weighted, what: format!("bf16, {what}") });
                check(Case { quantizer, row: &wide, values: &weighted, what: format!("f32, {what}") });
            }
        }
    }
}

/// f32 numbers whose product falls between two bf16 numbers exercise the rounding itself.
#[test]
fn weighted_f32_rows_of_any_bits() {
    let mut rng = fresh("weighted f32 bits");
    let wide: Vec<f32> = (0..4099).map(|_| f32::from_bits(rng.random())).collect();
    let factor = rng.random_range(0.1f32..2.0);
    let weighted: Vec<f32> = wide.iter().map(|x| bf16::from_f32(x * factor).to_f32()).collect();
    for &isa in Isa::available() {
        let quantizer = RowQuantizer::new(Fp8Format::E4M3Fn).with_isa(isa).with_row_factor(Some(factor));
        check(Case { quantizer, row: &wide, values: &weighted, what: format!("{isa}, factor {factor}") });
    }
}

/// All strided f32 patterns through the vector encoders, which must agree with the scalar codec.
#[test]
fn vector_encoders_agree_with_the_codec() {
    let offset = fresh("strided").random_range(0..4096u32);
    let all: Vec<f32> = (0..1 << 20).map(|i| f32::from_bits((i << 12) + offset)).collect();
    let mut codes = vec![0; all.len()];
    for format in FORMATS {
        let want: Vec<u8> = all.iter().map(|&x| quant::encode(format, x)).collect();
        for &isa in Isa::available() {
            codes.fill(0xaa);
            RowQuantizer::new(format).with_isa(isa).quantize_scaled(&all, 1.0, &mut codes).unwrap();
            let bad = codes.iter().zip(&want).position(|(got, want)| got != want);
            assert_eq!(bad.map(|i| (all[i], codes[i], want[i])), None, "{isa} {format:?}");
        }
    }
}

/// NaN and infinity do not disturb their neighbours.
#[test]
fn non_finite_elements_leave_the_others_alone() {
    let mut rng = fresh("non-finite");
    let clean = row(&mut rng, crate::reference::Kind::Normal, 128);
    for (bad, code) in [(bf16::NAN, 0x7f), (bf16::INFINITY, 0x7e), (bf16::NEG_INFINITY, 0xfe)] {
        let mut dirty = clean.clone();
        dirty[77] = bad;
        let mut without = clean.clone();
        without[77] = bf16::ZERO;
        for &isa in Isa::available() {
            let quantizer = RowQuantizer::new(Fp8Format::E4M3Fn).with_isa(isa);
            let (mut got, mut want) = ([0xaa; 128], [0xaa; 128]);
            let scale = quantizer.quantize_per_token(&dirty, &mut got).unwrap();
            assert_eq!(quantizer.quantize_per_token(&without, &mut want), Ok(scale), "{isa} {bad}");
            want[77] = code;
            assert_eq!(got, want, "{isa} {bad}");
        }
    }
}
