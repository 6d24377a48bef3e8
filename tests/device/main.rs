//! The device runtime and the kernels on the GPU of this machine. Without one, what a user without one gets.
//!
//! `cargo xtask gpu-pack` puts this program into a folder that runs on a machine with only a driver.

mod conformance;
mod experts;
mod local;
mod quantize;
mod reference;
mod router;
mod runtime;
mod saboteurs;
mod stages;

use std::process::ExitCode;
use std::sync::Arc;

use device_runtime::{Runtime, Unavailable};
use fused_moe_core::{Device, DeviceKind};
use libtest_mimic::{Arguments, Failed, Trial};
use moe_kernels::Kernels;

/// A device and its kernels.
struct Gpu {
    runtime: Runtime,
    kernels: Kernels,
}

const FIRST: Device = Device { kind: DeviceKind::Cuda, index: 0 };

/// A test on the device.
type OnGpu = fn(&Gpu) -> Result<(), Failed>;

fn trials(gpu: Gpu) -> Vec<Trial> {
    let gpu = Arc::new(gpu);
    let on = |(name, test): (&str, OnGpu)| {
        let gpu = Arc::clone(&gpu);
        Trial::test(format!("cuda::{name}"), move || test(&gpu))
    };
    runtime::TESTS
        .into_iter()
        .chain(quantize::TESTS)
        .chain(experts::TESTS)
        .chain(stages::TESTS)
        .chain(local::TESTS)
        .chain(router::TESTS)
        .map(on)
        .collect()
}

/// A machine without the device must say so, and not panic.
fn is_refused(error: &Unavailable) -> Result<(), Failed> {
    let text = error.to_string();
    if text.contains("no Cuda device") && text.contains("libcuda.so") { Ok(()) } else { Err(text.into()) }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = match Runtime::open(FIRST) {
        Err(error) => {
            println!("cuda: refused: {error}");
            vec![Trial::test("cuda::refused_without_a_device", move || is_refused(&error))]
        }
        Ok(runtime) => match Kernels::load(&runtime) {
            Ok(kernels) => {
                trials(Gpu { runtime, kernels }).into_iter().chain(conformance::trials()).collect()
            }
            Err(error) => vec![Trial::test("cuda::kernels_load", move || Err(error.into()))],
        },
    };
    trials.push(Trial::test("no_such_device", || match Runtime::open(Device { index: 1 << 20, ..FIRST }) {
        Err(error) => is_refused(&error),
        Ok(_) => Err("opened a device that is not there".into()),
    }));
    trials.push(Trial::test("no_runtime_in_this_build", || {
        match Runtime::open(Device { kind: DeviceKind::Hip, index: 0 }) {
            Err(Unavailable { kind: DeviceKind::Hip, .. }) => Ok(()),
            other => Err(format!("{other:?}").into()),
        }
    }));
    trials.push(Trial::test("layers_are_refused_or_run", conformance::refused_or_run));
    let conclusion = libtest_mimic::run(&arguments, trials);
    let is_whole = arguments.filter.is_none() && !arguments.list;
    match conformance::floor() {
        Err(why) if is_whole && !conclusion.has_failed() => {
            println!("{why}");
            ExitCode::FAILURE
        }
        _ => conclusion.exit_code(),
    }
}
