//! Loads are recorded, placements proposed, and layers run with them: the outputs stay, the load moves.

mod common;

use std::path::{Path, PathBuf};

use common::{COMMS, Finished, Run, fmoe, golden, listing, manifest_entry, read, relative_l2};
use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Of `qwen3_moe_norm`.
const EXPERTS: usize = 12;

/// A folder for the files of a test.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &Value) -> String {
        std::fs::write(self.path(name), content.to_string()).unwrap();
        self.text(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// `fmoe eplb` with `options`, separated by spaces.
    fn eplb(&self, options: &str) -> Finished {
        fmoe(["eplb"].into_iter().chain(options.split_whitespace()))
    }

    fn run(&self, case: &str, options: &str) -> Run {
        Run::golden(case, &self.path("out.safetensors")).with(options)
    }
}

fn loads(num_experts: usize, layers: &[(usize, &[u64])]) -> Value {
    let layers: Vec<Value> =
        layers.iter().map(|(layer, load)| json!({"layer": layer, "steps": [load]})).collect();
    json!({"version": 1, "num_experts": num_experts, "layers": layers})
}

#[rstest]
fn a_layer_runs_with_what_is_proposed_for_its_load(
    #[values("qwen3_moe_norm", "deepseek_v3_fp8_block", "qwen2_moe")] case: &str,
    #[values(2, 4)] ranks: usize,
) {
    let files = Files::new();
    let (load, placement) = (files.text("load.json"), files.text("placement.json"));
    let plain = files.run(case, &format!("--ep-size {ranks} --record-load {load} --json")).run().succeeded();
    let plain_out = read(&files.path("out.safetensors"));

    let recorded = files.json("load.json");
    let layer = manifest_entry(case)["layer"].as_u64().unwrap();
    assert_eq!(recorded["layers"][0]["layer"], layer);
    let mut counts = vec![0; recorded["num_experts"].as_u64().unwrap() as usize];
    plain_out["topk_ids"].ids().iter().for_each(|&id| counts[id as usize] += 1);
    assert_eq!(recorded["layers"][0]["steps"], json!([counts]));
    let per_rank: f64 =
        plain.json()["load"]["per_rank"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).sum();
    assert_eq!(per_rank as u64, counts.iter().sum::<u64>());

    let options = format!("--load {load} --ranks {ranks} --output {placement} --json");
    let proposal = files.eplb(&options).succeeded().json();
    let of = |when: &str| proposal["layers"][0][when]["max_over_mean"].as_f64().unwrap();
    assert!(of("after") <= of("before"), "{proposal}");
    assert_eq!(files.json("placement.json")["layers"][0]["layer"], layer);

    for comm in COMMS {
        let options = format!(
            "--ep-size {ranks} --all2all {comm} --placement {placement} --record-load {load} --verify --json"
        );
        let report = files.run(case, &options).run().succeeded().json();
        assert_eq!(report["verify"]["passes"], true, "{comm}");
        // The router knows nothing of replicas: ids and loads are those of logical experts.
        let out = read(&files.path("out.safetensors"));
        assert_eq!(out["topk_ids"], plain_out["topk_ids"], "{comm}");
        assert_eq!(out["topk_weights"], plain_out["topk_weights"], "{comm}");
        assert_eq!(files.json("load.json"), recorded, "{comm}");
        let far = relative_l2(&out["output"].values(), &plain_out["output"].values());
        assert!(far <= 2e-2, "{comm}: {far}");
    }
}

#[rstest]
fn scales_per_tensor_follow_the_replicas(#[values("mori_high_throughput", "naive")] comm: &str) {
    let files = Files::new();
    let slots: Vec<usize> = (0..16).map(|slot| slot * 5 % EXPERTS).collect();
    let placement = placed("qwen3_moe_norm", 4, &slots);
    let placement = files.write("placement.json", &placement);
    let options =
        format!("--ep-size 4 --all2all {comm} --quant fp8-per-tensor --placement {placement} --verify");
    files.run("qwen3_moe_norm", &options).run().succeeded();
}

#[test]
fn a_plan_is_made_for_a_placement() {
    let files = Files::new();
    let slots: Vec<usize> = (0..16).map(|slot| slot * 5 % EXPERTS).collect();
    let placement = files.write("placement.json", &placed("qwen3_moe_norm", 4, &slots));
    let plan = |ranks: &str, options: &[&str]| {
        let checkpoint = golden("qwen3_moe_norm").display().to_string();
        fmoe(["plan", "--json", "--checkpoint", &checkpoint, "--ep-size", ranks].iter().chain(options))
    };
    let reasons = |report: &Value| report["rejected"].to_string();
    assert!(!reasons(&plan("4", &[]).succeeded().json()).contains("redundant"));
    let placed = plan("4", &["--placement", &placement]).succeeded().json();
    assert!(reasons(&placed).contains("redundant"), "{placed}");
    plan("2", &["--placement", &placement]).failed(2, &["it is for 4 ranks, --ep-size is 2"]);
}

/// A placement of the case's layer.
fn placed(case: &str, ranks: usize, slots: &[usize]) -> Value {
    json!({
        "version": 1,
        "num_experts": EXPERTS,
        "ranks": ranks,
        "slots_per_rank": slots.len() / ranks,
        "layers": [{"layer": manifest_entry(case)["layer"], "physical_to_logical": slots}],
    })
}

#[test]
fn loads_of_several_files_are_added_up() {
    let files = Files::new();
    let first = files.write("a.json", &loads(4, &[(0, &[10, 10, 10, 10]), (3, &[0, 0, 0, 9])]));
    let second = files.write("b.json", &loads(4, &[(0, &[0, 0, 0, 60])]));
    let options = format!("--load {first} --load {second} --ranks 2 --slots 3 --json");
    let report = files.eplb(&options).succeeded().json();
    assert_eq!(report["layers"][0]["before"]["per_rank"], json!([20.0, 80.0]));
    assert_eq!(report["layers"][0]["after"]["per_rank"], json!([50.0, 50.0]));
    assert_eq!(report["layers"][0]["method"], "greedy");
    assert_eq!(report["layers"][1]["layer"], 3);
    let text = files.eplb(&format!("--load {first} --ranks 2 --slots 3")).succeeded().stdout;
    assert!(text.contains("4 experts and 2 replicas in 3 slots on each of 2 ranks"), "{text}");
}

#[test]
fn groups_stay_on_nodes_or_the_reason_is_told() {
    let files = Files::new();
    let mut recorded = loads(8, &[(0, &[9, 1, 1, 1, 8, 1, 1, 1])]);
    recorded["groups"] = json!(4);
    let load = files.write("load.json", &recorded);
    let report = files.eplb(&format!("--load {load} --ranks 4 --nodes 2 --json")).succeeded().json();
    let layer = &report["layers"][0];
    assert_eq!((&layer["method"], &layer["fallback"]), (&json!("hierarchical"), &json!([])));
    let text = files.eplb(&format!("--load {load} --ranks 4 --nodes 2 --groups 1")).succeeded().stdout;
    assert!(text.contains("not hierarchical: 1 expert groups do not divide over 2 nodes"), "{text}");
    let options = format!("--load {load} --ranks 4 --nodes 2 --strategy greedy --json");
    assert_eq!(files.eplb(&options).succeeded().json()["layers"][0]["fallback"], json!([]));
}

#[rstest]
#[case::no_ranks("--ranks 0", &["--ranks 0"])]
#[case::every_reason("--ranks 0 --nodes 0 --groups 0", &["--ranks 0", "--nodes 0", "--groups 0"])]
#[case::too_many_ranks("--ranks 5000", &["--ranks 5000", "4096"])]
#[case::too_few_slots("--ranks 2 --slots 1", &["--slots 1", "4 experts"])]
#[case::too_many_slots("--ranks 2 --slots 5", &["--slots 5", "every expert"])]
#[case::unknown_strategy("--ranks 2 --strategy random", &["random", "hierarchical"])]
#[case::nowhere("--ranks 2 --output nowhere/at/all.json", &["nowhere/at/all.json", "does not exist"])]
fn bad_proposals_are_refused(#[case] options: &str, #[case] words: &[&str]) {
    let files = Files::new();
    let load = files.write("load.json", &loads(4, &[(0, &[1, 2, 3, 4])]));
    files.eplb(&format!("--load {load} {options}")).failed(2, words);
}

#[rstest]
#[case::missing(None, &["cannot read", "load.json"])]
#[case::not_json(Some("{"), &["load.json", "EOF"])]
#[case::not_a_load(Some("{}"), &["load.json", "version"])]
#[case::unknown_field(
    Some(r#"{"version": 1, "num_experts": 1, "layers": [{"layer": 0, "steps": [[1]], "unit": "ms"}]}"#), &["unit"]
)]
#[case::negative(
    Some(r#"{"version": 1, "num_experts": 1, "layers": [{"layer": 0, "steps": [[-1]]}]}"#), &["-1"]
)]
#[case::every_reason(
    Some(r#"{"version": 2, "num_experts": 0, "groups": 0,
             "layers": [{"layer": 7, "steps": []}, {"layer": 7, "steps": [[1]]}]}"#),
    &["version is 2", "num_experts is 0", "groups is 0", "layer 7 has no steps", "layer 7 is there twice",
      "step 0 of layer 7 is of 1 experts"]
)]
#[case::nothing(Some(r#"{"version": 1, "num_experts": 3, "layers": []}"#), &["there are no layers"])]
#[case::overflow(
    Some(r#"{"version": 1, "num_experts": 1, "layers": [{"layer": 0, "steps": [[18446744073709551615], [1]]}]}"#),
    &["expert 0 of layer 0", "2^64"]
)]
fn bad_loads_are_refused(#[case] content: Option<&str>, #[case] words: &[&str]) {
    let files = Files::new();
    if let Some(content) = content {
        std::fs::write(files.path("load.json"), content).unwrap();
    }
    let (load, output) = (files.text("load.json"), files.text("placement.json"));
    files.eplb(&format!("--load {load} --ranks 2 --output {output}")).failed(2, words);
    assert!(!Path::new(&output).exists());
}

#[test]
fn loads_of_two_models_are_refused() {
    let files = Files::new();
    let first = files.write("a.json", &loads(4, &[(0, &[1; 4])]));
    let second = files.write("b.json", &loads(5, &[(0, &[1; 5])]));
    let options = format!("--load {first} --load {second} --ranks 2");
    files.eplb(&options).failed(2, &["a.json is of 4 experts in no groups", "b.json of 5 experts"]);
}

#[test]
fn placements_that_do_not_fit_are_refused() {
    let files = Files::new();
    let case = "qwen3_moe_norm";
    let whole: Vec<usize> = (0..EXPERTS).collect();
    let refused = |content: &Value, words: &[&str]| {
        let (placement, load) = (files.write("placement.json", content), files.text("load.json"));
        let options = format!("--ep-size 2 --placement {placement} --record-load {load}");
        files.run(case, &options).refused(2, words);
        assert!(!Path::new(&load).exists());
    };
    let fits = placed(case, 2, &whole);
    let (mut other_size, mut other_layer) = (fits.clone(), fits.clone());
    (other_size["ranks"], other_size["slots_per_rank"]) = (json!(1), json!(EXPERTS));
    refused(&other_size, &["it is for 1 ranks, --ep-size is 2"]);
    other_layer["layers"][0]["layer"] = json!(77);
    refused(&other_layer, &["it places layers 77, not"]);
    (other_layer["ranks"], other_layer["slots_per_rank"]) = (json!(1), json!(EXPERTS));
    refused(&other_layer, &["it places layers 77, not", "it is for 1 ranks"]);
    let mut twice = whole.clone();
    twice[0] = 1;
    refused(&placed(case, 2, &twice), &["expert 0 is in none of"]);
    let mut unknown = whole;
    unknown[1] = EXPERTS;
    refused(&placed(case, 2, &unknown), &["slot 1 holds expert"]);
    let mut short = fits.clone();
    short["slots_per_rank"] = json!(1);
    refused(&short, &["2 ranks with 1 slots each have others"]);
    refused(&json!([]), &["placement.json"]);
}

#[test]
fn a_load_is_recorded_whole_or_not_at_all() {
    let files = Files::new();
    let load = files.text("load.json");
    let same = files.path("out.safetensors").display().to_string();
    files.run("qwen3_moe_norm", &format!("--record-load {same}")).run().failed(2, &["--record-load"]);
    files.run("qwen3_moe_norm", "--record-load nowhere/load.json").run().failed(2, &["does not exist"]);
    assert_eq!(listing(files.0.path()), Vec::<String>::new());
    files.run("qwen3_moe_norm", &format!("--record-load {load}")).run().succeeded();
    assert_eq!(listing(files.0.path()), ["load.json", "out.safetensors"]);
}
