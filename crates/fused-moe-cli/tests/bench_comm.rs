//! `fmoe bench comm`: what it counts is what backends say, over threads and processes; bad sizes are refused.

mod common;

use common::fmoe;
use rstest::rstest;
use serde_json::Value;

/// Small enough for a busy machine, large enough for every backend.
const SMALL: &str = "bench comm --hidden 256 --experts 16 --top-k 4 --tokens 3 --quant none --reps 1 --json";

fn bench(options: &str) -> Value {
    fmoe(format!("{SMALL} {options}").split_whitespace()).succeeded().json()
}

fn row<'v>(report: &'v Value, all2all: &str) -> &'v Value {
    let rows = report["rows"].as_array().unwrap();
    rows.iter().find(|row| row["all2all"] == all2all).unwrap_or_else(|| panic!("no {all2all}: {report}"))
}

#[rstest]
fn every_backend_is_measured(#[values("threads", "processes")] ranks: &str) {
    let report = bench(&format!("--ep-size 2 --routing uniform --ranks {ranks}"));
    for all2all in common::COMMS {
        let row = row(&report, all2all);
        assert_eq!(row["substrate"], ranks);
        assert!(row["copy_gb_s"].as_f64().unwrap() > 0.0, "{row}");
        for half in ["dispatch", "combine"] {
            assert!(row[half]["us"].as_f64().unwrap() > 0.0, "{row}");
            assert!(row[half]["remote_bytes"].as_u64().unwrap() > 0, "{row}");
            assert_eq!(row[half]["internode_bytes"], 0, "{row}");
        }
    }
    // Everything to everyone: 3 tokens of 2 ranks, with 4 ids and 4 weights, and their sums back; naive sends sums twice.
    let bytes = |all2all: &str, half: &str| row(&report, all2all)[half]["remote_bytes"].as_u64().unwrap();
    assert_eq!(bytes("allgather_reducescatter", "dispatch"), 6 * (512 + 32));
    assert_eq!(bytes("allgather_reducescatter", "combine"), 6 * 512);
    assert_eq!(bytes("naive", "combine"), 2 * 6 * 512);
    assert!(bytes("mori_high_throughput", "combine") <= 6 * 512);
    assert!(report["copy"]["hot_gb_s"][0].as_f64().unwrap() > 0.0, "{report}");
    let refused = report["refused"].as_array().unwrap();
    assert!(refused.iter().any(|refused| refused["all2all"] == "local"), "{report}");
}

/// Over 8 ranks, one copy per (token, rank) of 256 experts is 1.51 times fewer bytes than all to all, and 2.20 times
/// fewer where 4 of 8 groups are allowed, up to what rides along and to chance.
#[rstest]
#[case("uniform", 1.51)]
#[case("group-limited", 2.20)]
fn one_copy_per_rank_is_fewer_bytes(#[case] routing: &str, #[case] limit: f64) {
    let options = "--hidden 1024 --experts 256 --top-k 8 --tokens 64 --quant fp8-block --reps 1 --json";
    let backends = "--ep-size 8 --all2all mori_high_throughput,allgather_reducescatter,naive";
    let args = format!("bench comm {options} {backends} --ranks threads --routing {routing}");
    let report = fmoe(args.split_whitespace()).succeeded().json();
    let ratios = report["ratios"].as_array().unwrap();
    let against = |other: &str| {
        let ratio = ratios.iter().find(|ratio| ratio["against"] == other).unwrap();
        ratio["fewer_bytes"].as_f64().unwrap()
    };
    let gathered = against("allgather_reducescatter");
    assert!(gathered > 0.93 * limit && gathered < 1.05 * limit, "{gathered}, at most {limit}");
    assert!(against("naive") > 1.5 * gathered, "{report}");
}

/// Over two nodes of two ranks: what the transport counts is what `fmoe plan --machine` charges for, up to chance. The
/// backends that gather send to every rank by themselves here, and over rails there.
#[test]
fn what_is_counted_is_what_a_machine_is_charged_for() {
    let sizes = "--gpus-per-node 2 --tokens 64 --routing uniform --json";
    let args = format!("bench comm --ranks threads --ep-size 4 --quant fp8-block --reps 1 {sizes}");
    let counted = fmoe(args.split_whitespace()).succeeded().json();
    let args = format!("plan --machine mi300x --ep 4 {sizes}");
    let charged = fmoe(args.split_whitespace()).succeeded().json();
    for all2all in ["mori_high_throughput", "mori_low_latency", "batched"] {
        for half in ["dispatch", "combine"] {
            let counted = &row(&counted, all2all)[half];
            let [remote, network] =
                ["remote_bytes", "internode_bytes"].map(|key| counted[key].as_f64().unwrap());
            let charged = &row(&charged, all2all)[&format!("{half}_bytes")];
            let [scale_up_of_rank, network_of_rank] =
                ["scale_up", "network"].map(|link| charged[link].as_f64().unwrap());
            for (got, of_rank) in [(network, network_of_rank), (remote - network, scale_up_of_rank)] {
                let ratio = got / (4.0 * of_rank);
                assert!((ratio - 1.0).abs() < 0.06, "{all2all} {half}: {counted}, {charged}");
            }
        }
    }
}

#[test]
fn more_ranks_are_compared_at_the_same_number_of_tokens() {
    let args = "bench comm --hidden 256 --experts 16 --top-k 4 --quant none --reps 1 --json --routing uniform \
                --ep-size 2,4 --total-tokens 8 --all2all naive --csv";
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("rows.csv");
    let args = args.split_whitespace().map(std::ffi::OsString::from).chain([csv.clone().into()]);
    let report = fmoe(args).succeeded().json();
    assert_eq!(report["crowding"][0]["tokens"], 8, "{report}");
    assert!(report["crowding"][0]["times_the_time"].as_f64().unwrap() > 0.0, "{report}");
    let csv = std::fs::read_to_string(csv).unwrap();
    let columns: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
    // Two groups, of threads and of processes, and a header.
    assert_eq!(columns, [columns[0]; 5], "{csv}");
}

#[test]
fn what_does_not_fit_is_refused_with_the_size() {
    let report = bench("--ep-size 2 --max-gib 0.00001 --routing uniform");
    assert_eq!(report["rows"], Value::Array(Vec::new()));
    let reason = report["refused"][1]["reasons"][0].as_str().unwrap();
    assert!(reason.contains("--max-gib"), "{reason}");
}

#[rstest]
#[case("--ranks mpi", "mpi")]
#[case("--reps 0", "--reps 0")]
#[case("--ep-size 0", "--ep-size 0")]
#[case("--ep-size 8 --gpus-per-node 3", "--gpus-per-node 3 does not divide 8 ranks")]
#[case("--all2all mori", "mori_high_throughput")]
#[case("--tokens 0", "0 tokens")]
#[case("--top-k 300", "--top-k 300")]
#[case("--hidden 0", "--hidden 0")]
#[case("--routing model --experts 12 --top-k 4", "group-limited")]
fn what_cannot_be_measured_is_refused(#[case] options: &str, #[case] word: &str) {
    let args = ["bench", "comm"].into_iter().chain(options.split_whitespace());
    fmoe(args).failed(2, &[word]);
}
