//! What is refused, on any machine: every reason, and the device that is not there behind them.

use fused_moe_core::*;
use gpu_experts::GpuExperts;
use moe_kernels::Target;
use rstest::rstest;

/// No machine has so many.
const NOWHERE: Device = Device { kind: DeviceKind::Cuda, index: 1 << 20 };

fn experts() -> GpuExperts {
    GpuExperts::new(Target::open(NOWHERE))
}

fn config() -> MoeConfig {
    MoeConfig {
        hidden: 7168,
        intermediate: 2048,
        top_k: 8,
        max_tokens_per_rank: 4096,
        quant: QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
        device: DeviceKind::Cuda,
        ..MoeConfig::new(ExpertPlacement::linear(256, 1).unwrap())
    }
}

fn reasons(config: &MoeConfig) -> Vec<String> {
    let Support::Unsupported(reasons) = experts().supports(config) else {
        panic!("a device that is not there")
    };
    reasons.iter().map(ToString::to_string).collect()
}

#[rstest]
#[case::unquantized(MoeConfig { quant: QuantScheme::Unquantized, ..config() })]
#[case::block(config())]
#[case::ptpc(MoeConfig { quant: QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn), ..config() })]
fn nothing_but_the_device_is_against_what_the_kernels_do(#[case] config: MoeConfig) {
    let reasons = reasons(&config);
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(reasons[0].starts_with("device: needs sm_90a, found no Cuda device"), "{reasons:?}");
}

#[test]
fn every_reason_is_given() {
    let reasons = reasons(&MoeConfig {
        hidden: 200,
        intermediate: 64,
        in_dtype: DType::F16,
        quant: QuantScheme::Mxfp4,
        activation: Activation::Gelu,
        expert_bias: true,
        padding: Padding { hidden: 8, intermediate: 0 },
        placement: ExpertPlacement::linear(257, 1).unwrap(),
        device: DeviceKind::Host,
        ..config()
    });
    let wanted = [
        "device: needs Cuda, found Host",
        "element type: needs bf16 hidden states, found f16",
        "quantisation: needs none, fp8-block or fp8-ptpc in fp8_e4m3fn, found mxfp4",
        "activation: needs silu, found gelu",
        "weights: needs no biases, found a bias for every matrix",
        "shape: needs no padding, found 8 of hidden, 0 of intermediate",
        "shape: needs hidden a multiple of 128, found 200",
        "shape: needs intermediate a multiple of 128, found 64",
        "shape: needs at most 256 experts on a rank, found 257",
    ];
    assert_eq!(reasons[..wanted.len()], wanted);
    assert_eq!(reasons.len(), wanted.len() + 1, "{reasons:?}");
}

#[rstest]
#[case(QuantScheme::Fp8Block(Fp8Format::E4M3Fnuz))]
#[case(QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fnuz))]
#[case(QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn))]
#[case(QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn))]
#[case(QuantScheme::Nvfp4)]
fn other_schemes_are_refused(#[case] quant: QuantScheme) {
    assert!(reasons(&MoeConfig { quant, ..config() })[0].starts_with("quantisation: needs none"));
}

/// Beyond 32 bits.
#[test]
fn sizes_that_kernels_cannot_count_are_refused() {
    let reasons = reasons(&MoeConfig { max_tokens_per_rank: 1 << 30, ..config() });
    assert!(
        reasons[0].starts_with("shape: needs sizes that the kernels count, found slots 8589934592"),
        "{reasons:?}"
    );
}

#[test]
fn what_is_refused_is_neither_built_nor_packed() {
    let (config, wires) = (config(), vec![config().quant.quantized_wire(DType::Bf16)]);
    let mut comm = PrepareCaps::host("comm", KernelKind::Modular, wires.clone(), 8);
    let mut mine = ExpertsCaps::host("aiter", wires);
    (comm.devices, mine.devices) = (vec![DeviceKind::Cuda], vec![DeviceKind::Cuda]);
    let plan = negotiate(&config, &comm, &mine).unwrap();
    let built = experts().build(&config, &plan, Rank(0)).unwrap_err();
    assert_eq!((built.kind, built.stage, built.backend), (ErrorKind::Contract, Stage::Experts, "aiter"));
    let small = MoeConfig { placement: ExpertPlacement::linear(8, 8).unwrap(), top_k: 1, ..config };
    let too_few = experts().pack(&small, Rank(0), &[]).unwrap_err();
    assert!(too_few.source.unwrap().to_string().contains("holds 1 experts, 0 were given"));
}

/// That a workspace has a size is no matter of a device: a plan can be priced anywhere.
#[test]
fn the_workspace_grows_with_the_rows() {
    let config = config();
    let plan = |rows| {
        let wires = vec![config.quant.quantized_wire(DType::Bf16)];
        let mut comm = PrepareCaps::host("comm", KernelKind::Modular, wires.clone(), rows);
        let mut mine = ExpertsCaps::host("aiter", wires);
        (comm.devices, mine.devices) = (vec![DeviceKind::Cuda], vec![DeviceKind::Cuda]);
        negotiate(&config, &comm, &mine).unwrap()
    };
    let bytes = |rows| experts().workspace_bytes(&config, &plan(rows));
    assert!(bytes(0) < bytes(1) && bytes(1) < bytes(128) && 100 * bytes(1) < 2 * bytes(128));
    // Between gemm1 and gemm2 bf16 and FP8 with scales, behind gemm2 f32.
    let least = 8 * (2048 * 2 + 2048 + 16 * 4 + 7168 * 4);
    assert!((128 * least..129 * least).contains(&bytes(128)), "{}", bytes(128));
}
