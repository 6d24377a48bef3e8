//! `--device`: a layer on a GPU where there is one, and a refusal with every reason where there is none.

mod common;

use std::path::Path;

use common::{Run, fmoe};
use fused_moe::device::device_count;
use fused_moe::{DeviceKind, QuantScheme};
use serde_json::Value;

fn has_gpu() -> bool {
    device_count(DeviceKind::Cuda).unwrap_or(0) > 0
}

const NO_DRIVER: &str = "no Cuda device";

/// Sizes that kernels do not take are refused anywhere, and a missing driver is one reason more.
#[test]
fn a_layer_that_does_not_fit_is_refused_with_every_reason() {
    let run = |options: &str| Run::golden("qwen3_moe_norm", Path::new("unset")).with(options);
    let mut words = vec!["- x aiter", "intermediate a multiple of 128, found 32"];
    if !has_gpu() {
        words.extend([NO_DRIVER, "libcuda.so"]);
    }
    run("--device cuda").refused(2, &words);
    run("--device cuda --quant fp8-per-tensor")
        .refused(2, &["quantisation: needs none, fp8-block or fp8-ptpc"]);
    run("--device hip").refused(2, &["device: needs Cuda, found Hip", "no Hip device"]);
    run("--device cuda --all2all naive").refused(2, &["unknown all2all backend \"naive\"; known: local"]);
}

#[test]
fn the_demo_runs_on_a_gpu_or_says_that_there_is_none() {
    let demo = fmoe(["demo", "--device", "cuda", "--tokens", "24"]);
    if has_gpu() {
        let text = demo.succeeded().stdout;
        assert_eq!(text.matches("local x aiter").count(), 3, "{text}");
    } else {
        demo.failed(2, &[NO_DRIVER]);
    }
}

#[test]
fn doctor_and_matrix_know_the_backends_of_devices() {
    let report = fmoe(["doctor", "--json"]).succeeded().json();
    let kinds = report["kinds"].as_array().unwrap();
    let cuda = kinds.iter().find(|kind| kind["kind"] == "cuda").unwrap();
    let cells = fmoe(["matrix", "--device", "cuda", "--json"]).succeeded().json();
    let cells = cells.as_array().unwrap();
    let fits = |topology: &str, scheme: QuantScheme| {
        let is_it = |cell: &&Value| cell["topology"] == topology && cell["scheme"] == scheme.to_string();
        let cell = cells.iter().find(is_it).unwrap();
        !cell["fitting"].as_array().unwrap().is_empty()
    };
    if has_gpu() {
        assert_eq!(cuda["usable"], serde_json::json!(["local x aiter"]), "{cuda}");
    } else {
        assert!(cuda["unavailable"].as_str().unwrap().contains(NO_DRIVER), "{cuda}");
        let reasons: Vec<_> = cuda["refused"].as_object().unwrap().keys().collect();
        assert!(reasons.iter().all(|reason| reason.contains(NO_DRIVER)), "{cuda}");
        assert!(!reasons.is_empty() && cuda["usable"].as_array().unwrap().is_empty(), "{cuda}");
    }
    assert_eq!(fits("EP 1", QuantScheme::Unquantized), has_gpu());
    assert!(!fits("EP 8", QuantScheme::Unquantized) && !fits("EP 1", QuantScheme::Mxfp4));
}
