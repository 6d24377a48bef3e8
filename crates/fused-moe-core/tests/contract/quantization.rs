//! Schemes, wires, and how they are printed.

use std::num::NonZeroUsize;

use fused_moe_core::{
    DType, Fp8Format, Granularity, QuantScheme, ScaleLayout, ScaleOrder, ScaleSource, WireFormat,
};
use rstest::rstest;

const OCP: Fp8Format = Fp8Format::E4M3Fn;

#[rstest]
#[case(QuantScheme::Unquantized, "none", "bf16", (512, 0))]
#[case(QuantScheme::Fp8Block(OCP), "fp8-block", "fp8_e4m3fn + dynamic f32 scale per 1x128", (256, 8))]
#[case(QuantScheme::Fp8Ptpc(OCP), "fp8-ptpc", "fp8_e4m3fn + dynamic f32 scale per token", (256, 4))]
#[case(QuantScheme::Fp8PerTensor(OCP), "fp8-per-tensor", "fp8_e4m3fn + dynamic f32 scale per tensor", (256, 4))]
#[case(
    QuantScheme::Fp8Block(Fp8Format::E4M3Fnuz),
    "fp8-block (fp8_e4m3fnuz, max 240)",
    "fp8_e4m3fnuz + dynamic f32 scale per 1x128",
    (256, 8)
)]
#[case(
    QuantScheme::Fp8Ptpc(Fp8Format::E4M3FnuzMax224),
    "fp8-ptpc (fp8_e4m3fnuz, max 224)",
    "fp8_e4m3fnuz + dynamic f32 scale per token",
    (256, 4)
)]
fn a_scheme_has_one_quantized_wire(
    #[case] scheme: QuantScheme,
    #[case] name: &str,
    #[case] wire: &str,
    #[case] bytes: (usize, usize),
) {
    assert_eq!(scheme.to_string(), name);
    let format = scheme.quantized_wire(DType::Bf16);
    assert_eq!(format.to_string(), wire);
    assert_eq!((format.payload_bytes(256), format.scale_bytes(256)), bytes);
    // Without a scale there are no scale bytes, and with one there are some: no third state.
    assert_eq!(format.scale.is_none(), format.scales_per_token(256) == 0);
    assert_eq!(scheme.activation_granularity(), format.scale.map(|s| s.granularity));
    assert_eq!(scheme.fp8().map(Fp8Format::dtype), format.scale.map(|_| format.payload));
}

#[rstest]
#[case(1, 1)]
#[case(127, 1)]
#[case(128, 1)]
#[case(129, 2)]
#[case(7168, 56)]
#[case(0, 0)]
fn the_last_group_may_be_ragged(#[case] hidden: usize, #[case] groups: usize) {
    assert_eq!(Granularity::PER_1X128.scales_per_token(hidden), groups);
    let wire = QuantScheme::Fp8Block(OCP).quantized_wire(DType::Bf16);
    assert_eq!((wire.scales_per_token(hidden), wire.scale_bytes(hidden)), (groups, 4 * groups));
    assert_eq!(Granularity::Token.scales_per_token(hidden), 1);
    assert_eq!(Granularity::Tensor.scales_per_token(hidden), 1);
}

#[test]
fn every_part_of_a_scale_layout_is_printed_and_compared() {
    let base = ScaleLayout::dynamic_f32(Granularity::Token);
    let group = Granularity::Group(NonZeroUsize::new(32).unwrap());
    let variants = [
        (base, "u8 + dynamic f32 scale per token"),
        (ScaleLayout { granularity: Granularity::Tensor, ..base }, "u8 + dynamic f32 scale per tensor"),
        (ScaleLayout { granularity: group, ..base }, "u8 + dynamic f32 scale per 1x32"),
        (ScaleLayout { source: ScaleSource::Static, ..base }, "u8 + static f32 scale per token"),
        (ScaleLayout { dtype: DType::Bf16, ..base }, "u8 + dynamic bf16 scale per token"),
        (
            ScaleLayout { order: ScaleOrder::Transposed { stride: 96 }, ..base },
            "u8 + dynamic f32 scale per token, transposed with stride 96",
        ),
        (
            ScaleLayout { order: ScaleOrder::Swizzled128x4, ..base },
            "u8 + dynamic f32 scale per token, swizzled 128x4",
        ),
    ];
    for (i, (scale, text)) in variants.into_iter().enumerate() {
        let wire = WireFormat { payload: DType::U8, scale: Some(scale) };
        assert_eq!(wire.to_string(), text);
        for (j, (other, _)) in variants.into_iter().enumerate() {
            assert_eq!(i == j, wire == WireFormat { payload: DType::U8, scale: Some(other) });
        }
    }
    assert_ne!(WireFormat::unquantized(DType::Bf16), WireFormat::unquantized(DType::F16));
}

#[test]
fn fp8_maxima_are_those_of_the_scheme() {
    let maxima = [OCP, Fp8Format::E4M3Fnuz, Fp8Format::E4M3FnuzMax224].map(Fp8Format::max);
    assert_eq!(maxima, [448.0, 240.0, 224.0]);
}
