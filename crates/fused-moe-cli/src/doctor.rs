//! `fmoe doctor`: which devices this machine has, and which backends can use them.

use std::collections::BTreeMap;

use fused_moe::device::{DeviceInfo, Runtime, Unavailable, device_count};
use fused_moe::kernels::{Kernels, objects};
use fused_moe::{Device, DeviceKind, MoeConfig, Selection};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::exit::{Failure, OrFailure};
use crate::matrix;
use crate::report::{human_bytes, print, print_json};

const KINDS: [DeviceKind; 3] = [DeviceKind::Host, DeviceKind::Cuda, DeviceKind::Hip];

#[derive(Serialize)]
struct Report {
    cores: usize,
    kinds: Vec<KindReport>,
}

#[derive(Serialize)]
struct KindReport {
    kind: &'static str,
    /// Why there is no device of the kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    unavailable: Option<String>,
    devices: Vec<DeviceReport>,
    /// Pairs of backends that would run a layer on it, at EP 1.
    usable: Vec<String>,
    /// Pairs that would not, by their reasons.
    refused: BTreeMap<String, Vec<String>>,
}

#[derive(Serialize)]
struct DeviceReport {
    index: u32,
    name: String,
    arch: String,
    driver_version: String,
    compute_units: u32,
    memory_bytes: u64,
    free_bytes: u64,
    /// Devices whose memory it can read and write.
    peers: Vec<u32>,
    /// Kernels that are loaded on it, or why not.
    kernels: String,
}

/// Runs the command. A machine without GPUs is no failure: it is what was asked.
pub fn run(args: DoctorArgs) -> Result<(), Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kinds = KINDS.into_iter().map(look_at).collect::<Result<_, _>>()?;
    let report = Report { cores, kinds };
    if args.json { print_json(&report).or_failed() } else { print(text(&report)).or_failed() }
}

fn look_at(kind: DeviceKind) -> Result<KindReport, Failure> {
    let (devices, unavailable) = match devices(kind) {
        Ok(devices) => (devices, None),
        Err(unavailable) => (Vec::new(), Some(unavailable.to_string())),
    };
    let registry = fused_moe::backends_on(Device { kind, index: 0 });
    let config = MoeConfig { device: kind, ..matrix::config(1)? };
    let survey = registry.survey(&config, Selection::default()).or_failed()?;
    let usable = survey.fitting.iter().map(|plan| format!("{} x {}", plan.comm(), plan.experts())).collect();
    let mut refused: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pair in &survey.refused {
        for reason in &pair.reasons {
            refused.entry(reason.to_string()).or_default().push(format!("{} x {}", pair.comm, pair.experts));
        }
    }
    Ok(KindReport { kind: name(kind), unavailable, devices, usable, refused })
}

fn name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Host => "host",
        DeviceKind::Cuda => "cuda",
        _ => "hip",
    }
}

fn devices(kind: DeviceKind) -> Result<Vec<DeviceReport>, Unavailable> {
    if kind == DeviceKind::Host {
        return Ok(Vec::new());
    }
    let count = device_count(kind)?;
    (0..count).map(|index| device(Device { kind, index }, count)).collect()
}

fn device(device: Device, count: u32) -> Result<DeviceReport, Unavailable> {
    let runtime = Runtime::open(device)?;
    let failed = |error: fused_moe::device::DeviceError| Unavailable {
        kind: device.kind,
        tried: vec![device.to_string()],
        cause: error.to_string(),
    };
    let info = runtime.info().map_err(failed)?;
    let others = (0..count).filter(|&peer| peer != device.index);
    let peers = others.filter(|&peer| runtime.can_access(peer).unwrap_or(false)).collect();
    let kernels = match Kernels::load(&runtime) {
        Ok(kernels) => {
            let objects: Vec<_> = objects(kernels.arch()).collect();
            format!("{} for {}", objects.join(", "), kernels.arch())
        }
        Err(error) => error.to_string(),
    };
    let DeviceInfo { name, arch, driver_version, compute_units, memory_bytes, free_bytes, .. } = info;
    let index = device.index;
    Ok(DeviceReport {
        index,
        name,
        arch,
        driver_version,
        compute_units,
        memory_bytes,
        free_bytes,
        peers,
        kernels,
    })
}

fn text(report: &Report) -> String {
    let mut lines = vec![format!("host: {} cores", report.cores)];
    for kind in &report.kinds {
        lines.extend(kind.unavailable.iter().map(|why| format!("{}: {why}", kind.kind)));
        for device in &kind.devices {
            lines.push(format!(
                "{}:{}: {}, {}, {} units, {} of {} free, driver {}",
                kind.kind,
                device.index,
                device.name,
                device.arch,
                device.compute_units,
                human_bytes(device.free_bytes as f64),
                human_bytes(device.memory_bytes as f64),
                device.driver_version
            ));
            lines.push(format!("  kernels: {}", device.kernels));
            lines.push(format!("  peers: {:?}", device.peers));
        }
        let usable = if kind.usable.is_empty() { "none".to_owned() } else { kind.usable.join(", ") };
        lines.push(format!("  backends on {}: {usable}", kind.kind));
        if kind.usable.is_empty() {
            lines.extend(kind.refused.iter().map(|(why, who)| format!("    {} pairs: {why}", who.len())));
        }
    }
    lines.join("\n")
}
