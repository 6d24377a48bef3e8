//! `fuzz`: builds the targets of `fuzz/` and lets libFuzzer run them for a while.
//!
//! What cargo-fuzz does, with nothing to install: its flags, on the toolchain that is there. Instrumentation is a stable
//! option of the compiler; AddressSanitizer is not, hence `RUSTC_BOOTSTRAP`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::repo::Repo;
use crate::sanitizer::{Missing, Sanitizer};

/// All targets: the binaries of `fuzz/`.
pub const TARGETS: [&str; 3] = ["checkpoint", "sorting", "routing"];

/// As cargo-fuzz sets them: coverage with counters, the table of locations and operands of comparisons.
const COVERAGE: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// What `cargo xtask fuzz` was asked for.
pub struct Fuzz {
    /// The targets; all if there are none.
    pub targets: Vec<String>,
    /// How long each target runs.
    pub seconds: u64,
    /// Targets that run at the same time.
    pub jobs: usize,
    /// Print one JSON object instead of a table.
    pub json: bool,
}

/// Builds and runs the targets. The corpus that they find stays in `target/fuzz/corpus`, and is where the next run starts.
pub fn fuzz(repo: &Repo, wanted: &Fuzz) -> Result<()> {
    let targets: Vec<&str> = match &wanted.targets[..] {
        [] => TARGETS.to_vec(),
        names => names.iter().map(String::as_str).collect(),
    };
    if let Some(unknown) = targets.iter().find(|target| !TARGETS.contains(target)) {
        bail!("no fuzz target {unknown}; there are {}", TARGETS.join(", "));
    }
    ensure!(wanted.jobs > 0, "--jobs is 0");
    let binaries = build(repo)?;
    let queue = Mutex::new(targets.iter());
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..wanted.jobs.min(targets.len()) {
            scope.spawn(|| {
                while let Some(target) = { queue.lock().map(|mut queue| queue.next()).ok().flatten() } {
                    let result = run(repo, &binaries, target, wanted.seconds);
                    if let Ok(mut results) = results.lock() {
                        results.push(result);
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_default().into_iter().collect::<Result<Vec<_>>>()?;
    report(&results, wanted.json);
    match results.iter().filter(|result| result.failure.is_some()).count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} fuzz targets found something", results.len()),
    }
}

/// Builds the targets and returns the folder that they are in.
fn build(repo: &Repo) -> Result<PathBuf> {
    let sanitizer = Sanitizer::address(repo)?;
    let cxx = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let has_cxx = Command::new(&cxx).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !has_cxx.is_ok_and(|status| status.success()) {
        let why = format!("no {cxx}: libFuzzer is C++, `apt-get install g++` or its like");
        return Err(Missing::new(why).into());
    }
    let dir = repo.root().join("target/fuzz");
    let mut cargo = repo.cargo();
    cargo.args(["build", "--release", "--bins", "--manifest-path", "fuzz/Cargo.toml"]);
    sanitizer.apply(&mut cargo, COVERAGE);
    cargo.arg("--target-dir").arg(&dir);
    let status = cargo.status().with_context(|| format!("starting {cargo:?}"))?;
    ensure!(status.success(), "{cargo:?} ended with {status}");
    Ok(dir.join(sanitizer.target()).join("release"))
}

/// What came of one target.
struct Outcome {
    target: String,
    /// As libFuzzer prints them at the end.
    executions: u64,
    per_second: u64,
    /// Locations of the code that were reached.
    coverage: u64,
    peak_mb: u64,
    /// Why it ended early, and the input that did it.
    failure: Option<String>,
}

fn run(repo: &Repo, binaries: &Path, target: &str, seconds: u64) -> Result<Outcome> {
    let root = repo.root();
    let (corpus, logs) = (root.join("target/fuzz/corpus").join(target), root.join("target/fuzz/logs"));
    let artifacts = root.join("fuzz/artifacts").join(target);
    // Inputs become files, in memory where the system has such a place.
    let memory = Path::new("/dev/shm");
    let scratch = if memory.is_dir() { memory.to_owned() } else { root.join("target/fuzz") };
    let scratch = scratch.join(format!("moe-fuzz-{}-{target}", std::process::id()));
    for dir in [&corpus, &logs, &artifacts, &scratch] {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let log_path = logs.join(format!("{target}.log"));
    let log = File::create(&log_path).with_context(|| format!("writing {}", log_path.display()))?;
    let mut command = Command::new(binaries.join(target));
    command
        .arg(format!("-max_total_time={seconds}"))
        // An input that takes seconds, or memory out of proportion, is a finding.
        .args(["-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=256", "-max_len=16384"])
        .args(["-print_final_stats=1", "-detect_leaks=0"])
        .arg(format!("-artifact_prefix={}/", artifacts.display()));
    let words = root.join("fuzz/dictionaries").join(format!("{target}.dict"));
    if words.exists() {
        command.arg(format!("-dict={}", words.display()));
    }
    // New inputs are written to the first folder only.
    command.arg(&corpus).arg(root.join("fuzz/corpus").join(target));
    command.current_dir(root).env("TMPDIR", &scratch).stdout(Stdio::null()).stderr(log);
    eprintln!("==> fuzz {target} for {seconds} s, log {}", repo.relative(&log_path).display());
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    // The program leaves by `_exit` and cleans nothing up.
    fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    let log = String::from_utf8_lossy(&fs::read(&log_path).context("reading the log")?).into_owned();
    let failure =
        (!status.success()).then(|| format!("{target}: {status}\n{}", telling_lines(&log).join("\n")));
    Ok(Outcome::read(target, &log, failure))
}

/// The lines of libFuzzer's log that say what was found, and where the input lies.
fn telling_lines(log: &str) -> Vec<&str> {
    let mut after_panic = false;
    let is_telling = |line: &&str| {
        let message = std::mem::replace(&mut after_panic, line.contains(" panicked at "));
        let ours = line.contains("/crates/") || line.contains("/fuzz/src/");
        message
            || after_panic
            || ours && line.trim_start().starts_with('#')
            || ["==", "SUMMARY:", "artifact_prefix="].iter().any(|start| line.starts_with(start))
    };
    log.lines().filter(is_telling).collect()
}

impl Outcome {
    /// The numbers of libFuzzer's log; 0 for one that is not there.
    fn read(target: &str, log: &str, failure: Option<String>) -> Self {
        let stat = |name: &str| -> u64 {
            let line = log.lines().rev().find_map(|line| line.strip_prefix(&format!("stat::{name}:")));
            line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
        };
        let coverage = log.lines().rev().find_map(|line| line.split_once(" cov: ")?.1.split(' ').next());
        Self {
            target: target.to_owned(),
            executions: stat("number_of_executed_units"),
            per_second: stat("average_exec_per_sec"),
            coverage: coverage.and_then(|number| number.parse().ok()).unwrap_or(0),
            peak_mb: stat("peak_rss_mb"),
            failure,
        }
    }
}

fn report(results: &[Outcome], json: bool) {
    for failure in results.iter().filter_map(|result| result.failure.as_ref()) {
        eprintln!("{failure}");
    }
    if json {
        let targets = results.iter().map(|o| {
            serde_json::json!({
                "target": o.target, "executions": o.executions, "executions_per_second": o.per_second,
                "coverage": o.coverage, "peak_mb": o.peak_mb, "found": o.failure.is_some(),
            })
        });
        println!("{}", serde_json::json!({ "fuzz": targets.collect::<Vec<_>>() }));
        return;
    }
    println!(
        "{:>12} {:>12} {:>9} {:>9} {:>8}  result",
        "target", "executions", "exec/s", "coverage", "peak MB"
    );
    for o in results {
        let result = if o.failure.is_some() { "FOUND SOMETHING" } else { "nothing found" };
        let Outcome { target, executions, per_second, coverage, peak_mb, .. } = o;
        println!("{target:>12} {executions:>12} {per_second:>9} {coverage:>9} {peak_mb:>8}  {result}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_read_from_the_end_of_the_log() {
        let log = "#2 INITED cov: 12 ft: 13 corp: 1/1b\n#9 DONE cov: 420 ft: 9 corp: 7/1Kb exec/s: 3\n\
                   stat::number_of_executed_units: 1234\nstat::average_exec_per_sec:     56\n\
                   stat::peak_rss_mb:              78\n";
        let read = Outcome::read("sorting", log, None);
        assert_eq!((read.executions, read.per_second, read.coverage, read.peak_mb), (1234, 56, 420, 78));
        assert_eq!(Outcome::read("sorting", "", None).executions, 0);
    }

    #[test]
    fn what_was_found_is_told_without_the_rest() {
        let log = "#9 NEW cov: 1\nthread 'x' panicked at fuzz/src/a.rs:1:2:\nids differ\n==7== ERROR: deadly\n    \
                   #4 0x1 in f /r/crates/quant/src/a.rs:1\n    #5 0x2 in main\nSUMMARY: deadly\nstat::x: 1";
        let told = telling_lines(log);
        assert_eq!(told.len(), 5, "{told:?}");
        assert!(told[1] == "ids differ" && told[3].contains("quant"), "{told:?}");
    }

    #[test]
    fn every_target_is_a_binary_of_the_fuzz_crate() {
        let manifest = include_str!("../../fuzz/Cargo.toml");
        let names: Vec<&str> =
            manifest.split("[[bin]]\nname = \"").skip(1).filter_map(|s| s.split('"').next()).collect();
        assert_eq!(names, TARGETS);
    }
}
