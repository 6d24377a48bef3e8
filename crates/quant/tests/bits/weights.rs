//! Weight matrices against the reference, and back.

use fused_moe_core::{DType, Fp8Format, Layout, TensorView};
use half::bf16;
use quant::{Isa, QuantizedWeights, WeightQuantizer, WeightScales};
use rand::Rng;
use rstest::rstest;

use crate::reference::{FORMATS, KINDS, decode, fresh, quantize, quantize_scaled, row, widen};

/// Which scale belongs to weight `[r, c]`.
fn scale_index(scales: WeightScales, k: usize, r: usize, c: usize) -> usize {
    match scales {
        WeightScales::Block => r / 128 * k.div_ceil(128) + c / 128,
        WeightScales::Channel => r,
        _ => 0,
    }
}

#[rstest]
fn quantised_and_back(
    #[values((1, 1), (1, 300), (128, 128), (130, 257), (300, 127), (0, 5), (5, 0))] (n, k): (usize, usize),
    #[values(WeightScales::Block, WeightScales::Channel, WeightScales::Tensor)] granularity: WeightScales,
) {
    let mut rng = fresh("weights");
    let pitch = k + 2;
    let mut narrow = vec![bf16::from_f32(3e38); n.max(1) * pitch];
    for weights in narrow.chunks_mut(pitch).take(n) {
        let kind = KINDS[rng.random_range(0..KINDS.len())];
        weights[..k].copy_from_slice(&row(&mut rng, kind, k));
    }
    let wide = widen(&narrow);
    let layout = || Layout::contiguous(&[n, k]).strided(&[pitch, 1], 0);
    let views = [
        TensorView::from_slice_with(&narrow, DType::Bf16, layout()).unwrap(),
        TensorView::from_slice_with(&wide, DType::F32, layout()).unwrap(),
    ];
    let count = granularity.count(n, k);
    let mut groups = vec![Vec::new(); count];
    for r in 0..n {
        for c in 0..k {
            groups[scale_index(granularity, k, r, c)].push(wide[r * pitch + c]);
        }
    }
    for format in FORMATS {
        let want_scales: Vec<f32> = groups.iter().map(|group| quantize(format, group).0).collect();
        for (view, &isa) in views.iter().flat_map(|view| Isa::available().iter().map(move |isa| (view, isa)))
        {
            let what = format!("{format:?}, {isa}, {}", view.dtype());
            let mut codes = vec![0xaa; n * k];
            let mut scales = vec![f32::NAN; count];
            let quantizer = WeightQuantizer::new(format, granularity).with_isa(isa);
            quantizer.quantize(*view, &mut codes, &mut scales).unwrap();
            assert_eq!(scales, want_scales, "{what}");

            let quantized =
                QuantizedWeights { format, granularity, dims: [n, k], codes: &codes, scales: &scales };
            let mut back = vec![f32::INFINITY; n * k];
            let mut back_bf16 = vec![bf16::INFINITY; n * k];
            quantized.dequantize_f32(&mut back).unwrap();
            quantized.dequantize_bf16(&mut back_bf16).unwrap();
            for r in 0..n {
                for c in 0..k {
                    let (i, scale) = (r * k + c, scales[scale_index(granularity, k, r, c)]);
                    let code = quantize_scaled(format, &[wide[r * pitch + c]], scale)[0];
                    assert_eq!(codes[i], code, "code [{r}, {c}]: {what}");
                    // Both factors are f32 numbers, so the product is exact in f64 and is rounded once.
                    let value = (decode(format, code) * f64::from(scale)) as f32;
                    assert!(
                        value.to_bits() == back[i].to_bits() || (value.is_nan() && back[i].is_nan()),
                        "{what}"
                    );
                    let narrow = bf16::from_f32(value);
                    assert!(narrow == back_bf16[i] || (narrow.is_nan() && back_bf16[i].is_nan()), "{what}");
                }
            }
        }
    }
}

/// Negative control: reading block scales transposed is noticed.
#[test]
fn transposed_block_scales_give_other_numbers() {
    let wide: Vec<f32> =
        (0..256 * 256).map(|i| if i < 128 * 256 && i % 256 >= 128 { 100.0 } else { 1.0 }).collect();
    let view = TensorView::from_slice(&wide, DType::F32, &[256, 256]).unwrap();
    let (mut codes, mut scales) = (vec![0; 256 * 256], [0.0; 4]);
    let (format, granularity) = (Fp8Format::E4M3Fn, WeightScales::Block);
    WeightQuantizer::new(format, granularity).quantize(view, &mut codes, &mut scales).unwrap();
    let mut back = vec![0.0; 256 * 256];
    let dequantize = |scales: &[f32; 4], back: &mut [f32]| {
        let weights = QuantizedWeights { format, granularity, dims: [256, 256], codes: &codes, scales };
        weights.dequantize_f32(back).unwrap();
    };
    dequantize(&scales, &mut back);
    assert!(back.iter().zip(&wide).all(|(x, y)| (x - y).abs() < 1e-3 * y));
    scales.swap(1, 2);
    dequantize(&scales, &mut back);
    assert!(!back.iter().zip(&wide).all(|(x, y)| (x - y).abs() < 1e-3 * y));
}
