//! Bad input is refused with the values in the message.

use fused_moe_core::{
    DType, Fp8Format, Granularity, QuantScheme, ScaleLayout, ScaleOrder, ScaleSource, TensorView, WireFormat,
};
use half::{bf16, f16};
use quant::{
    Activations, Isa, QuantError, QuantizedWeights, Quantizer, RowQuantizer, WeightQuantizer, WeightScales,
};
use rstest::rstest;

const FORMAT: Fp8Format = Fp8Format::E4M3Fn;

#[test]
fn wrong_buffers() {
    let row = [bf16::ONE; 129];
    let rows = RowQuantizer::new(FORMAT);
    let error = rows.quantize_per_token(&row, &mut [0; 128]).unwrap_err();
    assert_eq!(error.to_string(), "the codes hold 128 elements, not 129");
    let error =
        rows.quantize_per_group(&row, Granularity::PER_1X128, &mut [0; 129], &mut [0.0; 1]).unwrap_err();
    assert_eq!(error.to_string(), "the scales hold 1 elements, not 2");
    let error = rows.quantize_per_group(&row, Granularity::Token, &mut [0; 129], &mut [0.0; 2]).unwrap_err();
    assert_eq!(error, QuantError::UnsupportedGranularity { granularity: Granularity::Token });

    let view = TensorView::from_slice(&row, DType::Bf16, &[1, 129]).unwrap();
    let quantizer = Quantizer::for_scheme(QuantScheme::Fp8Block(FORMAT));
    let prepared = quantizer.prepare(Activations::of(view)).unwrap();
    assert!(matches!(
        prepared.row(0, &mut [0; 129], &mut [0; 7]),
        Err(QuantError::BufferLength { found: 7, .. })
    ));
    assert!(matches!(
        prepared.row(0, &mut [0; 130], &mut [0; 8]),
        Err(QuantError::BufferLength { found: 130, .. })
    ));
    assert!(matches!(prepared.row(1, &mut [0; 129], &mut [0; 8]), Err(QuantError::View(_))));
    let error = quantizer.prepare(Activations::of(view).weighted(&[1.0, 2.0])).unwrap_err();
    assert_eq!(error.to_string(), "the row factors hold 2 elements, not 1");

    let weights = QuantizedWeights {
        format: FORMAT,
        granularity: WeightScales::Block,
        dims: [1, 129],
        codes: &[0; 129],
        scales: &[1.0],
    };
    let error = weights.dequantize_f32(&mut [0.0; 129]).unwrap_err();
    assert_eq!(error, QuantError::BufferLength { buffer: "scales", wanted: 2, found: 1 });
}

#[rstest]
fn wrong_tensors(
    #[values(
        QuantScheme::Unquantized,
        QuantScheme::Fp8Block(FORMAT),
        QuantScheme::Fp8Ptpc(FORMAT),
        QuantScheme::Fp8PerTensor(FORMAT)
    )]
    scheme: QuantScheme,
    #[values(0, 2)] tokens: usize,
) {
    let half = vec![f16::ONE; tokens * 4];
    let view = TensorView::from_slice(&half, DType::F16, &[tokens, 4]).unwrap();
    let quantizer = Quantizer::for_scheme(scheme);
    let error = quantizer.prepare(Activations::of(view)).unwrap_err();
    assert_eq!(error, QuantError::InputDType { found: DType::F16 });
    let view = TensorView::from_slice(&[bf16::ONE; 4], DType::Bf16, &[4]).unwrap();
    let error = quantizer.prepare(Activations::of(view)).unwrap_err();
    assert_eq!(error, QuantError::NotMatrix { dims: vec![4] });
    let error = WeightQuantizer::new(FORMAT, WeightScales::Tensor).quantize(view, &mut [0; 4], &mut [0.0]);
    assert_eq!(error, Err(QuantError::NotMatrix { dims: vec![4] }));
}

#[rstest]
fn wrong_scales(#[values(0.0, -1.0, 1e-40, f32::NAN, f32::INFINITY)] scale: f32) {
    let quantizer = Quantizer::for_scheme_with(Isa::SCALAR, QuantScheme::Fp8PerTensorStatic(FORMAT));
    let row = [1.0f32];
    let view = TensorView::from_slice(&row, DType::F32, &[1, 1]).unwrap();
    let error = quantizer.prepare(Activations::of(view).scaled(Some(scale))).map(|_| ());
    assert!(matches!(error, Err(QuantError::BadScale { .. })));
    let error = RowQuantizer::new(FORMAT).quantize_scaled(&[1.0f32], scale, &mut [0]);
    assert!(matches!(error, Err(QuantError::BadScale { .. })));
}

#[rstest]
#[case::f32_rows(WireFormat::unquantized(DType::F32))]
#[case::codes_without_scales(WireFormat::unquantized(DType::Fp8E4M3Fn))]
#[case::other_payload(QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fnuz).quantized_wire(DType::Bf16))]
#[case::static_scale(with_scale(ScaleLayout { source: ScaleSource::Static, ..DYNAMIC }))]
#[case::bf16_scale(with_scale(ScaleLayout { dtype: DType::Bf16, ..DYNAMIC }))]
#[case::transposed(with_scale(ScaleLayout { order: ScaleOrder::Transposed { stride: 8 }, ..DYNAMIC }))]
#[case::swizzled(with_scale(ScaleLayout { order: ScaleOrder::Swizzled128x4, ..DYNAMIC }))]
fn wires_that_nobody_writes(#[case] wire: WireFormat) {
    let error = Quantizer::for_wire(Isa::SCALAR, wire, FORMAT).unwrap_err();
    assert!(error.to_string().contains(&wire.to_string()), "{error}");
}

const DYNAMIC: ScaleLayout = ScaleLayout::dynamic_f32(Granularity::PER_1X128);

fn with_scale(scale: ScaleLayout) -> WireFormat {
    WireFormat { payload: DType::Fp8E4M3Fn, scale: Some(scale) }
}
