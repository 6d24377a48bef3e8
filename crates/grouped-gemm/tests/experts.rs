//! What the experts of a configuration refuse, with expert, tensor and value.

use fused_moe_core::{
    DType, ExpertMatrices, ExpertPlacement, MoeConfig, Padding, QuantScheme, Rank, TensorView, WeightMatrix,
    WeightScale,
};
use grouped_gemm::experts::{PackedExperts, PackedGemms, Scheme, Supported};
use half::bf16;
use rstest::rstest;

const SIZE: usize = 64;

fn config(quant: QuantScheme) -> MoeConfig {
    let placement = ExpertPlacement::linear(1, 1).unwrap();
    MoeConfig {
        hidden: SIZE,
        intermediate: SIZE,
        top_k: 1,
        max_tokens_per_rank: 1,
        quant,
        ..MoeConfig::new(placement)
    }
}

/// One expert whose three matrices are the same, all codes 1.
struct Stored {
    quant: QuantScheme,
    codes: Vec<u8>,
    scales: Vec<u8>,
    bias: Option<Vec<bf16>>,
    input_scale: Option<f32>,
}

impl Stored {
    fn new(quant: QuantScheme) -> Self {
        let (group, one) = if quant == QuantScheme::Mxfp4 { (32, 127) } else { (16, 0x38) };
        let scales = vec![one; SIZE * SIZE / group];
        Stored { quant, codes: vec![0x22; SIZE * SIZE / 2], scales, bias: None, input_scale: Some(0.5) }
    }

    fn pack(&self, config: &MoeConfig) -> Result<PackedExperts, String> {
        let view = |bytes, dtype, columns| TensorView::from_slice(bytes, dtype, &[SIZE, columns]).unwrap();
        let per_row = self.scales.len() / SIZE;
        let scale = match self.quant {
            QuantScheme::Mxfp4 => WeightScale::Mx32(view(&self.scales, DType::E8M0, per_row)),
            _ => {
                let blocks = view(&self.scales, DType::Fp8E4M3Fn, per_row);
                WeightScale::Nv16 { blocks, global: 1.0 }
            }
        };
        let bias = self.bias.as_ref().map(|b| TensorView::from_slice(b, DType::Bf16, &[b.len()]).unwrap());
        let codes = view(&self.codes, DType::Fp4E2M1x2, SIZE / 2);
        let matrix =
            WeightMatrix { bias, input_scale: self.input_scale, ..WeightMatrix::quantized(codes, scale) };
        let expert = ExpertMatrices { gate: matrix, up: matrix, down: matrix };
        let scheme = Scheme::of(config.quant).unwrap();
        PackedExperts::pack(scheme, config, Rank(0), &[expert]).map_err(|e| e.to_string())
    }
}

fn refused(packed: Result<PackedExperts, String>) -> String {
    packed.map(drop).unwrap_err()
}

#[rstest]
#[case(
    QuantScheme::Mxfp4,
    0xff,
    "gate scale of expert 0 needs scales that are numbers, found NaN (code 0xff) at 127"
)]
#[case(
    QuantScheme::Nvfp4,
    0x7f,
    "gate scale of expert 0 needs scales that are numbers, found NaN (code 0x7f) at 255"
)]
fn a_nan_scale_is_refused_unless_it_is_padding(
    #[case] quant: QuantScheme,
    #[case] nan: u8,
    #[case] message: &str,
) {
    let mut stored = Stored::new(quant);
    *stored.scales.last_mut().unwrap() = nan;
    assert_eq!(refused(stored.pack(&config(quant))), message);
    // One row less is in use: its scale is that of padding in all three matrices.
    let padded = MoeConfig { padding: Padding { hidden: 1, intermediate: 1 }, ..config(quant) };
    let packed = stored.pack(&padded).unwrap();
    let PackedGemms::Fp4(gemms) = packed.gemms() else { panic!("{packed:?}") };
    let down = gemms.w2[0].unpack();
    // The last column of every row, the high half of its last byte, and the last row are zeros.
    for (row, pairs) in down.chunks(SIZE / 2).enumerate() {
        let (rest, last) = if row + 1 < SIZE { (0x22, 0x02) } else { (0, 0) };
        assert!(pairs[..SIZE / 2 - 1].iter().all(|&pair| pair == rest), "row {row}");
        assert_eq!(pairs[SIZE / 2 - 1], last, "row {row}");
    }
}

#[test]
fn input_scales_and_biases_are_there_exactly_where_they_must_be() {
    let (quant, fine) = (QuantScheme::Nvfp4, Stored::new(QuantScheme::Nvfp4));
    let packed = fine.pack(&config(quant)).unwrap();
    assert_eq!(packed.input_scales(), [0.5; 2]);
    assert_eq!(packed.into_weights("test").input_scale(), Some(0.5));
    for (scale, found) in [(None, "none"), (Some(0.0), "0"), (Some(f32::NAN), "NaN")] {
        let stored = Stored { input_scale: scale, ..Stored::new(quant) };
        let wanted =
            format!("gate input scale of expert 0 needs a scale that can be divided by, found {found}");
        assert_eq!(refused(stored.pack(&config(quant))), wanted);
    }
    let biased = MoeConfig { expert_bias: true, ..config(quant) };
    let wanted = "gate bias of expert 0 needs [64] of bf16 or f32, found no bias";
    assert_eq!(refused(fine.pack(&biased)), wanted);
    let short = Stored { bias: Some(vec![bf16::ONE; SIZE - 1]), ..Stored::new(quant) };
    let wanted = "gate bias of expert 0 needs [64] of bf16 or f32, found [63] of bf16";
    assert_eq!(refused(short.pack(&biased)), wanted);
    let wanted = "gate bias of expert 0 needs no bias, found [63] of bf16";
    assert_eq!(refused(short.pack(&config(quant))), wanted);
}

#[test]
fn ragged_groups_are_a_refusal() {
    let refused = |quant, hidden| {
        let config = MoeConfig { hidden, ..config(quant) };
        let reasons = Supported::resolve(&config, vec![]).unwrap_err();
        reasons.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let wanted = "shape: needs hidden in whole groups of 32 (mxfp4), found 48";
    assert_eq!(refused(QuantScheme::Mxfp4, 48), [wanted]);
    let wanted = "shape: needs hidden in whole groups of 16 (nvfp4), found 40";
    assert_eq!(refused(QuantScheme::Nvfp4, 40), [wanted]);
    assert!(Supported::resolve(&MoeConfig { hidden: 48, ..config(QuantScheme::Nvfp4) }, vec![]).is_ok());
}
