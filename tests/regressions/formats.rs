//! What travels, who quantises it, and how scales are read.

use fused_moe::{
    ActivationFormat, Axis, DType, ExpertsCaps, Fp8Format, Granularity, KernelKind, PrepareCaps, QuantScheme,
    ScaleLayout, ScaleOrder, Selection, Support, TensorView, WireFormat, negotiate, quant,
};
use moe_conformance::{Case, RoutingPattern};
use rstest::rstest;

use crate::common::{PAIRS, agrees_everywhere, linear, pair, seed};

const BLOCK: QuantScheme = QuantScheme::Fp8Block(Fp8Format::E4M3Fn);
const PTPC: QuantScheme = QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn);

/// vLLM #37529: without quantisation, a scale of size 4 and dimension 0 was configured, the factory returned no backend,
/// and each of 8 ranks ran its own experts only: 87.5 % of what experts contribute was lost, without an error. A wire
/// format without scales cannot have a size of scales, and there is no "no backend": every expert of every rank counts.
#[test]
fn vllm_37529_unquantized_dispatch_without_scales_loses_no_expert() {
    let wire = QuantScheme::Unquantized.quantized_wire(DType::Bf16);
    assert_eq!((wire.scale, wire.scale_bytes(7168), wire.scales_per_token(7168)), (None, 0, 0));
    agrees_everywhere(&Case {
        num_experts: 16,
        top_k: 8,
        placement: linear(16, 8),
        routing: RoutingPattern::RemoteOnly,
        ..Case::small(QuantScheme::Unquantized, 8, seed())
    });
}

/// vLLM #37418: the factory chose FP8 dispatch by the quantisation of the model, while the experts of the day wanted bf16.
/// The wire is negotiated: experts that read bf16 get bf16 from a backend that could send either, and from one that
/// sends nothing else they get a refusal that says so.
#[test]
fn vllm_37418_the_wire_is_what_the_experts_read() {
    let config = Case::small(BLOCK, 2, seed()).config();
    let (fp8, bf16) = (BLOCK.quantized_wire(DType::Bf16), WireFormat::unquantized(DType::Bf16));
    let experts = ExpertsCaps::host("experts", vec![bf16]);
    let comm = |wires| PrepareCaps::host("comm", KernelKind::Modular, wires, 64);
    assert_eq!(negotiate(&config, &comm(vec![fp8, bf16]), &experts).unwrap().wire(), bf16);
    let reasons = negotiate(&config, &comm(vec![fp8]), &experts).unwrap_err();
    assert!(reasons.iter().any(|reason| reason.axis == Axis::Quant), "{reasons:?}");
}

/// sglang #37367: experts quantised what dispatch had quantised before (100 s of gsm8k instead of 62 s). Where experts
/// read FP8, FP8 is what dispatch sends, once, with the scales that it was made with.
#[rstest]
fn sglang_37367_rows_are_quantised_once(#[values(BLOCK, PTPC)] quant: QuantScheme) {
    let case = Case::small(quant, 2, seed());
    let registry = fused_moe::default_backends();
    for names in PAIRS {
        let survey = registry.survey(&case.config(), pair(names)).unwrap();
        assert_eq!(survey.fitting[0].wire(), quant.quantized_wire(DType::Bf16), "{names:?}");
    }
    agrees_everywhere(&case);
}

/// vLLM's DeepEP high-throughput backend quantised with `per_act_token_quant=False`, whatever the scheme said, so that
/// PTPC weights met per-tensor activations. Granularity is a part of the wire, which both sides have to name.
#[test]
fn vllm_ptpc_is_one_scale_per_token_on_every_backend() {
    let config = Case::small(PTPC, 2, seed()).config();
    let registry = fused_moe::default_backends();
    for names in PAIRS {
        let plan = registry.survey(&config, pair(names)).unwrap().fitting.remove(0);
        assert_eq!(plan.wire().scale.map(|scale| scale.granularity), Some(Granularity::Token), "{names:?}");
    }
    let tensor = QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn).quantized_wire(DType::Bf16);
    let comm = PrepareCaps::host("comm", KernelKind::Modular, vec![tensor], 64);
    let experts = ExpertsCaps::host("experts", vec![PTPC.quantized_wire(DType::Bf16)]);
    assert!(negotiate(&config, &comm, &experts).is_err());
}

/// vLLM #42118: scales that had travelled row by row were read as swizzled. The order is a part of the wire.
#[test]
fn vllm_42118_scales_in_another_order_do_not_fit() {
    let config = Case::small(BLOCK, 2, seed()).config();
    let rows = BLOCK.quantized_wire(DType::Bf16);
    let swizzled = WireFormat {
        scale: rows.scale.map(|scale| ScaleLayout { order: ScaleOrder::Swizzled128x4, ..scale }),
        ..rows
    };
    let comm = PrepareCaps::host("comm", KernelKind::Modular, vec![rows], 64);
    let reasons = negotiate(&config, &comm, &ExpertsCaps::host("experts", vec![swizzled])).unwrap_err();
    assert!(reasons.iter().any(|reason| reason.to_string().contains("swizzled")), "{reasons:?}");
}

/// aiter #3811: f32 scales per token were viewed as E8M0 bytes, and the kernel read four times past their end. A view
/// knows its element type and gives nothing as another.
#[test]
fn aiter_3811_a_scale_is_not_read_as_another_type() {
    let scales = [1.0f32; 8];
    let view = TensorView::from_slice(&scales, DType::F32, &[8, 1]).unwrap();
    assert!(view.as_slice::<u8>().is_err());
    assert!(TensorView::from_slice(&scales, DType::F32, &[32, 1]).is_err(), "four times the rows");
    let rows = PTPC.quantized_wire(DType::Bf16);
    let e8m0 =
        WireFormat { scale: rows.scale.map(|scale| ScaleLayout { dtype: DType::E8M0, ..scale }), ..rows };
    let comm = PrepareCaps::host("comm", KernelKind::Modular, vec![rows], 64);
    let config = Case::small(PTPC, 2, seed()).config();
    assert!(negotiate(&config, &comm, &ExpertsCaps::host("experts", vec![e8m0])).is_err());
}

/// vLLM #12134 and others: OCP codes in FNUZ kernels are wrong by a factor of two, and -0 is NaN. The two are element
/// types, so that a wire of one does not fit experts of the other, and the conversion knows the code 0x80.
#[test]
fn vllm_12134_the_two_kinds_of_e4m3_do_not_mix() {
    let (ocp, fnuz) = (Fp8Format::E4M3Fn, Fp8Format::E4M3Fnuz);
    assert!(quant::decode(fnuz, 0x80).is_nan());
    assert_eq!(quant::decode(ocp, 0x80).to_bits(), (-0.0f32).to_bits());
    assert_eq!(quant::decode(ocp, 0x40), 2.0 * quant::decode(fnuz, 0x40));
    let config = Case::small(BLOCK, 2, seed()).config();
    let wire = |format| QuantScheme::Fp8Block(format).quantized_wire(DType::Bf16);
    let comm = PrepareCaps::host("comm", KernelKind::Modular, vec![wire(ocp)], 64);
    let reasons = negotiate(&config, &comm, &ExpertsCaps::host("experts", vec![wire(fnuz)])).unwrap_err();
    assert!(reasons.iter().any(|reason| reason.axis == Axis::Quant), "{reasons:?}");
}

/// FlashInfer #2356, vLLM #31394: with scales around 1e-8, answers lost their accuracy, since products of two such
/// scales leave the normal numbers of smaller types. A row of tiny values keeps the precision of its codes.
#[rstest]
fn flashinfer_2356_small_scales_keep_the_precision_of_the_codes(#[values(1e-6, 1e-8)] size: f32) {
    let row: Vec<f32> = (1..=128).map(|i| i as f32 / 128.0 * 448.0 * size).collect();
    let quantizer = quant::RowQuantizer::new(Fp8Format::E4M3Fn);
    let mut codes = [0; 128];
    let scale = quantizer.quantize_per_token(&row, &mut codes).unwrap();
    assert!((scale / size - 1.0).abs() < 1e-5, "scale {scale:e}");
    for (x, code) in row.iter().zip(codes) {
        let back = quant::decode(Fp8Format::E4M3Fn, code) * scale;
        assert!((back - x).abs() <= x / 16.0 + scale * 2f32.powi(-10), "{x:e} became {back:e}");
    }
}

/// vLLM's factory floors `hidden / 128`: the scales of the last, shorter group had no room. They are counted upwards.
#[test]
fn vllm_the_last_scale_group_may_be_shorter() {
    assert_eq!(BLOCK.quantized_wire(DType::Bf16).scales_per_token(200), 2);
    agrees_everywhere(&Case { hidden: 200, ..Case::small(BLOCK, 3, seed()) });
}

/// vLLM: `expert_num_tokens` was counts per expert to one backend, a total to another and a running sum to a third.
/// `Arrived` has a variant for each format, with types of their own; and a pair whose formats differ is refused, where
/// vLLM fell through to "no backend" and the oracle told the last reason only.
#[test]
fn vllm_formats_that_differ_are_refused_with_every_reason() {
    let registry = fused_moe::default_backends();
    let config = Case::small(BLOCK, 2, seed()).config();
    let survey = registry.survey(&config, pair(("batched", "aiter"))).unwrap();
    assert!(survey.fitting.is_empty());
    let reasons = &survey.refused[0].reasons;
    assert!(reasons.iter().any(|reason| reason.axis == Axis::Format), "{reasons:?}");
    assert!(reasons.len() > 1, "one reason is not all of them: {reasons:?}");
    // One rank is no exception: it gets a backend, or reasons.
    let alone = registry.survey(&Case::small(BLOCK, 1, seed()).config(), Selection::default()).unwrap();
    assert_eq!(alone.fitting[0].format(), ActivationFormat::Standard);
    let local = registry.comm("local").unwrap().supports(&config, KernelKind::Modular);
    assert!(matches!(local, Support::Unsupported(reasons) if !reasons.is_empty()));
}
