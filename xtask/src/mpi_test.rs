//! `mpi-test`: the tests that need MPI, and `fmoe` as a program of MPI ranks, under `mpirun`, on this machine or on two hosts made of network namespaces.

mod hosts;
mod program;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use self::hosts::TwoHosts;
use crate::memory::programs;
use crate::repo::{Repo, stdout_of};
use crate::sanitizer::Missing;
use crate::steps::Steps;

/// What to run.
pub struct MpiTest {
    /// Numbers of ranks, one job each.
    pub ranks: Vec<usize>,
    /// Across two hosts instead of on this one.
    pub two_hosts: bool,
    /// Which parts of it.
    pub only: Vec<MpiPart>,
}

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MpiPart {
    /// The transport, bit-equal results, and conformance of the backends.
    Suites,
    /// `fmoe` as a program of ranks.
    Program,
    /// Jobs that lose a rank.
    Loss,
}

/// Jobs that run longer are ended by `mpirun`, in seconds. Far beyond what they take on two cores.
const JOB_LIMIT: &str = "1200";

/// A job whose rank is lost must end in this time; the ranks' deadline is 0.7 s.
const LOSS_LIMIT: Duration = Duration::from_secs(30);

/// Cases of the comm suite that pass over all backends in a job of four ranks, on one machine and on two; more ranks
/// have room for more of them.
const FLOORS: [&str; 2] = ["354", "280"];

/// UCX is for RDMA networks. Over TCP and shared memory, ob1 is what works everywhere. Ranks that share cores have to offer them
/// while they wait; `mpirun` does not see by itself that they do where it has been told of slots.
const COMPONENTS: [&str; 12] = [
    "--mca",
    "pml",
    "ob1",
    "--mca",
    "osc",
    "^ucx",
    "--mca",
    "btl",
    "self,tcp,vader",
    "--mca",
    "mpi_yield_when_idle",
    "1",
];

/// Builds the test program and runs all of it.
pub fn mpi_test(repo: &Repo, options: &MpiTest) -> Result<()> {
    let found = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        return Err(Missing::new(
            "no mpirun: `apt-get install libopenmpi-dev openmpi-bin libclang-dev` or its like",
        )
        .into());
    }
    let hosts = options.two_hosts.then(|| TwoHosts::make(repo)).transpose()?;
    let mut steps = Steps::new("mpi-test");
    let mut build = repo.cargo();
    build.args(["test", "--quiet", "--no-run", "--package", "moe-tests", "--features", "mpi"]);
    steps.command("build tests", build.args(["--test", "mpi"]))?;
    let built = programs(&stdout_of(build.args(["--message-format", "json"]))?)?;
    let tests = &built.first().context("cargo built no test program")?.path;
    let mut build = repo.cargo();
    build.args(["build", "--quiet", "--package", "fused-moe-cli", "--features", "mpi", "--bin", "fmoe"]);
    steps.command("build fmoe", &mut build)?;
    let built = programs(&stdout_of(build.args(["--message-format", "json"]))?)?;
    let fmoe = &built.first().context("cargo built no fmoe")?.path;
    let of = |program, ranks: usize| Job { repo, hosts: hosts.as_ref(), program, ranks };
    let job = |ranks| of(tests, ranks);
    let has = |part| options.only.contains(&part);
    for &ranks in options.ranks.iter().filter(|_| has(MpiPart::Suites)) {
        let floor = match ranks {
            0..4 => "1",
            _ => FLOORS[usize::from(options.two_hosts)],
        };
        for tests in [&["transport"][..], &["bits"], &["conformance", floor]] {
            let name = format!("{} -np {ranks}", tests[0]);
            steps.command(name, &mut job(ranks).command(tests))?;
        }
    }
    if has(MpiPart::Program) {
        let most = options.ranks.last().copied().unwrap_or(4);
        program_of_ranks(&mut steps, &of(fmoe, most), &of(fmoe, 4))?;
    }
    if has(MpiPart::Loss) {
        for how in ["silent", "stopped", "killed"] {
            steps.step(format!("lose {how}"), || job(2).loses(&[how]))?;
        }
        for phase in ["between", "in_dispatch", "in_combine"] {
            for how in ["stopped", "killed"] {
                steps.step(format!("lose {how} {phase}"), || job(4).loses(&[how, phase]))?;
            }
        }
    }
    steps.finish();
    Ok(())
}

/// `fmoe` as many ranks, and as few.
fn program_of_ranks(steps: &mut Steps, run: &Job<'_>, few: &Job<'_>) -> Result<()> {
    steps.step(format!("fmoe run -np {}", run.ranks), || program::writes_the_same(run))?;
    steps.step("fmoe run refuses", || program::refuses(few))?;
    // One row: ranks that wait keep the cores busy, so each takes seconds here.
    let bench = [
        "bench",
        "comm",
        "--ranks",
        "mpi",
        "--ep-size",
        "4",
        "--gpus-per-node",
        "2",
        "--tokens",
        "8",
        "--reps",
        "1",
        "--json",
    ];
    let small =
        ["--all2all", "mori_high_throughput", "--quant", "none", "--routing", "uniform", "--hidden", "512"];
    steps.command(
        "fmoe bench comm -np 4",
        few.command(&[&bench[..], &small].concat()).stdout(Stdio::null()),
    )?;
    Ok(())
}

/// One run of the test program.
struct Job<'a> {
    repo: &'a Repo,
    hosts: Option<&'a TwoHosts>,
    program: &'a Path,
    ranks: usize,
}

impl Job<'_> {
    fn command(&self, tests: &[&str]) -> Command {
        let mut line: Vec<String> =
            ["mpirun", "--allow-run-as-root", "--oversubscribe"].map(String::from).into();
        line.extend(["--timeout", JOB_LIMIT].map(String::from));
        line.extend(COMPONENTS.map(String::from));
        line.extend(["-np".to_owned(), self.ranks.to_string()]);
        line.extend(self.hosts.map(|hosts| hosts.options(self.ranks)).unwrap_or_default());
        line.push(self.program.display().to_string());
        line.extend(tests.iter().map(|&test| test.to_owned()));
        let mut command = match self.hosts {
            Some(hosts) => hosts.on_first(&line),
            None => {
                let mut command = Command::new(&line[0]);
                command.args(&line[1..]);
                command
            }
        };
        command.current_dir(self.repo.root());
        command
    }

    /// Runs a job that loses a rank: it must be aborted in time, and say who was lost.
    fn loses(&self, how: &[&str]) -> Result<()> {
        let start = Instant::now();
        let Output { status, stdout, stderr } = self.command(&[&["lose"], how].concat()).output()?;
        let took = start.elapsed();
        let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        ensure!(!status.success(), "the job did not notice the loss ({how:?}):\n{said}");
        ensure!(took < LOSS_LIMIT, "the job ended only after {took:.1?}:\n{said}");
        // mpirun sees by itself that a process was killed, and may be faster.
        let names_it = said.contains("PeerLost: rank 1 ") || how[0] == "killed" && said.contains("signal 9");
        ensure!(names_it, "the job does not say that rank 1 was lost ({how:?}):\n{said}");
        Ok(())
    }
}
