//! `gpu-pack`: programs with their code objects in one folder, for a machine with a GPU, a driver and nothing else.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::memory::programs;
use crate::repo::{Repo, stdout_of};
use crate::steps::Steps;

const README: &str = "\
fmoe doctor                       what the machine has
./device                          tests of the runtime, of every kernel and of layers on the first GPU
fmoe demo --device cuda           layers of made-up checkpoints, judged by the oracle
fmoe bench router --device cuda   a measurement; --json for benches/record. So are `bench quant` and `bench experts`
";

/// Builds the program and the device tests, stripped, and puts them into `target/gpu-pack`.
pub fn gpu_pack(repo: &Repo) -> Result<()> {
    let objects = repo.root().join("crates/moe-kernels/objects");
    ensure!(objects.is_dir(), "no code objects to pack: run `cargo xtask kernels build`");
    let pack = repo.root().join("target/gpu-pack");
    if pack.exists() {
        fs::remove_dir_all(&pack).with_context(|| format!("removing {}", pack.display()))?;
    }
    fs::create_dir_all(&pack).with_context(|| format!("making {}", pack.display()))?;
    let mut steps = Steps::new("gpu-pack");
    let stripped = ["--quiet", "--release", "--config", "profile.release.strip=true"];
    for what in [
        &["build", "--package", "fused-moe-cli", "--bin", "fmoe"][..],
        &["test", "--no-run", "--package", "moe-tests", "--test", "device"],
    ] {
        let name = *what.last().unwrap_or(&"");
        let mut cargo = repo.cargo();
        cargo.args(what).args(stripped);
        steps.command(name, &mut cargo)?;
        let built = programs(&stdout_of(cargo.args(["--message-format", "json"]))?)?;
        let program = built.iter().find(|program| program.name == name);
        let program = program.with_context(|| format!("cargo built no {name}"))?;
        copy(&program.path, &pack.join(name))?;
    }
    let readme = pack.join("README.txt");
    fs::write(&readme, README).with_context(|| format!("writing {}", readme.display()))?;
    steps.finish();
    println!("{}", pack.display());
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    println!("{:>8.1} MB  {}", bytes as f64 / 1e6, to.display());
    Ok(())
}
