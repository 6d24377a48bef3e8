//! `fmoe demo`, `plan`, `matrix` and `bench`, and that what the demo writes can be run again.

mod common;

use std::path::{Path, PathBuf};
use std::time::Instant;

use common::{COMMS, Run, Tensor, fmoe, golden, listing, manifest_entry};
use rstest::rstest;
use serde_json::Value;

#[test]
fn the_demo_verifies_every_backend_and_its_checkpoints_run() {
    let folder = tempfile::tempdir().unwrap();
    let keep = folder.path().join("kept");
    let start = Instant::now();
    let finished = fmoe(["demo", "--keep", keep.to_str().unwrap()]).succeeded();
    assert!(start.elapsed().as_secs() < 60, "the demo takes {:?}", start.elapsed());
    for word in ["mori_high_throughput", "allgather_reducescatter", "naive", "qwen3", "deepseek-v3", "seed"] {
        assert!(finished.stdout.contains(word), "{word}: {finished:?}");
    }
    assert!(!finished.stdout.contains("TOO LARGE"), "{finished:?}");

    let checkpoints = listing(&keep);
    assert!(checkpoints.len() >= 2, "{checkpoints:?}");
    for name in checkpoints {
        let checkpoint = keep.join(&name);
        let config: Value =
            serde_json::from_slice(&std::fs::read(checkpoint.join("config.json")).unwrap()).unwrap();
        let hidden = config["hidden_size"].as_u64().unwrap() as usize;
        let input = folder.path().join("input");
        let values = (0..11 * hidden).map(|i| (i as f32 * 0.7).sin());
        common::write_hidden(&input, Tensor::bf16(&[11, hidden], values));
        let output = folder.path().join("output");
        for comm in COMMS {
            let run = Run {
                checkpoint: checkpoint.clone(),
                input: input.clone(),
                output: output.clone(),
                options: vec![],
            };
            run.with(&format!("--all2all {comm} --ep-size 8 --verify")).run().succeeded();
        }
    }
    fmoe(["demo", "--keep", keep.to_str().unwrap()]).failed(2, &["exists already"]);
}

#[rstest]
#[case(&["--ep-size", "0"])]
#[case(&["--ep-size", "100000"])]
#[case(&["--tokens", "18446744073709551615"])]
#[case(&["--tokens", "1000000000000"])]
fn a_demo_of_bad_sizes_is_refused(#[case] args: &[&str]) {
    fmoe(["demo"].iter().chain(args)).failed(2, &[args[0]]);
}

#[rstest]
#[case::no_tokens("0", "3")]
#[case::one_rank("1", "1")]
#[case::uneven("13", "3")]
fn a_demo_of_odd_sizes_runs(#[case] tokens: &str, #[case] ranks: &str) {
    fmoe(["demo", "--tokens", tokens, "--ep-size", ranks]).succeeded();
}

/// `fmoe plan` of a golden case.
fn plan(case: &str, options: &str) -> Vec<String> {
    let folder: PathBuf = golden(case);
    let layer = manifest_entry(case)["layer"].to_string();
    let args = ["plan", "--checkpoint", folder.to_str().unwrap(), "--layer", &layer];
    args.into_iter().chain(options.split_whitespace()).map(str::to_string).collect()
}

#[test]
fn a_plan_names_every_pair_and_every_reason() {
    for case in ["mixtral", "deepseek_v3_fp8_block"] {
        let report =
            fmoe(plan(case, "--ep-size 8 --gpus-per-node 4 --all2all naive --json")).succeeded().json();
        assert_eq!(report["plan"]["all2all"], "naive", "{report}");
        let names = |key: &str| -> Vec<String> {
            let pairs = report[key].as_array().unwrap().iter().filter(|pair| pair["experts"] == "aiter");
            pairs.map(|pair| pair["all2all"].as_str().unwrap().to_string()).collect()
        };
        let over_nodes = ["mori_high_throughput", "mori_low_latency", "allgather_reducescatter"];
        assert_eq!(names("alternatives"), over_nodes, "{report}");
        let mut rejected = names("rejected");
        rejected.sort();
        assert_eq!(rejected, ["batched", "local"], "{report}");
        for pair in report["rejected"].as_array().unwrap() {
            let reasons = pair["reasons"].as_array().unwrap();
            let axis = if pair["all2all"] == "local" { "parallelism" } else { "activation format" };
            // FlashInfer's experts have limits of their own, which are asked first.
            let is_limited = pair["experts"].as_str().unwrap().starts_with("trtllm");
            assert!(is_limited || reasons.iter().any(|reason| reason["axis"] == axis), "{pair}");
            assert!(reasons.iter().all(|r| r["wanted"].is_string() && r["found"].is_string()), "{pair}");
        }
    }
}

#[rstest]
fn a_plan_costs_every_pair_that_fits(#[values(1, 8)] ranks: usize) {
    let options = format!("--ep-size {ranks}");
    let report = fmoe(plan("qwen2_moe", &format!("{options} --json"))).succeeded().json();
    let alternatives = report["alternatives"].as_array().unwrap();
    assert!(alternatives.len() >= 3, "{report}");
    for pair in std::iter::once(&report["plan"]).chain(alternatives) {
        assert!(pair["bytes_per_rank"]["total"].as_u64().unwrap() > 0, "{pair}");
        let wire = &pair["wire_bytes_per_token"];
        for direction in ["dispatch", "combine"] {
            assert_eq!(wire[direction].as_f64().unwrap() > 0.0, ranks > 1, "{pair}");
        }
    }
    let text = fmoe(plan("qwen2_moe", &options)).succeeded().stdout;
    for word in ["chosen", "also fits", "mori_high_throughput", "allgather_reducescatter", "naive", "aiter"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_eq!(text.contains("refused local x aiter"), ranks > 1, "{text}");
}

#[rstest]
#[case("--all2all mori", &["mori_high_throughput", "mori_low_latency"])]
#[case("--max-tokens 18446744073709551615", &["tokens"])]
#[case("--ep-size 8 --max-tokens 4611686018427387904", &["tokens"])]
#[case("--ep-size 99999999", &["--ep-size"])]
#[case("--layer 7", &["--layer"])]
fn a_plan_that_does_not_exist_is_refused(#[case] options: &str, #[case] words: &[&str]) {
    fmoe(plan("mixtral", options)).failed(2, words);
}

#[test]
fn the_matrix_has_every_backend_in_three_forms() {
    let (text, markdown) = (fmoe(["matrix"]).succeeded(), fmoe(["matrix", "--markdown"]).succeeded());
    for word in
        COMMS.into_iter().chain(["local", "aiter", "trtllm_routed", "fp8-block", "fp8-ptpc", "refused"])
    {
        assert!(text.stdout.contains(word), "{word}: {text:?}");
        assert!(markdown.stdout.contains(word), "{word}: {markdown:?}");
    }
    let table = markdown.stdout.lines().take_while(|line| !line.is_empty());
    assert!(table.clone().count() > 3 && table.clone().all(|line| line.starts_with('|')), "{markdown:?}");
    let cells = fmoe(["matrix", "--json"]).succeeded().json();
    let cells = cells.as_array().unwrap();
    let pairs =
        |cell: &Value| cell["fitting"].as_array().unwrap().len() + cell["rejected"].as_array().unwrap().len();
    assert!(cells.len() >= 12 && cells.iter().all(|cell| pairs(cell) >= 2), "{cells:?}");
    fmoe(["matrix", "--json", "--markdown"]).failed(2, &["--json"]);
}

#[rstest]
fn the_bench_measures_a_small_shape(#[values("1", "3")] ep_size: &str) {
    let args = ["bench", "experts", "--shape", "small", "--tokens", "4", "--reps", "1", "--quant", "none"];
    let report = fmoe(args.into_iter().chain(["--ep-size", ep_size, "--json"])).succeeded().json();
    assert!(report["peak_gflops"].as_f64().unwrap() > 0.0, "{report}");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!((&rows[0]["tokens"], &rows[0]["scheme"]), (&4.into(), &"none".into()));
    assert!(rows[0]["gflops"].as_f64().unwrap() > 0.0, "{report}");
}

#[rstest]
#[case(&["--shape", "nowhere.toml"], "nowhere.toml")]
#[case(&["--shape", "small", "--reps", "0"], "--reps 0")]
#[case(&["--shape", "small", "--ep-size", "0"], "--ep-size 0")]
#[case(&["--shape", "small", "--ep-size", "33"], "--ep-size 33: 32 experts")]
#[case(&["--shape", "small", "--routing", "nowhere.json"], "nowhere.json")]
#[case(&["--shape", "small", "--tokens", "0"], "0 tokens")]
#[case(&["--shape", "small", "--tokens", "18446744073709551615"], "tokens")]
#[case(&["--shape", "small", "--threads", "0"], "--threads")]
#[case(&["--shape", "small", "--threads", "100000000"], "--threads")]
#[case(&["--shape", "small", "--quant", "mxfp4"], "cannot be turned into mxfp4")]
#[case(&["--shape", "small", "--quant", "none,nvfp4"], "cannot be turned into nvfp4")]
#[case(&["--shape", "small", "--quant", "fp8-per-tensor-static"], "turned into fp8-per-tensor-static")]
fn a_bench_of_bad_sizes_is_refused(#[case] args: &[&str], #[case] word: &str) {
    fmoe(["bench", "experts"].iter().chain(args)).failed(2, &[word]);
}

#[rstest]
#[case([0, 64, 2, 1], "hidden 0")]
#[case([64, 64, 2, 3], "top-3 of 2")]
#[case([1 << 40, 1 << 40, 2, 1], "cannot be measured")]
fn a_bench_of_a_bad_shape_is_refused(#[case] sizes: [u64; 4], #[case] word: &str) {
    let folder = tempfile::tempdir().unwrap();
    let file: &Path = &folder.path().join("shape.toml");
    let [hidden, intermediate, experts, top_k] = sizes;
    let text = format!(
        "name = \"x\"\nhidden = {hidden}\nintermediate = {intermediate}\nexperts = {experts}\ntop_k = {top_k}\n\
         tokens = [3]\n"
    );
    std::fs::write(file, text).unwrap();
    fmoe(["bench", "experts", "--shape", file.to_str().unwrap()]).failed(2, &[word]);
}
