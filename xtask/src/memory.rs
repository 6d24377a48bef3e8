//! `asan` and `valgrind`: the tests of the crates that move bytes, under tools that see every access.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::repo::{Repo, stdout_of};
use crate::sanitizer::{Missing, Sanitizer};
use crate::steps::Steps;

/// The crates with unsafe code, and those that drive it.
const CRATES: [&str; 12] = [
    "fused-moe-core",
    "fused-moe-quant",
    "grouped-gemm",
    "ep-transport",
    "naive-comm",
    "mori-comm",
    "batched-comm",
    "aiter-experts",
    "batched-experts",
    "trtllm-experts",
    "fused-moe-router",
    "moe-checkpoint",
];

/// Unit and integration tests of [`CRATES`] with AddressSanitizer. Documentation tests are not among them: rustdoc
/// builds them without the sanitizer.
pub fn asan(repo: &Repo) -> Result<()> {
    let sanitizer = Sanitizer::address(repo)?;
    let dir = repo.root().join("target/asan");
    let test = |only_build: bool| {
        let mut cargo = repo.cargo();
        cargo.args(["test", "--quiet", "--lib", "--tests"]);
        cargo.args(CRATES.iter().flat_map(|name| ["--package", name]));
        sanitizer.apply(&mut cargo, &[]);
        cargo.arg("--target-dir").arg(&dir);
        // Looking for leaks needs ptrace, which containers forbid; a leak is not unsound. One test asks for more memory
        // than there is, and wants an error.
        cargo.env(
            "ASAN_OPTIONS",
            "detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1",
        );
        cargo.arg(if only_build { "--no-run" } else { "--no-fail-fast" });
        cargo
    };
    let mut steps = Steps::new("asan");
    steps.command("build tests", &mut test(true))?;
    // A speed that no instrumented code reaches, and a model checker that switches stacks.
    let skipped = ["--", "--skip", "probes_measure_something", "--skip", "handshake::model"];
    steps.command("test", test(false).args(skipped))?;
    steps.finish();
    Ok(())
}

/// One run under memcheck: a test program, and the tests of it that are worth their time there.
struct Checked {
    package: &'static str,
    /// The integration test, or `lib` for the unit tests.
    program: &'static str,
    /// Names of tests as libtest filters them; all if there are none.
    tests: &'static [&'static str],
}

const fn checked(package: &'static str, program: &'static str, tests: &'static [&'static str]) -> Checked {
    Checked { package, program, tests }
}

/// Memcheck runs code some fifty times slower and on one core, so these are few: every kernel of the arithmetic, and a
/// layer of every backend, with threads as ranks.
const CHECKED: [Checked; 10] = [
    checked("fused-moe-core", "contract", &[]),
    checked("fused-moe-quant", "bits", &["isa"]),
    checked("grouped-gemm", "invariance", &["avx2_gives_the_bits"]),
    checked("ep-transport", "lib", &["doorbell", "segment", "status", "streaming"]),
    checked(
        "naive-comm",
        "conformance",
        &["allgather_reducescatter::rows_block_ep2", "naive::rows_none_ep2"],
    ),
    checked("mori-comm", "conformance", &["rows_block_ep2"]),
    checked("batched-comm", "conformance", &["rows_block_ep2"]),
    checked("aiter-experts", "sorting", &[]),
    checked("aiter-experts", "conformance", &["foreignids_block"]),
    checked("batched-experts", "conformance", &["foreignids_block"]),
];

/// The tests of [`CHECKED`] under valgrind's memcheck. It hides instruction sets that it does not know (AVX-512) from
/// the program, so that the choice of a kernel needs no help.
pub fn valgrind(repo: &Repo) -> Result<()> {
    let found = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        return Err(Missing::new("no valgrind: `apt-get install valgrind` or its like").into());
    }
    let mut steps = Steps::new("valgrind");
    let mut build = repo.cargo();
    build.args(["test", "--quiet", "--lib", "--tests"]);
    build.args(CRATES.iter().flat_map(|name| ["--package", name]));
    steps.command("build tests", build.arg("--no-run"))?;
    // The names of the programs, which a second build that builds nothing prints.
    build.args(["--message-format", "json"]);
    let programs = programs(&stdout_of(&mut build)?)?;
    for Checked { package, program, tests } in &CHECKED {
        let wanted = programs.iter().find(|p| p.package == package.replace('-', "_") && p.name == *program);
        let path = &wanted.with_context(|| format!("{package} has no test program {program}"))?.path;
        let mut valgrind = Command::new("valgrind");
        // Tests that panic on purpose would spend minutes on finding names for their stack.
        valgrind.current_dir(repo.root()).env("RUST_BACKTRACE", "0");
        // Fair, because a spinning rank would starve the one that it waits for.
        valgrind.args(["--quiet", "--error-exitcode=99", "--leak-check=no", "--fair-sched=yes"]);
        valgrind.arg(path).args(["--test-threads=1", "--quiet"]).args(*tests);
        steps.command(*package, &mut valgrind)?;
    }
    steps.finish();
    Ok(())
}

pub struct Program {
    /// Library name of the package.
    pub package: String,
    /// The integration test, or `lib` for the unit tests.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

/// The test programs in the messages of a build.
pub fn programs(messages: &str) -> Result<Vec<Program>> {
    let mut found = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("reading cargo's messages")?;
        let Some(path) = message["executable"].as_str() else { continue };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        // `path+file:///…/crates/quant#fused-moe-quant@0.1.0`, or without a name where the folder has the same.
        let id = text(&message["package_id"]);
        let (folder, version) = id.split_once('#').unwrap_or((&id, ""));
        let name = version.split_once('@').map_or(folder.rsplit('/').next(), |(name, _)| Some(name));
        let kind = text(&message["target"]["kind"][0]);
        found.push(Program {
            package: name.unwrap_or_default().replace('-', "_"),
            name: if kind == "lib" { kind } else { text(&message["target"]["name"]) },
            path: path.into(),
        });
    }
    ensure!(!found.is_empty(), "cargo built no test program");
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_the_messages() {
        let messages = r#"{"reason": "compiler-artifact", "executable": null}
{"executable": "/t/bits-1", "package_id": "path+file:///r/crates/quant#fused-moe-quant@0.1.0", "target": {"kind": ["test"], "name": "bits"}}
{"executable": "/t/ep-2", "package_id": "path+file:///r/crates/ep-transport#0.1.0", "target": {"kind": ["lib"], "name": "ep_transport"}}"#;
        let found = programs(messages).unwrap();
        let names: Vec<_> = found.iter().map(|p| (p.package.as_str(), p.name.as_str())).collect();
        assert_eq!(names, [("fused_moe_quant", "bits"), ("ep_transport", "lib")]);
        assert!(programs("").is_err());
    }
}
