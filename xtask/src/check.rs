//! `check` and `test`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::repo::Repo;
use crate::steps::Steps;
use crate::tidy;

/// What a commit must pass. All steps use the dev profile, so dependencies are built once per kind of artefact.
pub fn check(repo: &Repo) -> Result<()> {
    let mut steps = Steps::new("check");
    steps.command("fmt", repo.cargo().args(["fmt", "--all", "--check"]))?;
    // A workspace of its own, see `fuzz/Cargo.toml`.
    steps.command("fmt fuzz", repo.cargo().args(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))?;
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    steps.command("clippy", repo.cargo().args(clippy))?;
    // Its bindings are made from the headers of Open MPI.
    if has_mpi() {
        let clippy = ["clippy", "--quiet", "--all-targets", "--features", "mpi"];
        let packages = ["ep-transport", "moe-tests", "fused-moe-cli"].map(|name| ["--package", name]);
        let mut command = repo.cargo();
        command.args(clippy).args(packages.as_flattened()).args(["--", "-D", "warnings"]);
        steps.command("clippy mpi", &mut command)?;
    } else {
        println!("no mpicc: the feature `mpi` is not checked here; `cargo xtask mpi-test` builds it");
    }
    let clippy = ["clippy", "--quiet", "--all-targets", "--package", "moe-kernels", "--features", "aiter-co"];
    steps.command("clippy aiter-co", repo.cargo().args(clippy).args(["--", "-D", "warnings"]))?;
    let hip = hip_root();
    if let Some(root) = &hip {
        let clippy = ["clippy", "--quiet", "--all-targets", "--features", "hip"];
        let packages = ["device-runtime", "fused-moe-cli"].map(|name| ["--package", name]);
        let mut command = repo.cargo();
        command
            .env("HIP_PATH", root)
            .args(clippy)
            .args(packages.as_flattened())
            .args(["--", "-D", "warnings"]);
        steps.command("clippy hip", &mut command)?;
    } else {
        println!(
            "no hip_runtime_api.h: the feature `hip` is not checked here; Debian has it in libamdhip64-dev"
        );
    }
    let doc = ["doc", "--quiet", "--no-deps", "--workspace"];
    steps.command("doc", repo.cargo().args(doc).env("RUSTDOCFLAGS", "-D warnings"))?;
    let doc = ["doc", "--quiet", "--no-deps", "--package", "moe-kernels", "--features", "aiter-co"];
    steps.command("doc aiter-co", repo.cargo().args(doc).env("RUSTDOCFLAGS", "-D warnings"))?;
    test_steps(repo, &mut steps)?;
    let aiter = ["test", "--quiet", "--package", "moe-kernels", "--features", "aiter-co"];
    steps.command("test aiter-co", repo.cargo().args(aiter))?;
    if let Some(root) = &hip {
        let test = ["test", "--quiet", "--package", "device-runtime", "--features", "hip"];
        steps.command("test hip", repo.cargo().env("HIP_PATH", root).args(test))?;
    }
    steps.step("tidy", || tidy::tidy(repo))?;
    steps.finish();
    Ok(())
}

fn has_mpi() -> bool {
    Command::new("mpicc").arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// The ROCm that `hip-sys` would find, or Debian's, which it has to be told of.
fn hip_root() -> Option<PathBuf> {
    let told = ["HIP_PATH", "ROCM_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let mut roots = told.chain(["/opt/rocm", "/usr"].map(PathBuf::from));
    roots.find(|root| root.join("include/hip/hip_runtime_api.h").is_file())
}

/// All tests of the workspace.
pub fn test(repo: &Repo) -> Result<()> {
    let mut steps = Steps::new("test");
    test_steps(repo, &mut steps)?;
    steps.finish();
    Ok(())
}

/// Building and running are two steps, so that the times say which one is slow.
fn test_steps(repo: &Repo, steps: &mut Steps) -> Result<()> {
    steps.command("build tests", repo.cargo().args(["test", "--quiet", "--workspace", "--no-run"]))?;
    steps.command("test", repo.cargo().args(["test", "--workspace", "--no-fail-fast"]))
}
