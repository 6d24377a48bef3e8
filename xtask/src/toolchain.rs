//! `toolchain`: the compilers of devices, pinned. Nothing else in this repository needs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::repo::Repo;
use crate::sanitizer::Missing;

/// Debian's clang: gfx942, and the linker for both.
const CLANG: &str = "clang++-19";
const LLD: &str = "lld-19";
const DEBIAN: [&str; 2] = ["clang-19", "lld-19"];

/// From PyPI: nvcc for sm_90a, and a clang that knows gfx950.
const PYPI: [&str; 6] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "ziglang==0.16.0",
];

/// Where the compilers are.
pub struct Toolchain {
    dir: PathBuf,
}

impl Toolchain {
    /// Installs what is not there yet.
    pub fn install(repo: &Repo) -> Result<Self> {
        let this = Self { dir: repo.root().join("target/toolchain") };
        if !runs(CLANG) || !runs(LLD) {
            install_debian()?;
        }
        this.install_pypi()?;
        this.link_lld()?;
        Ok(this)
    }

    /// The compilers that [`Toolchain::install`] has installed.
    pub fn find(repo: &Repo) -> Result<Self> {
        let this = Self { dir: repo.root().join("target/toolchain") };
        let installed = runs(CLANG) && runs(LLD) && this.stamp_is_current();
        if installed {
            return Ok(this);
        }
        Err(Missing::new("compilers of devices are missing or outdated: run `cargo xtask toolchain`").into())
    }

    /// clang for gfx942.
    pub fn clang(&self) -> Command {
        Command::new(CLANG)
    }

    /// nvcc for sm_90a.
    pub fn nvcc(&self) -> Result<Command> {
        Ok(Command::new(self.site_packages()?.join("nvidia/cu13/bin/nvcc")))
    }

    /// zig's clang, for gfx950. It looks for `lld` on the path.
    pub fn zig_clang(&self) -> Result<Command> {
        let mut command = Command::new(self.site_packages()?.join("ziglang/zig"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.dir.join("bin")).chain(std::env::split_paths(&path));
        // It has no headers of its own here, and must not find those of another compiler.
        command.env("PATH", std::env::join_paths(folders)?).args(["clang", "-nostdinc"]);
        Ok(command)
    }

    fn install_pypi(&self) -> Result<()> {
        if self.stamp_is_current() {
            return Ok(());
        }
        let venv = self.dir.join("venv");
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))
            .context("a virtual environment needs python3 and its venv module (Debian: python3-venv)")?;
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet"]).args(PYPI))?;
        fs::write(self.stamp(), PYPI.join("\n"))
            .with_context(|| format!("writing {}", self.stamp().display()))
    }

    fn stamp(&self) -> PathBuf {
        self.dir.join("installed")
    }

    fn stamp_is_current(&self) -> bool {
        fs::read_to_string(self.stamp()).is_ok_and(|installed| installed == PYPI.join("\n"))
    }

    #[cfg(unix)]
    fn link_lld(&self) -> Result<()> {
        let bin = self.dir.join("bin");
        fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
        let script = bin.join("lld");
        let text = format!("#!/bin/sh\nexec {LLD} \"$@\"\n");
        fs::write(&script, text).with_context(|| format!("writing {}", script.display()))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&script, mode).with_context(|| format!("marking {}", script.display()))
    }

    #[cfg(not(unix))]
    fn link_lld(&self) -> Result<()> {
        Err(Missing::new("compilers of devices are installed on Linux only").into())
    }

    fn site_packages(&self) -> Result<PathBuf> {
        let lib = self.dir.join("venv/lib");
        let mut entries = fs::read_dir(&lib).with_context(|| format!("reading {}", lib.display()))?;
        let python = entries.next().with_context(|| format!("nothing in {}", lib.display()))??;
        Ok(python.path().join("site-packages"))
    }
}

/// Through apt, as whoever runs this may.
fn install_debian() -> Result<()> {
    if !runs("apt-get") {
        let wanted = DEBIAN.join(" ");
        return Err(Missing::new(format!("no {CLANG}, and no apt-get to install {wanted} with")).into());
    }
    run(Command::new("apt-get").args(["update", "--quiet"]).stdout(Stdio::null()))?;
    let install = ["install", "--quiet", "--yes", "--no-install-recommends"];
    run(Command::new("apt-get").args(install).args(DEBIAN).stdout(Stdio::null()))
}

fn runs(program: impl AsRef<Path>) -> bool {
    let mut command = Command::new(program.as_ref());
    // lld alone is told by its name what to be, and says so on stderr.
    command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok()
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}
