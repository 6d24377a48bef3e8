//! Repository tasks. `cargo xtask check` is what a commit must pass; `cargo xtask --help` lists the rest.

mod check;
mod fuzz;
mod gpu_pack;
mod kernels;
mod matrix;
mod memory;
mod mpi_test;
mod new_backend;
mod peers;
mod repo;
mod sanitizer;
mod steps;
mod tidy;
mod toolchain;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::fuzz::Fuzz;
use crate::kernels::Arch;
use crate::matrix::MatrixAction;
use crate::mpi_test::{MpiPart, MpiTest};
use crate::new_backend::{BackendKind, NewBackend};
use crate::peers::Peers;
use crate::repo::Repo;
use crate::toolchain::Toolchain;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Checks and chores of this repository")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Formatting, clippy, docs, tests and tidy: what a commit must pass.
    Check,
    /// All tests of the workspace, doctests included.
    Test,
    /// The repository's own rules: dependency direction, SAFETY comments, file sizes, links, the README's table.
    Tidy,
    /// Writes the support table that `fmoe matrix` prints into README.md.
    Matrix {
        /// Only fail if the table in README.md is not what `fmoe matrix` prints.
        #[arg(long, conflicts_with = "full")]
        check: bool,
        /// Run the full combination matrix test instead, in release; this takes long.
        #[arg(long)]
        full: bool,
    },
    /// Fuzzes what reads files, ids and logits from outside; needs a C++ compiler, and no nightly.
    Fuzz {
        /// Targets: checkpoint, sorting, routing. All unless given.
        targets: Vec<String>,
        /// How long each target runs.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Targets that run at the same time.
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Print one JSON object, for `benches/record`.
        #[arg(long)]
        json: bool,
    },
    /// The tests of the crates that move bytes with AddressSanitizer; needs no nightly. Ends with 2 without a runtime.
    Asan,
    /// A few tests of the same crates under valgrind's memcheck. Ends with 2 without valgrind.
    Valgrind,
    /// The tests that need MPI, under `mpirun`; needs Open MPI, libclang, and with `--two-hosts` root and iproute2. Ends with
    /// 2 without them.
    MpiTest {
        /// Ranks of a job; one job after the other for several.
        #[arg(short = 'n', long, value_delimiter = ',', default_values_t = [4, 8])]
        ranks: Vec<usize>,
        /// Run across two hosts, made of network namespaces, instead of on this one.
        #[arg(long)]
        two_hosts: bool,
        /// What to run; all of it unless something is named.
        #[arg(long, value_enum, value_delimiter = ',', default_values_t = [MpiPart::Suites, MpiPart::Program, MpiPart::Loss])]
        only: Vec<MpiPart>,
    },
    /// Installs the compilers of devices, pinned: Debian's clang, and in target/toolchain nvcc and zig from PyPI. Needs
    /// python3, and the rights of root where clang is missing.
    Toolchain,
    /// Device kernels.
    Kernels {
        #[command(subcommand)]
        what: KernelsTask,
    },
    /// Stripped programs with the code objects in target/gpu-pack, for a machine with a GPU and only a driver.
    GpuPack,
    /// Measurements beside other programs, for `benches/record`.
    Bench {
        #[command(subcommand)]
        what: BenchTask,
    },
    /// Makes a backend crate that compiles and refuses every configuration.
    NewBackend {
        /// Package name, as in `mori-comm`: lower case, digits, single hyphens, ending in the kind.
        name: String,
        /// Stages 2 and 4 (comm) or stage 3 (experts).
        #[arg(long)]
        kind: BackendKind,
        /// Folder that the crate's folder is made in; `crates` of this repository unless given.
        #[arg(long)]
        path: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
enum KernelsTask {
    /// Compiles `kernels/`, prints what each kernel uses, and puts the objects where `moe-kernels` embeds them. Ends with 2
    /// without `cargo xtask toolchain`.
    Build {
        /// Devices; all of them unless given.
        #[arg(long, value_enum, value_delimiter = ',', default_values = ["sm_90a", "gfx942", "gfx950"])]
        arch: Vec<Arch>,
    },
    /// The kernels as host SIMT against the host crates, and the metadata of the objects of all devices.
    Test,
}

#[derive(Subcommand)]
enum BenchTask {
    /// Experts on one rank beside torch, SGLang's CPU kernels and Rust matrix products, on the same calls. Installs torch
    /// in target/peers, some gigabytes, and needs a C++ compiler.
    Peers(Peers),
}

fn main() -> ExitCode {
    let outcome = Repo::find().and_then(|repo| match Cli::parse().task {
        Task::Check => check::check(&repo),
        Task::Test => check::test(&repo),
        Task::Tidy => tidy::tidy(&repo),
        Task::Matrix { full: true, .. } => matrix::matrix(&repo, MatrixAction::FullTest),
        Task::Matrix { check: true, .. } => matrix::matrix(&repo, MatrixAction::Compare),
        Task::Matrix { .. } => matrix::matrix(&repo, MatrixAction::Write),
        Task::Fuzz { targets, seconds, jobs, json } => {
            fuzz::fuzz(&repo, &Fuzz { targets, seconds, jobs, json })
        }
        Task::Asan => memory::asan(&repo),
        Task::Valgrind => memory::valgrind(&repo),
        Task::MpiTest { ranks, two_hosts, only } => {
            mpi_test::mpi_test(&repo, &MpiTest { ranks, two_hosts, only })
        }
        Task::Toolchain => Toolchain::install(&repo).map(drop),
        Task::Kernels { what: KernelsTask::Build { arch } } => kernels::build(&repo, &arch),
        Task::Kernels { what: KernelsTask::Test } => kernels::test(&repo),
        Task::GpuPack => gpu_pack::gpu_pack(&repo),
        Task::Bench { what: BenchTask::Peers(peers) } => peers::peers(&repo, &peers),
        Task::NewBackend { name, kind, path } => {
            new_backend::new_backend(&repo, &NewBackend { name, kind, path })
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            if error.is::<sanitizer::Missing>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
