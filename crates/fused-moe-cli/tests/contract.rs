//! What scripts depend on: exit codes, OUT whole or untouched, one JSON object on stdout, logs on stderr only.

mod common;

use std::path::Path;

use common::{COMMS, Copied, Run, Tensor, Tensors, fmoe, listing, read, relative_l2};
use rstest::rstest;
use serde_json::Value;

/// Any golden case does here.
const CASE: &str = "qwen3_moe_norm";

fn run(options: &str) -> Run {
    Run::golden(CASE, Path::new("unset")).with(options)
}

#[rstest]
#[case::unknown_all2all(
    "--all2all deepep",
    &["deepep", "mori_high_throughput", "mori_low_latency", "allgather_reducescatter", "naive"]
)]
#[case::bare_mori("--all2all mori", &["mori_high_throughput", "mori_low_latency"])]
#[case::unknown_experts("--experts triton", &["triton", "aiter"])]
#[case::unknown_quant("--quant int4", &["int4", "fp8-block"])]
#[case::mpi("--ranks mpi", &["--ranks"])]
#[case::unknown_ranks("--ranks fibers", &["fibers", "threads"])]
#[case::unknown_sort("--sort-policy 2", &["--sort-policy", "auto", "single", "multi"])]
#[case::no_ranks("--ep-size 0", &["--ep-size 0"])]
#[case::negative_ranks("--ep-size=-1", &["-1"])]
#[case::too_many_ranks("--ep-size 100000", &["--ep-size 100000", "1024"])]
#[case::ranks_of_usize_max("--ep-size 18446744073709551615", &["--ep-size"])]
#[case::ranks_that_overflow("--ep-size 99999999999999999999", &["--ep-size"])]
#[case::nodes_that_do_not_divide("--ep-size 8 --gpus-per-node 3", &["--gpus-per-node 3", "--ep-size 8"])]
#[case::node_larger_than_group("--ep-size 8 --gpus-per-node 16", &["--gpus-per-node 16", "--ep-size 8"])]
#[case::empty_nodes("--gpus-per-node 0", &["--gpus-per-node 0"])]
#[case::local_over_ranks("--ep-size 2 --all2all local", &["local", "parallelism", "2 ranks"])]
#[case::unknown_option("--fast", &["--fast"])]
#[case::unknown_device("--device tpu", &["tpu", "host", "cuda"])]
#[case::no_driver_of_amd("--device hip", &["device", "no Hip device"])]
#[case::backend_of_the_host("--device cuda --all2all naive", &["unknown all2all backend", "naive", "local"])]
fn bad_arguments_are_refused(#[case] options: &str, #[case] words: &[&str]) {
    run(options).refused(2, words);
}

#[rstest]
#[case::out_of_range("mixtral", 2)]
#[case::huge("mixtral", 99_999_999_999)]
#[case::dense_by_step("qwen3_moe_sharded", 0)]
#[case::dense_by_first_k("deepseek_v3", 0)]
fn a_layer_without_experts_is_refused(#[case] case: &str, #[case] layer: usize) {
    let mut run = Run::golden(case, Path::new("unset"));
    run.options = vec!["--layer".into(), layer.to_string()];
    run.refused(2, &[&format!("layer {layer} is not an MoE layer")]);
}

#[rstest]
#[case("deepseek_v3_fp8_block", "fp8-ptpc", "fp8-block")]
#[case("deepseek_v3_fp8_block", "fp8-per-tensor", "fp8-block")]
#[case("deepseek_v3_fp8_ptpc_f32", "fp8-block", "fp8-ptpc")]
fn an_fp8_checkpoint_is_not_requantised(#[case] case: &str, #[case] quant: &str, #[case] stored: &str) {
    let run = Run::golden(case, Path::new("unset")).with(&format!("--quant {quant}"));
    run.refused(2, &["experts", quant, stored]);
}

#[test]
fn every_backend_runs_between_nodes() {
    let folder = tempfile::tempdir().unwrap();
    for comm in ["allgather_reducescatter", "naive", "mori_high_throughput", "mori_low_latency"] {
        let options = format!("--ep-size 8 --gpus-per-node 4 --all2all {comm} --verify --json");
        let report = Run { output: folder.path().join(comm), ..run(&options) }.run().succeeded().json();
        assert!(report["wire"]["internode_bytes"].as_u64().unwrap() > 0, "{report}");
    }
}

#[test]
fn outputs_come_back_in_fp8_if_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    for nodes in ["--ep-size 2", "--ep-size 4 --gpus-per-node 2"] {
        let combine = |quant: &str| {
            let options = format!("{nodes} --combine-quant {quant} --verify --json");
            let output = folder.path().join(quant);
            let report = Run { output: output.clone(), ..run(&options) }.run().succeeded().json();
            (report["wire"]["remote_bytes"].as_u64().unwrap(), std::fs::read(output).unwrap())
        };
        let ((bytes, exact), (fewer, rounded)) = (combine("none"), combine("fp8-block"));
        assert!(fewer < bytes && exact != rounded, "{nodes}: {fewer} of {bytes} bytes");
    }
    run("--ep-size 2 --combine-quant fp8-block --all2all naive").refused(2, &["naive", "combine quantised"]);
}

#[test]
fn every_sort_policy_gives_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["auto", "single", "multi"].map(|policy| {
        let output = folder.path().join(policy);
        let options = format!("--ep-size 2 --verify --sort-policy {policy}");
        Run { output: output.clone(), ..run(&options) }.run().succeeded();
        std::fs::read(output).unwrap()
    });
    assert!(files[0] == files[1] && files[0] == files[2]);
}

#[test]
fn more_ranks_than_experts_or_tokens_are_idle() {
    let folder = tempfile::tempdir().unwrap();
    for comm in COMMS {
        let options = format!("--ep-size 41 --verify --all2all {comm}");
        Run { output: folder.path().join(comm), ..run(&options) }.run().succeeded();
    }
}

#[rstest]
fn any_number_of_tokens_runs(
    #[values(0, 1, 5, 33)] tokens: usize,
    #[values("qwen2_moe", "deepseek_v3_fp8_block")] case: &str,
) {
    let copy = Copied::of(case);
    copy.edit_hidden(|x| {
        let hidden = x.shape[1];
        let values: Vec<f32> = x.values().into_iter().cycle().take(tokens * hidden).collect();
        *x = Tensor::bf16(&[tokens, hidden], values);
    });
    let mut over_one_rank = None;
    for (comm, ranks) in COMMS.into_iter().flat_map(|comm| [(comm, 1), (comm, 2), (comm, 8)]) {
        let run = copy.run().with(&format!("--ep-size {ranks} --all2all {comm} --verify"));
        run.run().succeeded();
        let out = read(&run.output);
        assert!(out.values().all(|tensor| tensor.shape[0] == tokens));
        let output = out["output"].values();
        let one = over_one_rank.get_or_insert_with(|| output.clone());
        assert!(relative_l2(&output, one) <= 1e-2, "{comm}, EP {ranks}");
    }
}

#[rstest]
#[case::missing_folder("nowhere/out.safetensors", "does not exist")]
#[case::folder("folder", "is a folder")]
#[case::folder_by_slash("new/", "is a folder")]
#[case::folder_of_folder("folder/..", "folder")]
#[case::root("/", "/")]
#[case::file_as_folder("file/out.safetensors", "does not exist")]
fn an_output_that_cannot_be_written_is_refused(#[case] output: &str, #[case] word: &str) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("folder")).unwrap();
    std::fs::write(folder.path().join("file"), "before").unwrap();
    Run { output: folder.path().join(output), ..run("") }.run().failed(2, &[word]);
    assert_eq!(listing(folder.path()), ["file", "folder"]);
    assert!(listing(&folder.path().join("folder")).is_empty());
}

#[cfg(unix)]
#[test]
fn a_device_is_not_replaced_by_a_file() {
    use std::os::unix::fs::FileTypeExt;
    Run { output: "/dev/null".into(), ..run("") }.run().failed(2, &["/dev/null", "not an ordinary file"]);
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
}

#[test]
fn an_existing_output_is_replaced_whole() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    std::fs::write(&output, vec![b'x'; 1 << 20]).unwrap();
    // Whoever still has the old file open keeps the old file: it is replaced, not overwritten.
    let old = folder.path().join("old");
    std::fs::hard_link(&output, &old).unwrap();
    Run { output: output.clone(), ..run("") }.run().succeeded();
    assert_eq!(read(&output).len(), 4);
    assert_eq!(std::fs::read(old).unwrap(), vec![b'x'; 1 << 20]);
    assert_eq!(listing(folder.path()), ["old", "out"]);
}

#[test]
fn the_input_may_be_the_output() {
    let copy = Copied::of(CASE);
    Run { output: copy.path("input.safetensors"), ..copy.run() }.run().succeeded();
    assert_eq!(read(&copy.path("input.safetensors")).len(), 4);
}

#[test]
fn odd_paths_work() {
    let copy = Copied::of(CASE);
    let name = "ein Ausgang, \u{fc}\u{1f980} '$(x)'.safetensors";
    std::fs::rename(copy.path("input.safetensors"), copy.path("--input")).unwrap();
    let run = Run { output: copy.path(name), input: copy.path("--input"), ..copy.run() };
    run.run().succeeded();
    assert_eq!(read(&copy.path(name)).len(), 4);
}

#[rstest]
fn json_is_one_object(#[values("", "--verify")] verify: &str, #[values(1, 8)] ranks: usize) {
    let folder = tempfile::tempdir().unwrap();
    for comm in COMMS {
        let options = format!("--json --ep-size {ranks} --all2all {comm} {verify}");
        let finished = Run { output: folder.path().join("out"), ..run(&options) }.run().succeeded();
        assert_eq!(finished.stderr, "", "a quiet run says nothing on stderr");
        let report = finished.json();
        assert_eq!(report["plan"]["all2all"], comm);
        assert_eq!(report["plan"]["experts"], if comm == "batched" { "batched" } else { "aiter" });
        for stage in ["router", "dispatch", "experts", "combine", "total"] {
            assert!(report["times_ms"][stage].as_f64().unwrap() > 0.0, "{stage}: {report}");
        }
        let wire = report["wire"]["remote_bytes"].as_u64().unwrap();
        assert_eq!(wire > 0, ranks > 1, "{report}");
        assert!(report["bytes_per_rank"]["total"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(report.get("verify").is_some(), !verify.is_empty(), "{report}");
        if let Some(verdict) = report.get("verify") {
            let error = verdict["output"].as_f64().unwrap();
            assert!(error > 0.0 && error <= verdict["tolerance"].as_f64().unwrap(), "{report}");
            let ratio = verdict["bound_ratio"].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&ratio), "{report}");
        }
        let rejected = report["rejected"].as_array().unwrap();
        // The experts of the other activation format never fit; of the others only `local` over several ranks.
        // FlashInfer's have limits of their own.
        let fits = |pair: &&Value| match pair["experts"].as_str().unwrap() {
            "aiter" => pair["all2all"] != "batched",
            "batched" => pair["all2all"] == "batched",
            _ => false,
        };
        let one_format: Vec<_> = rejected.iter().filter(fits).map(|pair| &pair["all2all"]).collect();
        assert_eq!(one_format, if ranks == 1 { vec![] } else { vec!["local"] }, "{report}");
        assert!(rejected.iter().all(has_reasons), "{report}");
    }
}

fn has_reasons(pair: &Value) -> bool {
    let reasons = pair["reasons"].as_array().unwrap();
    let whole = |reason: &Value| ["axis", "wanted", "found"].iter().all(|&key| reason[key] != "");
    !reasons.is_empty() && reasons.iter().all(whole)
}

#[test]
fn logs_do_not_reach_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run { output: folder.path().join("out"), ..run("--json --ep-size 2") };
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fmoe"));
    command.env("RUST_LOG", "trace").arg("run").arg("--checkpoint").arg(&run.checkpoint);
    command.arg("--input").arg(&run.input).arg("--output").arg(&run.output).args(&run.options);
    let finished = common::finish(&mut command).succeeded();
    assert!(finished.json().is_object());
    assert!(finished.stderr.contains("plan"), "{finished:?}");
}

/// The gate and up projections cancel to almost nothing, far below what f32 sums of their terms resolve: the layer
/// is noise, the f64 oracle is not, and `--verify` has to see it.
#[test]
fn verify_fails_where_the_numbers_are_wrong() {
    let copy = Copied::of("mixtral");
    copy.edit_tensors(|tensors| {
        for (name, weight) in tensors {
            if name.ends_with("w1.weight") || name.ends_with("w3.weight") {
                let width = weight.shape[1];
                let values = weight.values();
                let mirrored = (0..values.len()).map(|i| values[i - i % width + i % width % (width / 2)]);
                *weight = Tensor::bf16(&weight.shape, mirrored);
            }
        }
    });
    copy.edit_hidden(|x| {
        let (width, values) = (x.shape[1], x.values());
        let half = width / 2;
        let value = |i: usize| match i % width {
            0 => 1e-3,
            column if column == half => 0.0,
            column if column < half => 1e8 * values[i],
            _ => -1e8 * values[i - half],
        };
        *x = Tensor::bf16(&x.shape, (0..values.len()).map(value));
    });
    copy.run().with("--verify").refused(1, &["verification failed", "was not written"]);
    let finished = copy.run().with("--verify --json").run().failed(1, &["verification failed"]);
    let verdict = &finished.json()["verify"];
    let error = verdict["routed"].as_f64().unwrap_or(f64::INFINITY);
    assert!(error > verdict["tolerance"].as_f64().unwrap(), "{verdict}");
    // Without the check nobody knows.
    copy.run().run().succeeded();
}

#[test]
fn a_reader_that_stops_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let run = Run { output: output.clone(), ..run("--json") };
    let mut matrix = std::process::Command::new(env!("CARGO_BIN_EXE_fmoe"));
    matrix.args(["matrix", "--json"]);
    let mut layer = std::process::Command::new(env!("CARGO_BIN_EXE_fmoe"));
    layer.arg("run").arg("--checkpoint").arg(&run.checkpoint).arg("--input").arg(&run.input);
    layer.arg("--output").arg(&run.output).args(&run.options);
    for mut command in [matrix, layer] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let done = command.stdout(writer).stderr(std::process::Stdio::piped()).output().unwrap();
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    assert_eq!(read(&output).len(), 4);
}

#[cfg(target_os = "linux")]
#[test]
fn a_report_that_cannot_be_printed_leaves_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run { output: folder.path().join("out"), ..run("") };
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fmoe"));
    command.arg("run").arg("--checkpoint").arg(&run.checkpoint).arg("--input").arg(&run.input);
    command.arg("--output").arg(&run.output).args(&run.options);
    command.stdout(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let done = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write to stdout") && !stderr.contains("panicked"), "{stderr}");
    assert!(listing(folder.path()).is_empty());
}

#[test]
fn help_and_version_succeed() {
    for args in [&["--help"][..], &["--version"], &["run", "--help"], &["bench", "experts", "--help"]] {
        let finished = fmoe(args).succeeded();
        assert!(finished.stdout.contains("fmoe"), "{finished:?}");
    }
    fmoe([] as [&str; 0]).failed(2, &["Usage"]);
    fmoe(["bogus"]).failed(2, &["bogus"]);
}

#[test]
fn no_tensor_of_the_output_is_left_from_before() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    common::write(&output, &Tensors::from([("stale".into(), Tensor::f32(&[1], [1.0]))]));
    Run { output: output.clone(), ..run("") }.run().succeeded();
    assert!(!read(&output).contains_key("stale"));
}
