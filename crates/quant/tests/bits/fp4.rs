//! FP4 against its definition in f64.

use fused_moe_core::{DType, TensorView};
use half::bf16;
use quant::fp4::{self, Fp4Scales, Fp4Weights, MX_GROUP, NV_GROUP, Nvfp4Rows};
use quant::{QuantError, decode};
use rand::Rng;
use rstest::rstest;

use crate::reference::{self, FORMATS, KINDS, fresh, row, widen};

/// The value of a code, from its bits.
fn e2m1(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
    let magnitude =
        if exponent == 0 { mantissa / 2.0 } else { (1.0 + mantissa / 2.0) * 2f64.powi(exponent - 1) };
    if code & 8 != 0 { -magnitude } else { magnitude }
}

fn e8m0(code: u8) -> f64 {
    2f64.powi(i32::from(code) - 127)
}

/// The nearest code by search, the even one of two.
fn nearest(x: f32) -> u8 {
    let distance = |code: u8| (e2m1(code) - f64::from(x).abs().min(6.0)).abs();
    let best =
        (0..8).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2)))).unwrap();
    best | if x.is_sign_negative() { 8 } else { 0 }
}

#[test]
fn every_code_has_the_value_of_the_definition() {
    for code in 0..=255u8 {
        assert_eq!(f64::from(fp4::decode(code)).to_bits(), e2m1(code & 0xf).to_bits(), "{code:#04x}");
        assert_eq!(fp4::encode(fp4::decode(code)), code & 0xf);
        match code {
            0xff => assert!(fp4::decode_e8m0(code).is_nan()),
            _ => assert_eq!(f64::from(fp4::decode_e8m0(code)), e8m0(code), "{code:#04x}"),
        }
    }
}

#[test]
fn numbers_round_to_the_nearest_code() {
    let offset = fresh("strided f32").random_range(0..4096u32);
    let strided = (0..1 << 20).map(|i| f32::from_bits((i << 12) + offset));
    let middles = (0..7).map(|code| ((e2m1(code) + e2m1(code + 1)) / 2.0) as f32);
    let around = middles.flat_map(|x| [x, x.next_up(), x.next_down(), -x, -x.next_up(), -x.next_down()]);
    for x in strided.chain(around).filter(|x| !x.is_nan()) {
        assert_eq!(fp4::encode(x), nearest(x), "{x:e} ({:#010x})", x.to_bits());
    }
    assert_eq!((fp4::encode(f32::INFINITY), fp4::encode(f32::NEG_INFINITY)), (7, 15));
    assert_eq!((fp4::encode(f32::NAN), fp4::encode(-f32::NAN)), (7, 7));
    assert_ne!(nearest(2.5), 5, "the search must not round up");
}

#[test]
fn pairs_have_the_even_column_in_the_low_half() {
    let mut packed = [0xaa; 2];
    fp4::pack(&[1, 0xf, 0x12, 3], &mut packed).unwrap();
    assert_eq!(packed, [0xf1, 0x32]);
    let mut codes = [0xaa; 4];
    fp4::unpack(&packed, &mut codes).unwrap();
    assert_eq!(codes, [1, 0xf, 2, 3]);
    assert_eq!(fp4::pack(&[1; 3], &mut packed), Err(QuantError::RaggedGroup { columns: 3, group: 2 }));
}

/// All sixteen codes under every E8M0 and every E4M3 scale: one rounding of the product in f64.
#[test]
fn every_code_under_every_scale() {
    let all: [u8; 16] = std::array::from_fn(|code| code as u8);
    let mut half = [0; 8];
    fp4::pack(&all, &mut half).unwrap();
    let mx = half.repeat(2);
    for scale in 0..=255u8 {
        let (mut out, mut narrow) = ([f32::NAN; 32], [bf16::NAN; 32]);
        let weights = Fp4Weights { dims: [1, 32], codes: &mx, scales: Fp4Scales::Mx32(&[scale]) };
        if scale == 0xff {
            let nan = Err(QuantError::NanScale { index: 0, code: 0xff });
            assert_eq!(weights.dequantize_f32(&mut out), nan);
        } else {
            weights.dequantize_f32(&mut out).unwrap();
            weights.dequantize_bf16(&mut narrow).unwrap();
            for (i, &x) in out.iter().enumerate() {
                let want = (e2m1(i as u8 % 16) * e8m0(scale)) as f32;
                assert_eq!(x.to_bits(), want.to_bits(), "code {i} scale {scale:#04x}");
                assert_eq!(
                    narrow[i].to_bits(),
                    bf16::from_f32(want).to_bits(),
                    "code {i} scale {scale:#04x}"
                );
            }
        }
        let e4m3 = reference::decode(FORMATS[0], scale);
        for global in [1.0f32, 0.3e-3, 1e-20] {
            let mut out = [f32::NAN; 16];
            let scales = Fp4Scales::Nv16 { blocks: &[scale], global };
            let weights = Fp4Weights { dims: [1, 16], codes: &half, scales };
            if e4m3.is_nan() {
                assert_eq!(
                    weights.dequantize_f32(&mut out),
                    Err(QuantError::NanScale { index: 0, code: scale })
                );
                continue;
            }
            weights.dequantize_f32(&mut out).unwrap();
            for (code, &x) in all.iter().zip(&out) {
                let want = (e2m1(*code) * e4m3 * f64::from(global)) as f32;
                assert_eq!(x.to_bits(), want.to_bits(), "code {code} scale {scale:#04x} global {global}");
            }
        }
    }
}

/// The formula of a group, from the definition.
fn nv_group(group: &[f32], global: f32) -> (u8, Vec<u8>) {
    let amax = group.iter().filter(|x| x.is_finite()).fold(0f32, |amax, x| amax.max(x.abs()));
    if group.iter().any(|x| x.is_nan()) {
        return (0x7f, vec![0; group.len()]);
    }
    let scale = reference::Encoder::new(FORMATS[0]).encode((amax * (1.0 / 6.0) * (1.0 / global)).min(448.0));
    let quantum = decode(FORMATS[0], scale) * global;
    let codes = group.iter().map(|x| if scale == 0 { 0 } else { nearest(x * (1.0 / quantum)) });
    (scale, codes.collect())
}

#[rstest]
fn rows_of_activations(#[values(0, 16, 32, 160, 1024)] len: usize) {
    let mut rng = fresh("nvfp4 rows");
    for kind in KINDS {
        for global in [1e-6, 0.37 / 2688.0, 1.0, 3e4] {
            let narrow = row(&mut rng, kind, len);
            let wide = widen(&narrow);
            let quantizer = Nvfp4Rows::new(global).unwrap();
            let (mut codes, mut scales) = (vec![0xaa; len / 2], vec![0xaa; len / NV_GROUP]);
            quantizer.quantize(&narrow, &mut codes, &mut scales).unwrap();
            let (mut other, mut other_scales) = (codes.clone(), scales.clone());
            other.fill(0x55);
            other_scales.fill(0x55);
            quantizer.quantize(&wide, &mut other, &mut other_scales).unwrap();
            assert_eq!((&codes, &scales), (&other, &other_scales), "{kind:?} in f32");
            let mut values = vec![bf16::INFINITY; len];
            quantizer.quantize_to_values(&narrow, &mut values).unwrap();

            let mut unpacked = vec![0; len];
            fp4::unpack(&codes, &mut unpacked).unwrap();
            let groups = wide.chunks(NV_GROUP).zip(unpacked.chunks(NV_GROUP)).zip(&scales);
            for (i, ((group, codes), &scale)) in groups.enumerate() {
                assert_eq!((scale, codes.to_vec()), nv_group(group, global), "{kind:?} {global} {group:?}");
                for (code, value) in codes.iter().zip(&values[i * NV_GROUP..]) {
                    let want = e2m1(*code) * reference::decode(FORMATS[0], scale);
                    assert!(value.to_f64() == want || (want.is_nan() && value.is_nan()), "{kind:?}");
                }
            }
        }
    }
}

#[rstest]
#[case(0.0)]
#[case(-1.0)]
#[case(f32::NAN)]
#[case(f32::INFINITY)]
#[case(1e-37)]
#[case(1e37)]
fn a_global_scale_can_be_divided_by(#[case] global: f32) {
    assert!(matches!(Nvfp4Rows::new(global), Err(QuantError::BadScale { index: 0, .. })), "{global}");
}

fn view<'a>(values: &'a [bf16], n: usize, k: usize) -> TensorView<'a> {
    TensorView::from_slice(values, DType::Bf16, &[n, k]).unwrap()
}

#[rstest]
fn weights(#[values((1, 32), (5, 64), (0, 32), (33, 320))] (n, k): (usize, usize)) {
    let mut rng = fresh("fp4 weights");
    let mut values = Vec::new();
    for _ in 0..n {
        let kind =
            [reference::Kind::Normal, reference::Kind::Zero, reference::Kind::Tiny, reference::Kind::Huge];
        let kind = kind[rng.random_range(0..4)];
        values.extend(row(&mut rng, kind, k));
    }
    let wide = widen(&values);
    let (mut codes, mut scales) = (vec![0xaa; n * k / 2], vec![0xaa; n * k / MX_GROUP]);
    fp4::quantize_mxfp4(view(&values, n, k), &mut codes, &mut scales).unwrap();
    let mut unpacked = vec![0; n * k];
    fp4::unpack(&codes, &mut unpacked).unwrap();
    for ((group, codes), &scale) in wide.chunks(MX_GROUP).zip(unpacked.chunks(MX_GROUP)).zip(&scales) {
        let amax = group.iter().fold(1e-10f32, |amax, x| amax.max(x.abs()));
        let wanted = (f64::from(amax) / 6.0).log2().ceil();
        assert_eq!(f64::from(scale) - 127.0, wanted, "{amax:e}");
        for (x, code) in group.iter().zip(codes) {
            assert_eq!(*code, nearest((f64::from(*x) / e8m0(scale)) as f32), "{x:e} {scale}");
        }
    }
    let (mut codes, mut scales) = (vec![0xaa; n * k / 2], vec![0xaa; n * k / NV_GROUP]);
    let global = fp4::quantize_nvfp4(view(&values, n, k), &mut codes, &mut scales).unwrap();
    let amax = wide.iter().fold(1e-10f32, |amax, x| amax.max(x.abs()));
    assert_eq!(global, amax / 2688.0);
    fp4::unpack(&codes, &mut unpacked).unwrap();
    for ((group, codes), &scale) in wide.chunks(NV_GROUP).zip(unpacked.chunks(NV_GROUP)).zip(&scales) {
        assert_eq!((scale, codes.to_vec()), nv_group(group, global));
    }
}

/// 6 and its powers of two are the largest magnitudes of their scales.
#[test]
fn an_mx_scale_is_the_smallest_that_holds_the_group() {
    for exponent in [-30, -1, 0, 1, 100, 125] {
        let six = 6.0 * 2f32.powi(exponent);
        for (amax, wanted) in [(six, exponent), (six.next_up(), exponent + 1), (six.next_down(), exponent)] {
            let mut row = [0.0f32; 32];
            row[7] = -amax;
            let (mut codes, mut scales) = ([0; 16], [0]);
            let view = TensorView::from_slice(&row, DType::F32, &[1, 32]).unwrap();
            fp4::quantize_mxfp4(view, &mut codes, &mut scales).unwrap();
            assert_eq!(i32::from(scales[0]) - 127, wanted, "{amax:e}");
        }
    }
}

#[test]
fn what_fp4_cannot_hold_is_refused() {
    let mut values = vec![bf16::ONE; 2 * 48];
    let (mut codes, mut scales) = (vec![0; 48], vec![0; 6]);
    let ragged = QuantError::RaggedGroup { columns: 48, group: 32 };
    let refused = fp4::quantize_mxfp4(view(&values, 2, 48), &mut codes, &mut scales);
    assert_eq!(refused.unwrap_err(), ragged);
    let refused = fp4::quantize_nvfp4(view(&values[..80], 2, 40), &mut codes, &mut scales);
    assert_eq!(refused.unwrap_err(), QuantError::RaggedGroup { columns: 40, group: 16 });
    let refused = Nvfp4Rows::new(1.0).unwrap().quantize(&values[..17], &mut codes, &mut scales);
    assert_eq!(refused.unwrap_err(), QuantError::RaggedGroup { columns: 17, group: 16 });
    fp4::quantize_nvfp4(view(&values, 2, 48), &mut codes, &mut scales).unwrap();
    values[70] = bf16::NAN;
    let refused = fp4::quantize_nvfp4(view(&values, 2, 48), &mut codes, &mut scales);
    assert_eq!(refused.unwrap_err(), QuantError::NanWeight { index: 70 });
    let refused = fp4::quantize_mxfp4(view(&values, 3, 32), &mut codes, &mut scales[..3]);
    assert_eq!(refused.unwrap_err(), QuantError::NanWeight { index: 70 });
    let mut out = vec![0.0; 96];
    let short = Fp4Weights {
        dims: [2, 48],
        codes: &codes,
        scales: Fp4Scales::Nv16 { blocks: &scales[..5], global: 1.0 },
    };
    let wanted = QuantError::BufferLength { buffer: "scales", wanted: 6, found: 5 };
    assert_eq!(short.dequantize_f32(&mut out).unwrap_err(), wanted);
}
