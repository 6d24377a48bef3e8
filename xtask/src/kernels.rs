//! `kernels`: code objects of the device sources in `kernels/`, and their tests.

mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use self::report::Resources;
use crate::repo::Repo;
use crate::steps::Steps;
use crate::toolchain::Toolchain;

/// What to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// NVIDIA H100, H200.
    #[value(name = "sm_90a")]
    Sm90a,
    /// AMD MI300X.
    Gfx942,
    /// AMD MI355X.
    Gfx950,
}

impl Arch {
    /// As `crates/moe-kernels` calls its folders.
    const fn name(self) -> &'static str {
        match self {
            Arch::Sm90a => "sm_90a",
            Arch::Gfx942 => "gfx942",
            Arch::Gfx950 => "gfx950",
        }
    }

    /// How the files that are for it alone end.
    const fn suffix(self) -> &'static str {
        match self {
            Arch::Sm90a => "_sm90",
            Arch::Gfx942 => "_gfx942",
            Arch::Gfx950 => "_gfx950",
        }
    }

    const fn extension(self) -> &'static str {
        match self {
            Arch::Sm90a => "cubin",
            Arch::Gfx942 | Arch::Gfx950 => "hsaco",
        }
    }
}

/// Folders of `kernels/` without kernels for devices.
const NOT_FOR_DEVICES: [&str; 2] = ["common", "selftest"];

/// Warnings are errors in what is ours; a product and a sum never become one operation unless the source says so.
const CLANG_FLAGS: &[&str] = &[
    "-O3",
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-Rpass-analysis=kernel-resource-usage",
];
const HIP_FLAGS: &[&str] =
    &["-x", "hip", "--cuda-device-only", "-nogpulib", "-nogpuinc", "--no-gpu-bundle-output"];
const NVCC_FLAGS: &[&str] = &[
    "-x",
    "cu",
    "-arch=sm_90a",
    "-cubin",
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v",
];

/// Compiles all kernels for `arches`, prints what they use, and puts the objects where `moe-kernels` embeds them.
pub fn build(repo: &Repo, arches: &[Arch]) -> Result<()> {
    let toolchain = Toolchain::find(repo)?;
    let sources = sources(repo)?;
    println!("{}", report::HEADER);
    for &arch in arches {
        let dir = repo.root().join("crates/moe-kernels/objects").join(arch.name());
        // An object whose source is gone would stay.
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        for source in sources.iter().filter(|source| is_for(source, arch)) {
            let stem = source.file_stem().context("a source has a name")?;
            let object = dir.join(stem).with_extension(arch.extension());
            for kernel in compile(&toolchain, arch, source, &object)? {
                println!("{:<8} {kernel}", arch.name());
                ensure!(
                    kernel.spilled_bytes == 0,
                    "{} for {}: {} bytes of registers are spilled",
                    kernel.name,
                    arch.name(),
                    kernel.spilled_bytes
                );
            }
        }
    }
    Ok(())
}

/// The same sources as host SIMT against the host crates, and the metadata of the objects, all of which must be there.
pub fn test(repo: &Repo) -> Result<()> {
    let mut steps = Steps::new("kernels test");
    let of_kernels = |task: &[&str]| {
        let mut cargo = repo.cargo();
        cargo.args(task).args([
            "--quiet",
            "--package",
            "moe-tests",
            "--features",
            "kernels",
            "--test",
            "kernels",
        ]);
        cargo
    };
    steps.command("clippy", of_kernels(&["clippy"]).args(["--", "-D", "warnings"]))?;
    steps.command("build tests", of_kernels(&["test"]).arg("--no-run"))?;
    steps.command("test", &mut of_kernels(&["test"]))?;
    steps.finish();
    Ok(())
}

fn sources(repo: &Repo) -> Result<Vec<PathBuf>> {
    let files = repo.files(&["hip"])?;
    let kernels = repo.root().join("kernels");
    let of_device = |file: &PathBuf| {
        let folder = file.strip_prefix(&kernels).ok().and_then(|path| path.iter().next());
        folder.is_some_and(|folder| !NOT_FOR_DEVICES.iter().any(|other| folder == *other))
    };
    Ok(files.into_iter().filter(of_device).collect())
}

/// A source is for all devices unless its name ends with one.
fn is_for(source: &Path, arch: Arch) -> bool {
    let stem = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let named = Arch::value_variants().iter().find(|other| stem.ends_with(other.suffix()));
    named.is_none_or(|other| *other == arch)
}

fn compile(toolchain: &Toolchain, arch: Arch, source: &Path, object: &Path) -> Result<Vec<Resources>> {
    let mut command = match arch {
        Arch::Sm90a => {
            let mut nvcc = toolchain.nvcc()?;
            nvcc.args(NVCC_FLAGS);
            nvcc
        }
        Arch::Gfx942 => hip(toolchain.clang(), arch),
        Arch::Gfx950 => hip(toolchain.zig_clang()?, arch),
    };
    let output = command.arg("-o").arg(object).arg(source).output();
    let output = output.with_context(|| format!("starting {command:?}"))?;
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{command:?} ended with {}\n{said}", output.status);
    }
    // Not a warning to -Werror, but wgmma one after the other is not what was written.
    if let Some(loss) = said.lines().find(|line| line.contains("Potential Performance Loss")) {
        bail!("{}: {loss}", source.display());
    }
    let kernels = match arch {
        Arch::Sm90a => report::of_ptxas(&said)?,
        Arch::Gfx942 | Arch::Gfx950 => report::of_clang(&said)?,
    };
    ensure!(!kernels.is_empty(), "{}: no kernel in it\n{said}", source.display());
    Ok(kernels)
}

fn hip(mut clang: Command, arch: Arch) -> Command {
    clang.args(HIP_FLAGS).args(CLANG_FLAGS).arg(format!("--offload-arch={}", arch.name()));
    clang
}
