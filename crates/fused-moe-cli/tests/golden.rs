//! `fmoe run` against what transformers answers on checkpoints that it wrote itself.

mod common;

use std::path::Path;

use common::{COMMS, Run, Tensors, golden, manifest, manifest_entry, read, relative_l2};
use rstest::rstest;
use safetensors::tensor::Dtype;

/// Largest relative L2 error of an unquantised layer.
const UNQUANTISED: f64 = 1e-2;
/// Of an FP8 checkpoint, against a reference that does not quantise the activations.
const FP8: f64 = 6e-2;
/// Of an FP8 or NVFP4 checkpoint, against a reference that does, where the layer does.
const SAME_POINTS: f64 = 1.5e-2;
/// The same of NVFP4, whose activations have eight magnitudes: 0.16 is what the reference itself differs by.
const NVFP4: f64 = 2e-1;
/// Of a bf16 checkpoint that is quantised at load.
const QUANTISED_AT_LOAD: f64 = 8e-2;

macro_rules! cases {
    ($($name:ident)*) => {
        const CASES: &[&str] = &[$(stringify!($name)),*];

        mod matches_transformers {
            $(
                #[test]
                fn $name() {
                    super::check(stringify!($name));
                }
            )*
        }
    };
}

cases! {
    mixtral
    mixtral_packed
    qwen3_moe_norm
    qwen3_moe_no_norm
    qwen3_moe_packed
    qwen3_moe_sharded
    qwen2_moe
    olmoe
    deepseek_v2_greedy
    deepseek_v2_group
    deepseek_v3
    deepseek_v3_fp8_block
    deepseek_v3_fp8_block_ragged
    qwen3_moe_fp8_block_bf16_scale
    deepseek_v3_fp8_ptpc_bf16
    deepseek_v3_fp8_ptpc_f32
    gpt_oss
    gpt_oss_mxfp4
    qwen3_5_moe_packed
    qwen3_moe_nvfp4
    mixtral_fp8_static
}

#[test]
fn every_case_of_the_manifest_is_tested() {
    let named: Vec<String> =
        manifest().iter().map(|entry| entry["name"].as_str().unwrap().to_string()).collect();
    assert_eq!(named, CASES);
}

/// Every backend over 1, 2 and 8 ranks.
fn check(case: &str) {
    let folder = tempfile::tempdir().unwrap();
    let expected = read(&golden(case).join("expected.safetensors"));
    for comm in COMMS {
        let mut over_one_rank = None;
        for ranks in [1, 2, 8] {
            let at = format!("{case}, {comm}, EP {ranks}");
            let run = |name: &str, more: &str| {
                let run = Run::golden(case, &folder.path().join(name));
                let run = run.with(&format!("--all2all {comm} --ep-size {ranks} {more}"));
                run.run().succeeded();
                std::fs::read(run.output).unwrap()
            };
            let (first, second) = (run("first", ""), run("second", "--verify"));
            assert!(first == second, "{at}: two runs differ");

            let out = read(&folder.path().join("first"));
            let Tolerances { dequantised, same_points } = tolerances(case);
            compare(&at, &out, &expected, dequantised);
            for name in ["routed", "output"] {
                let want = expected.get(&format!("{name}_quantised"));
                assert_eq!(want.is_some(), same_points.is_some(), "{at}");
                let Some((want, at_most)) = want.zip(same_points) else { continue };
                let error = relative_l2(&out[name].values(), &want.values());
                assert!(error <= at_most, "{at}: {name} is {error:.2e} from {name}_quantised");
            }
            let output = out["output"].values();
            let one = over_one_rank.get_or_insert_with(|| output.clone());
            let apart = relative_l2(&output, one);
            assert!(apart <= UNQUANTISED, "{at}: {apart:.2e} from EP 1");
        }
    }
}

/// Largest relative L2 errors of a case.
struct Tolerances {
    /// Against a reference that does not quantise the activations.
    dequantised: f64,
    /// Against a reference that does, where the layer does.
    same_points: Option<f64>,
}

fn tolerances(case: &str) -> Tolerances {
    let (dequantised, same_points) = match manifest_entry(case)["quant"].as_str().unwrap() {
        // The activations of MXFP4 are those of the model.
        "none" | "mxfp4" => (UNQUANTISED, None),
        "nvfp4" => (NVFP4, Some(SAME_POINTS)),
        _ => (FP8, Some(SAME_POINTS)),
    };
    Tolerances { dequantised, same_points }
}

/// Names, element types and shapes of the contract; both outputs within `tolerance`; the same experts with the
/// same weights, in any order.
fn compare(at: &str, out: &Tensors, expected: &Tensors, tolerance: f64) {
    let names: Vec<&str> = out.keys().map(String::as_str).collect();
    assert_eq!(names, ["output", "routed", "topk_ids", "topk_weights"], "{at}");
    for (name, tensor) in out {
        let dtype = if name == "topk_ids" { Dtype::I32 } else { Dtype::F32 };
        assert_eq!((tensor.dtype, &tensor.shape), (dtype, &expected[name].shape), "{at}: {name}");
    }
    for name in ["output", "routed"] {
        let error = relative_l2(&out[name].values(), &expected[name].values());
        assert!(error <= tolerance, "{at}: {name} is {error:.2e} off");
    }
    let (got, want) = (by_id(out), by_id(expected));
    for (token, (got, want)) in got.iter().zip(&want).enumerate() {
        let same = got.len() == want.len()
            && got.iter().zip(want).all(|(got, want)| got.0 == want.0 && (got.1 - want.1).abs() <= 1e-4);
        assert!(same, "{at}: token {token} goes to {got:?}, wanted {want:?}");
    }
}

/// Expert and weight of every token's choices, sorted by expert.
fn by_id(tensors: &Tensors) -> Vec<Vec<(i32, f32)>> {
    let top_k = tensors["topk_ids"].shape[1];
    let (ids, weights) = (tensors["topk_ids"].ids(), tensors["topk_weights"].values());
    let rows = ids.chunks(top_k).zip(weights.chunks(top_k)).map(|(ids, weights)| {
        let mut row: Vec<(i32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
        row.sort_by_key(|&(id, _)| id);
        row
    });
    rows.collect()
}

/// Runs a golden case with `options` and `--verify`; its outputs must be within `tolerance` of the expected ones.
fn check_with(case: &str, options: &str, tolerance: f64) {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::golden(case, &folder.path().join("out")).with(options).with("--verify");
    run.run().succeeded();
    let expected = read(&golden(case).join("expected.safetensors"));
    compare(&format!("{case} {options}"), &read(&run.output), &expected, tolerance);
}

#[rstest]
fn a_bf16_checkpoint_is_quantised_at_load(
    #[values(
        "mixtral_packed",
        "qwen3_moe_norm",
        "qwen3_moe_no_norm",
        "qwen2_moe",
        "deepseek_v3",
        "gpt_oss",
        "qwen3_5_moe_packed"
    )]
    case: &str,
    #[values("fp8-block", "fp8-ptpc", "fp8-per-tensor")] quant: &str,
) {
    for (comm, ranks) in COMMS.into_iter().flat_map(|comm| [(comm, 1), (comm, 3), (comm, 8)]) {
        let options = format!("--quant {quant} --all2all {comm} --ep-size {ranks}");
        check_with(case, &options, QUANTISED_AT_LOAD);
    }
}

#[rstest]
fn a_quantised_checkpoint_is_dequantised_at_load(
    #[values(
        "deepseek_v3_fp8_block_ragged",
        "qwen3_moe_fp8_block_bf16_scale",
        "deepseek_v3_fp8_ptpc_bf16",
        "qwen3_moe_nvfp4",
        "mixtral_fp8_static",
        "gpt_oss_mxfp4"
    )]
    case: &str,
) {
    for (comm, ranks) in COMMS.into_iter().flat_map(|comm| [(comm, 1), (comm, 8)]) {
        let options = format!("--quant none --all2all {comm} --ep-size {ranks}");
        check_with(case, &options, UNQUANTISED);
    }
}

#[rstest]
#[case("deepseek_v3_fp8_block", "fp8-block")]
#[case("deepseek_v3_fp8_ptpc_f32", "fp8-ptpc")]
#[case("gpt_oss_mxfp4", "mxfp4")]
#[case("qwen3_moe_nvfp4", "nvfp4")]
#[case("mixtral_fp8_static", "fp8-per-tensor-static")]
fn the_scheme_of_the_checkpoint_may_be_named(#[case] case: &str, #[case] quant: &str) {
    let folder = tempfile::tempdir().unwrap();
    let outputs = ["auto", quant].map(|quant| {
        let run = Run::golden(case, &folder.path().join(quant)).with(&format!("--ep-size 2 --quant {quant}"));
        run.run().succeeded();
        std::fs::read(run.output).unwrap()
    });
    assert!(outputs[0] == outputs[1]);
}

/// Schemes that need what only a checkpoint has, and a scheme that a checkpoint is not in.
#[rstest]
#[case(
    "qwen3_moe_norm",
    "mxfp4",
    "are none, which cannot be turned into mxfp4, only run as a checkpoint stores it"
)]
#[case("qwen3_moe_norm", "nvfp4", "are none, which cannot be turned into nvfp4")]
#[case("mixtral", "fp8-per-tensor-static", "are none, which cannot be turned into fp8-per-tensor-static")]
#[case("qwen3_moe_nvfp4", "mxfp4", "are nvfp4, which cannot be turned into mxfp4")]
#[case("mixtral_fp8_static", "fp8-ptpc", "are fp8-per-tensor-static, which cannot be turned into fp8-ptpc")]
#[case("deepseek_v3_fp8_block", "fp8-ptpc", "are fp8-block, which cannot be turned into fp8-ptpc")]
fn schemes_that_a_checkpoint_does_not_have(#[case] case: &str, #[case] quant: &str, #[case] why: &str) {
    Run::golden(case, Path::new("")).with(&format!("--quant {quant}")).refused(2, &[why]);
}

/// 8 experts over 3 ranks, 13 or 37 tokens over 3 ranks.
#[rstest]
fn experts_and_tokens_need_not_divide(
    #[values("qwen3_moe_norm", "qwen2_moe", "deepseek_v3_fp8_block_ragged", "deepseek_v3_fp8_ptpc_bf16")]
    case: &str,
) {
    let tolerance = if case.contains("fp8") { FP8 } else { UNQUANTISED };
    for comm in COMMS {
        check_with(case, &format!("--ep-size 3 --all2all {comm}"), tolerance);
    }
}

#[test]
fn the_default_is_the_first_moe_layer_over_one_rank() {
    let folder = tempfile::tempdir().unwrap();
    let case = golden("qwen3_moe_sharded");
    let run = Run {
        checkpoint: case.clone(),
        input: case.join("input.safetensors"),
        output: folder.path().join("out"),
        options: vec![],
    };
    let report = run.clone().with("--json").run().succeeded().json();
    assert_eq!((&report["layer"], &report["ep_size"]), (&1.into(), &1.into()));
    assert_eq!(report["plan"]["all2all"], "mori_high_throughput");
    compare("defaults", &read(&run.output), &read(&case.join("expected.safetensors")), UNQUANTISED);
}

#[test]
fn f32_hidden_states_are_rounded_to_bf16_once() {
    let folder = tempfile::tempdir().unwrap();
    let case = golden("qwen3_moe_norm");
    let bf16 = common::read(&case.join("input.safetensors"))["hidden_states"].clone();
    // A third of the way to the next bf16 value, which must not matter.
    let off = bf16.values().into_iter().map(|x| x * (1.0 + 1.0 / 1024.0));
    let off: Vec<f32> = off.collect();
    let input = folder.path().join("input");
    common::write_hidden(&input, common::Tensor::f32(&bf16.shape, off));
    let run = |input: &Path, output: &str| {
        let run =
            Run { input: input.to_path_buf(), ..Run::golden("qwen3_moe_norm", &folder.path().join(output)) };
        run.run().succeeded();
        read(&run.output)
    };
    assert_eq!(run(&case.join("input.safetensors"), "a"), run(&input, "b"));
}
