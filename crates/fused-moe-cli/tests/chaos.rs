//! `fmoe chaos` on real faults, and on ranks that misbehave on purpose.

mod common;

use common::{Finished, fmoe};
use rstest::rstest;
use serde_json::Value;

fn chaos(options: &str) -> Finished {
    fmoe(["chaos", "--json"].into_iter().chain(options.split_whitespace()))
}

fn sum(counts: &Value) -> u64 {
    counts.as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
}

#[rstest]
fn ranks_that_are_lost_or_late_do_no_harm(#[values(2, 4)] ranks: u64) {
    let report = chaos(&format!("--rounds 30 --ep-size {ranks} --timeout-ms 2000")).succeeded().json();
    println!("{report}");
    assert_eq!(report["clean"], true);
    assert_eq!((&report["rounds"], sum(&report["faults"])), (&30.into(), 30));
    let lost: Vec<&String> = report["faults"].as_object().unwrap().keys().collect();
    assert!(lost.len() > 3, "too few kinds of faults: {lost:?}");
    // Every rank that was not lost has said how its call ended, in the smaller groups too.
    let outcomes = &report["outcomes"];
    assert!(outcomes["right"].as_u64().unwrap() >= 30, "{outcomes}");
    assert!(outcomes["PeerLost"].as_u64().unwrap() > 0, "{outcomes}");
    assert!(sum(&report["after_loss"]) > 0 && report["respawned"].as_u64().unwrap() > 0, "{report}");
    assert!(report["memory"]["largest_bytes"].as_u64().unwrap() > 1 << 20, "{report}");
}

#[rstest]
#[case("wrong", "wrong", 1500)]
// What hangs is waited for, so the timeout is short; what else may be late then does not matter.
#[case("hang", "hangs", 300)]
fn a_rank_that_misbehaves_is_found_out(#[case] how: &str, #[case] count: &str, #[case] timeout: u32) {
    let options = format!("--rounds 8 --ep-size 2 --faults delay --sabotage {how} --timeout-ms {timeout}");
    let report = chaos(&options).failed(1, &["--seed"]).json();
    assert_eq!(report["clean"], false);
    assert!(report[count].as_u64().unwrap() >= 1, "{report}");
    assert!(report["complaints"].to_string().contains("seat 0"), "{report}");
}

#[test]
fn what_a_rank_keeps_is_found_out() {
    let options = "--rounds 20 --ep-size 2 --faults delay --sabotage leak --timeout-ms 1500";
    let report = chaos(options).failed(1, &["descriptors_of_ranks"]).json();
    assert!(report["leftovers"]["descriptors_of_ranks"].as_u64().unwrap() >= 1, "{report}");
}

#[rstest]
#[case("--ep-size 1", "--ep-size 1")]
#[case("--ep-size 17", "--ep-size 17")]
#[case("--rounds 0", "--rounds")]
#[case("--timeout-ms 0", "--timeout-ms")]
#[case("--faults fire", "fire")]
fn bad_arguments_are_refused(#[case] options: &str, #[case] word: &str) {
    chaos(options).failed(2, &[word]);
}
