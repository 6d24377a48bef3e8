//! Quantisers over whole tensors, row by row and at once.

use fused_moe_core::{DType, Fp8Format, Granularity, Layout, QuantScheme, TensorView};
use half::bf16;
use quant::{Activations, Isa, QuantError, QuantizedRow, Quantizer};
use rand::Rng;
use rstest::rstest;

use crate::reference::{FORMATS, KINDS, Kind, fresh, quantize, quantize_scaled, row, widen};

fn schemes() -> Vec<QuantScheme> {
    let each =
        FORMATS.map(|f| [QuantScheme::Fp8Block(f), QuantScheme::Fp8Ptpc(f), QuantScheme::Fp8PerTensor(f)]);
    each.into_iter().flatten().chain([QuantScheme::Unquantized]).collect()
}

/// Payload and scales of the tokens by the reference.
fn expected(scheme: QuantScheme, tokens: &[Vec<f32>]) -> Vec<(Vec<u8>, Vec<f32>)> {
    let all = tokens.concat();
    tokens
        .iter()
        .map(|token| match scheme {
            QuantScheme::Fp8Block(f) => {
                let (scales, codes): (Vec<f32>, Vec<Vec<u8>>) =
                    token.chunks(128).map(|group| quantize(f, group)).unzip();
                (codes.concat(), scales)
            }
            QuantScheme::Fp8Ptpc(f) => {
                let (scale, codes) = quantize(f, token);
                (codes, vec![scale])
            }
            QuantScheme::Fp8PerTensor(f) => {
                let (scale, _) = quantize(f, &all);
                (quantize_scaled(f, token, scale), vec![scale])
            }
            _ => (token.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()).collect(), vec![]),
        })
        .collect()
}

fn check(scheme: QuantScheme, isa: Isa, activations: Activations<'_>, tokens: &[Vec<f32>], what: &str) {
    let what = format!("{scheme}, {isa}, {what}");
    let quantizer = Quantizer::for_scheme_with(isa, scheme);
    let want = expected(scheme, tokens);
    let rows = quantizer.prepare(activations).unwrap();
    let (payload_bytes, scale_bytes) = rows.bytes_per_row();
    // Backwards, and one byte off any alignment, as a peer's memory may be.
    let mut payload = vec![0xaa; payload_bytes + 1];
    let mut scales = vec![0xaa; scale_bytes + 1];
    for i in (0..tokens.len()).rev() {
        payload.fill(0xaa);
        scales.fill(0xaa);
        rows.row(i, &mut payload[1..], &mut scales[1..]).unwrap();
        let want_scales: Vec<u8> = want[i].1.iter().flat_map(|s| s.to_ne_bytes()).collect();
        assert_eq!(scales[1..], want_scales, "scales of row {i}: {what}");
        assert_eq!(payload[1..], want[i].0, "payload of row {i}: {what}");
        assert_eq!((payload[0], scales[0]), (0xaa, 0xaa), "wrote before the row: {what}");
        let unchanged = rows.unchanged(i).unwrap();
        assert!(unchanged.is_none_or(|bytes| bytes == want[i].0), "row {i} is not as it is: {what}");
        let can_be = scheme == QuantScheme::Unquantized
            && activations.row_factor.is_none()
            && activations.hidden.dtype() == DType::Bf16;
        assert_eq!(unchanged.is_some(), can_be, "{what}");
    }
    let mut payload = vec![0xaa; tokens.len() * payload_bytes];
    let mut scales = vec![f32::NAN; tokens.len() * scale_bytes / 4];
    quantizer.quantize_rows(activations, &mut payload, &mut scales).unwrap();
    assert_eq!(payload, want.iter().flat_map(|w| w.0.clone()).collect::<Vec<_>>(), "payload at once: {what}");
    let want_bits: Vec<u32> = want.iter().flat_map(|w| w.1.clone()).map(f32::to_bits).collect();
    assert_eq!(scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>(), want_bits, "scales at once: {what}");
}

#[rstest]
fn tensors_with_gaps_between_rows(
    #[values(0, 1, 5)] tokens: usize,
    #[values(1, 127, 128, 129, 300)] hidden: usize,
) {
    let mut rng = fresh("tensor");
    let pitch = hidden + 3;
    // The gaps are poisoned: reading one would change a scale or a code.
    let mut narrow = vec![bf16::from_f32(3e38); tokens.max(1) * pitch];
    let mut rows = Vec::new();
    for token in narrow.chunks_mut(pitch).take(tokens) {
        let kind = KINDS[rng.random_range(0..KINDS.len())];
        let elements = match kind {
            // Which NaN an f32 that is NaN is rounded to is not this test's matter.
            Kind::AnyBits | Kind::SomeNan | Kind::OnlyNan => row(&mut rng, Kind::Normal, hidden),
            kind => row(&mut rng, kind, hidden),
        };
        token[..hidden].copy_from_slice(&elements);
        rows.push(widen(&elements));
    }
    let wide = widen(&narrow);
    let layout = || Layout::contiguous(&[tokens, hidden]).strided(&[pitch, 1], 0);
    let narrow = TensorView::from_slice_with(&narrow, DType::Bf16, layout()).unwrap();
    let wide = TensorView::from_slice_with(&wide, DType::F32, layout()).unwrap();
    let factors: Vec<f32> = (0..tokens).map(|_| rng.random_range(0.05..1.0)).collect();
    let weighted: Vec<Vec<f32>> = rows
        .iter()
        .zip(&factors)
        .map(|(row, w)| row.iter().map(|x| bf16::from_f32(x * w).to_f32()).collect())
        .collect();
    for scheme in schemes() {
        for &isa in Isa::available() {
            for (view, name) in [(narrow, "bf16"), (wide, "f32")] {
                check(scheme, isa, Activations::of(view), &rows, name);
                check(
                    scheme,
                    isa,
                    Activations::of(view).weighted(&factors),
                    &weighted,
                    &format!("{name} weighted"),
                );
            }
        }
    }
}

#[test]
fn a_static_scale_is_used_and_sent() {
    let mut rng = fresh("static");
    let narrow = row(&mut rng, Kind::Normal, 600);
    let view = TensorView::from_slice(&narrow, DType::Bf16, &[2, 300]).unwrap();
    let quantizer = Quantizer::for_scheme(QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn));
    let (mut payload, mut scales) = ([0xaa; 600], [f32::NAN; 2]);
    let missing = quantizer.quantize_rows(Activations::of(view), &mut payload, &mut scales).unwrap_err();
    assert!(matches!(missing, QuantError::NoStaticScale), "{missing}");
    let activations = Activations::of(view).scaled(Some(0.01));
    quantizer.quantize_rows(activations, &mut payload, &mut scales).unwrap();
    assert_eq!(scales, [0.01; 2]);
    assert_eq!(payload.to_vec(), quantize_scaled(Fp8Format::E4M3Fn, &widen(&narrow), 0.01));
}

#[test]
fn the_wire_is_that_of_the_scheme() {
    for scheme in schemes() {
        let quantizer = Quantizer::for_scheme(scheme);
        assert_eq!(quantizer.wire(), scheme.quantized_wire(DType::Bf16), "{scheme}");
        let format = scheme.fp8().unwrap_or(Fp8Format::E4M3Fn);
        let again = Quantizer::for_wire(Isa::detect(), quantizer.wire(), format).unwrap();
        assert_eq!(again.wire(), quantizer.wire(), "{scheme}");
    }
}

/// The relative error of a rounding to four significant bits is at most 1/16, plus the subnormal step.
#[test]
fn dequantised_rows_are_close() {
    let mut rng = fresh("round trip");
    let wide = widen(&row(&mut rng, Kind::Normal, 300));
    for format in FORMATS {
        for (scheme, granularity) in [
            (QuantScheme::Fp8Block(format), Granularity::PER_1X128),
            (QuantScheme::Fp8Ptpc(format), Granularity::Token),
        ] {
            let view = TensorView::from_slice(&wide, DType::F32, &[1, 300]).unwrap();
            let mut codes = [0xaa; 300];
            let mut scales = vec![f32::NAN; granularity.scales_per_token(300)];
            let quantizer = Quantizer::for_scheme(scheme);
            quantizer.quantize_rows(Activations::of(view), &mut codes, &mut scales).unwrap();
            let mut back = [f32::NAN; 300];
            let quantized = QuantizedRow { format, granularity, codes: &codes, scales: &scales };
            quantized.dequantize(&mut back).unwrap();
            for i in 0..300 {
                let scale = scales[if scales.len() == 1 { 0 } else { i / 128 }];
                let error = (back[i] - wide[i]).abs();
                let bound = wide[i].abs() / 16.0 * 1.001 + scale * 2f32.powi(-10);
                assert!(error <= bound, "{scheme}: element {i}: {} became {}", wide[i], back[i]);
            }
        }
    }
}
