//! `fmoe plan --machine` and `--published`: sizes, prices, and who is the fastest where.

mod common;

use common::{fmoe, golden};
use rstest::rstest;
use serde_json::Value;

fn projection(options: &str) -> Value {
    let args = format!("plan --machine {options} --json");
    fmoe(args.split_whitespace()).succeeded().json()
}

fn row<'v>(report: &'v Value, ep: u64, tokens: u64, all2all: &str) -> &'v Value {
    let rows = report["rows"].as_array().unwrap();
    let is_it = |row: &&Value| row["ep_size"] == ep && row["tokens"] == tokens && row["all2all"] == all2all;
    rows.iter().find(is_it).unwrap_or_else(|| panic!("no EP{ep}, {tokens} tokens, {all2all}: {report}"))
}

#[test]
fn sizes_double_up_to_the_last() {
    let report = projection("mi300x --ep 8..320 --tokens 128");
    let mut sizes: Vec<u64> =
        report["rows"].as_array().unwrap().iter().map(|row| row["ep_size"].as_u64().unwrap()).collect();
    sizes.dedup();
    assert_eq!(sizes, [8, 16, 32, 64, 128, 256, 320]);
    assert_eq!(report["groups"], serde_json::json!([8, 4]));
    // Between nodes there is something on the network, inside there is not.
    for all2all in common::COMMS {
        let network = |ep| row(&report, ep, 128, all2all)["dispatch_bytes"]["network"].as_f64().unwrap();
        assert_eq!(network(8), 0.0);
        assert!(network(16) > 0.0, "{all2all}");
    }
    assert!(row(&report, 8, 128, "mori_high_throughput")["buffer_bytes"].as_u64().unwrap() > 1 << 20);
}

/// MoRI's tables on MI355X: low latency wins dispatch up to some 1250 tokens and combine up to 1450.
#[test]
fn low_latency_wins_up_to_where_its_tables_cross() {
    let report = projection("mi355x --ep 16 --routing uniform --tokens 64,1000,2000");
    let total = |tokens, all2all| row(&report, 16, tokens, all2all)["total_us"].as_f64().unwrap();
    for (tokens, wins) in [(64, true), (1000, true), (2000, false)] {
        let (low, high) = (total(tokens, "mori_low_latency"), total(tokens, "mori_high_throughput"));
        assert_eq!(low < high, wins, "{tokens} tokens: {low}, {high}");
    }
    let high: Vec<&Value> = report["fastest"].as_array().unwrap().iter().collect();
    let last = high.last().unwrap();
    assert_eq!(last["all2all"], "mori_high_throughput");
    let from = last["from_tokens"].as_u64().unwrap();
    assert!((1250..1450).contains(&from), "{from}");
}

#[test]
fn a_launch_names_its_row() {
    let launch = |machine: &str, quant: &str| {
        let report = projection(&format!("{machine} --ep 16 --tokens 100 --quant {quant}"));
        row(&report, 16, 100, "mori_high_throughput")["launches"][0].clone()
    };
    let measured = launch("mi355x", "fp8-block");
    assert_eq!(measured["source"], "gfx950.csv: InterNodeV1 dispatch fp8 7168 top-* 128 tokens");
    assert_eq!((&measured["block_num"], &measured["rdma_block_num"]), (&64.into(), &32.into()));
    assert_eq!(launch("h100", "none")["source"], "heuristic");
    let text = fmoe(["plan", "--machine", "mi355x", "--ep", "8,16"]).succeeded().stdout;
    for word in ["gfx950.csv: InterNodeV1LL combine bf16", "up to 2048 tokens per rank (measured)"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn a_wider_wire_and_uniform_routing_cost_more() {
    let dispatch = |options: &str| {
        let report = projection(&format!("h200 --ep 8 --tokens 4096 {options}"));
        row(&report, 8, 4096, "mori_high_throughput")["dispatch_us"].as_f64().unwrap()
    };
    let combine = |options: &str| {
        let report = projection(&format!("h200 --ep 8 --tokens 4096 {options}"));
        row(&report, 8, 4096, "mori_high_throughput")["combine_us"].as_f64().unwrap()
    };
    let (wide, narrow) = (combine(""), combine("--combine-quant fp8-block"));
    assert!(wide > 1.7 * narrow && wide < 2.0 * narrow, "{wide}, {narrow}");
    let (fp8, bf16, uniform) = (dispatch(""), dispatch("--quant none"), dispatch("--routing uniform"));
    assert!(bf16 > 1.7 * fp8 && bf16 < 2.0 * fp8, "{fp8}, {bf16}");
    assert!(uniform > 1.35 * fp8 && uniform < 1.46 * fp8, "{fp8}, {uniform}");
}

#[test]
fn a_checkpoint_gives_the_sizes() {
    let folder = golden("qwen2_moe");
    let options = format!("h100 --ep 2,4 --checkpoint {}", folder.display());
    let report = projection(&options);
    assert_ne!(report["hidden"], 7168, "{report}");
    assert_eq!(report["groups"], Value::Null);
}

#[rstest]
#[case("--machine mi300", "unknown machine")]
#[case("--machine mi300x --ep 1..8", "at least 2")]
#[case("--machine mi300x --ep 16..8", "16 is more than 8")]
#[case("--machine mi300x --ep eight", "eight")]
#[case("--machine mi300x --ep 12", "--gpus-per-node 8 does not divide 12 ranks")]
#[case("--machine mi300x --tokens 0", "--tokens 0")]
#[case("--machine mi300x --ep-size 8", "--ep-size")]
#[case("--machine mi300x --all2all naive", "--all2all")]
#[case("--machine mi300x --max-tokens 8", "--max-tokens")]
#[case("--ep 8..16", "--machine")]
#[case("--published --machine mi300x", "--published")]
fn what_has_no_price_is_refused(#[case] options: &str, #[case] word: &str) {
    fmoe(std::iter::once("plan").chain(options.split_whitespace())).failed(2, &[word]);
}

#[test]
fn published_figures_stand_beside_the_model() {
    let report = fmoe(["plan", "--published", "--json"]).succeeded().json();
    let figures = report["figures"].as_array().unwrap();
    let of = |role: &str| figures.iter().filter(|figure| figure["role"] == role).count();
    assert!(of("predicted") > 3 * of("fitted") && of("missed") > 0, "{report}");
    let shares: Vec<f64> = report["vllm_28664"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| g["share_of_gain"][1].as_f64().unwrap())
        .collect();
    assert!(shares[0] > 0.95 && shares[1] < 0.75, "{shares:?}");
    let text = fmoe(["plan", "--published"]).succeeded().stdout;
    for word in ["DeepEP V1", "missed", "vLLM PR 28664, EP16"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}
