//! `fmoe tune`: the table that it writes is one that it reads.

mod common;

use common::fmoe;
use rstest::rstest;

#[test]
fn what_was_tuned_can_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("table.toml");
    let table = table.to_str().unwrap();
    let shape = ["--tokens", "4", "--reps", "1", "--quant", "none,fp8-block"];
    fmoe(["tune", "--shapes", "small", "--output", table].iter().chain(&shape)).succeeded();
    assert!(std::fs::read_to_string(table).unwrap().starts_with("cpu = "));
    fmoe(["bench", "experts", "--shape", "small", "--tuning", table].iter().chain(&shape)).succeeded();
}

#[rstest]
#[case::of_another_processor("cpu = \"Z80\"", "Z80")]
#[case::not_a_table("cpu = 3", "invalid type")]
#[case::an_unknown_key("cpu = \"\"\nfast = true", "fast")]
fn a_table_that_does_not_fit_is_refused(#[case] text: &str, #[case] word: &str) {
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("table.toml");
    std::fs::write(&table, text).unwrap();
    let args = ["bench", "experts", "--shape", "small", "--tuning", table.to_str().unwrap()];
    fmoe(args.iter()).failed(2, &[word]);
}

#[rstest]
#[case(&["--reps", "0"], "--reps 0")]
#[case(&["--shapes", "nowhere"], "nowhere")]
#[case(&["--shapes", "small", "--quant", "mxfp4"], "none and fp8-block are tuned")]
#[case(&["--shapes", "small", "--tokens", "0"], "0 tokens")]
fn bad_arguments_are_refused(#[case] args: &[&str], #[case] word: &str) {
    fmoe(["tune"].iter().chain(args)).failed(2, &[word]);
}
