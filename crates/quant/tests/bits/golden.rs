//! Numbers that others computed.

use fused_moe_core::{Fp8Format, Granularity};
use half::bf16;
use quant::{Isa, RowQuantizer};

/// `x[i] = i - 64` for 128 elements: bits of the scale, first codes, sum of all codes.
#[rstest::rstest]
#[case(Fp8Format::E4M3Fn, 0x3E12_4925, [0xfe, 0xfe, 0xfe, 0xfd, 0xfd, 0xfd, 0xfd, 0xfc], 22778)]
#[case(Fp8Format::E4M3Fnuz, 0x3E88_8889, [0xff, 0xff, 0xff, 0xfe, 0xfe, 0xfe, 0xfe, 0xfd], 22879)]
fn ramp(#[case] format: Fp8Format, #[case] scale_bits: u32, #[case] first: [u8; 8], #[case] sum: u32) {
    let row: Vec<bf16> = (0..128).map(|i| bf16::from_f32(i as f32 - 64.0)).collect();
    for &isa in Isa::available() {
        let quantizer = RowQuantizer::new(format).with_isa(isa);
        let (mut codes, mut scales) = ([0xaa; 128], [f32::NAN]);
        quantizer.quantize_per_group(&row, Granularity::PER_1X128, &mut codes, &mut scales).unwrap();
        assert_eq!(scales[0].to_bits(), scale_bits, "{isa}");
        assert_eq!(codes[..8], first, "{isa}");
        assert_eq!(codes.iter().map(|&code| u32::from(code)).sum::<u32>(), sum, "{isa}");
        assert_eq!(quantizer.quantize_per_token(&row, &mut codes), Ok(scales[0]), "{isa}");
        assert_eq!(codes[..8], first, "{isa}");
    }
}

/// A row of zeros has the scale of the floor and no code but zero.
#[rstest::rstest]
#[case(Fp8Format::E4M3Fn, 2.232143e-13)]
#[case(Fp8Format::E4M3Fnuz, 4.166667e-13)]
fn zeros(#[case] format: Fp8Format, #[case] scale: f32) {
    for &isa in Isa::available() {
        let mut codes = [0xaa; 300];
        let quantizer = RowQuantizer::new(format).with_isa(isa);
        let got = quantizer.quantize_per_token(&[bf16::ZERO; 300], &mut codes).unwrap();
        assert!((got / scale - 1.0).abs() < 1e-6, "{isa}: {got:e}");
        assert_eq!(codes, [0; 300], "{isa}");
    }
}
