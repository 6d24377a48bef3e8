//! `local` on a device, on any machine: every reason against a configuration, and the device that is not there.

use fused_moe_core::*;
use naive_comm::{DeviceLocal, Local};

/// No machine has so many.
const NOWHERE: Device = Device { kind: DeviceKind::Cuda, index: 1 << 20 };

fn config() -> MoeConfig {
    MoeConfig {
        hidden: 256,
        intermediate: 128,
        top_k: 2,
        max_tokens_per_rank: 8,
        quant: QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
        device: DeviceKind::Cuda,
        ..MoeConfig::new(ExpertPlacement::linear(8, 1).unwrap())
    }
}

fn local() -> DeviceLocal {
    DeviceLocal::new(moe_kernels::Target::open(NOWHERE))
}

fn reasons(config: &MoeConfig, kind: KernelKind) -> Vec<String> {
    let Support::Unsupported(reasons) = local().supports(config, kind) else {
        panic!("a device that is not there")
    };
    reasons.iter().map(ToString::to_string).collect()
}

#[test]
fn every_reason_is_given() {
    let missing = reasons(&config(), KernelKind::Modular);
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert!(missing[0].starts_with("device: needs sm_90a, found no Cuda device"), "{missing:?}");

    let placement = ExpertPlacement::linear(8, 2).unwrap();
    let config =
        MoeConfig { hidden: 100, in_dtype: DType::F16, device: DeviceKind::Host, placement, ..config() };
    let wanted = [
        "device: needs Cuda, found Host",
        "kernel kind: needs modular, found monolithic",
        "element type: needs bf16 hidden states, found f16",
        "parallelism: needs 1 rank, found 2 ranks",
        "shape: needs hidden a multiple of 8, found 100",
        missing[0].as_str(),
    ];
    assert_eq!(reasons(&config, KernelKind::Monolithic), wanted);
}

#[test]
fn it_is_not_built_without_its_device() {
    let config = config();
    let wires = vec![config.quant.quantized_wire(DType::Bf16)];
    let mut comm = PrepareCaps::host("local", KernelKind::Modular, wires.clone(), 8);
    let mut experts = ExpertsCaps::host("experts", wires);
    (comm.devices, experts.devices) = (vec![DeviceKind::Cuda], vec![DeviceKind::Cuda]);
    let plan = negotiate(&config, &comm, &experts).unwrap();
    let error = local().build(&config, &plan, &SingleRank).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Contract);
    assert!(error.source.unwrap().to_string().contains("no Cuda device"));
    // What it would hold and send is known all the same.
    assert_eq!(local().wire_bytes_per_token(&config, &plan), Local.wire_bytes_per_token(&config, &plan));
    // Codes, scales, ids, weights, outputs, and the weights and positions of the cast, each in whole lines.
    let pieces = [8 * 256, 8 * 2 * 4, 8 * 2 * 4, 8 * 2 * 4, 8 * 256 * 2, 8 * 4, 8 * 4];
    let wanted: usize = pieces.into_iter().map(Workspace::rounded).sum();
    assert_eq!(local().required_bytes(&config, &plan), wanted);
}
