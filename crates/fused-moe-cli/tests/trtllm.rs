//! `fmoe run` with FlashInfer's experts: monolithic ones, which get logits, and their routed form.

mod common;

use common::{Run, golden, read, relative_l2};
use rstest::rstest;

/// The golden case whose sizes fill FlashInfer's layouts.
const CASE: &str = "deepseek_v3_fp8_block";

fn run(name: &str, options: &str) -> (Run, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (Run::golden(CASE, &folder.path().join(name)).with(options), folder)
}

#[rstest]
fn both_forms_match_transformers_and_aiter(
    #[values("trtllm", "trtllm_routed")] experts: &str,
    #[values("allgather_reducescatter", "naive")] comm: &str,
    #[values(1, 2, 8)] ranks: usize,
    #[values("auto", "none")] quant: &str,
) {
    let layer = format!("--all2all {comm} --ep-size {ranks} --quant {quant} --verify --json");
    let (ours, _folder) = run("out", &format!("{layer} --experts {experts}"));
    let report = ours.run().succeeded().json();
    assert_eq!(report["plan"]["experts"], experts, "{report}");
    let out = read(&ours.output);
    let expected = read(&golden(CASE).join("expected.safetensors"));
    for name in ["routed", "output"] {
        // Against the reference that does not quantise activations.
        let error = relative_l2(&out[name].values(), &expected[name].values());
        assert!(error <= 6e-2, "{name} is {error:.2e} off");
    }
    let (aiter, _folder) = run("out", &format!("{layer} --experts aiter"));
    aiter.run().succeeded();
    let theirs = read(&aiter.output);
    let apart = relative_l2(&out["output"].values(), &theirs["output"].values());
    assert!(apart <= 1e-2, "{apart:.2e} from aiter");
    assert_eq!(out["topk_ids"], theirs["topk_ids"]);
}

#[test]
fn one_rank_needs_no_collective() {
    let (local, _folder) = run("out", "--all2all local --experts trtllm --verify");
    local.run().succeeded();
}

/// The default dispatch sends rows by their experts, which monolithic ones choose themselves.
#[rstest]
#[case::modular_dispatch(CASE, "--experts trtllm", &["kernel kind", "monolithic", "modular"])]
#[case::uneven_ranks(CASE, "--experts trtllm --all2all naive --ep-size 3", &["parallelism", "equally many experts"])]
#[case::scheme("mixtral", "--experts trtllm_routed --quant fp8-ptpc", &["quantisation", "not per output channel"])]
#[case::dynamic("mixtral", "--experts trtllm --all2all naive --quant fp8-per-tensor", &["static scale"])]
fn limits_are_refused_with_reasons(#[case] golden: &str, #[case] options: &str, #[case] words: &[&str]) {
    Run::golden(golden, std::path::Path::new("out")).with(options).refused(2, words);
}
