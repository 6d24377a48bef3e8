//! AddressSanitizer on the toolchain that is there.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::repo::{Repo, stdout_of};

/// A tool that this machine lacks: nothing was checked, and the program ends with 2 instead of 1.
#[derive(Debug)]
pub struct Missing(String);

impl Missing {
    /// Says what is missing.
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// How to build with AddressSanitizer.
pub struct Sanitizer {
    target: String,
}

impl Sanitizer {
    /// Fails if the toolchain has no runtime of the sanitizer for this machine.
    pub fn address(repo: &Repo) -> Result<Self> {
        let rustc = || {
            let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
            rustc.current_dir(repo.root());
            rustc
        };
        let version = stdout_of(rustc().arg("-vV"))?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        let target = host.context("rustc -vV names no host")?.to_owned();
        let libraries = stdout_of(rustc().args(["--print", "target-libdir"]))?;
        let runtime = Path::new(libraries.trim()).read_dir().is_ok_and(|files| {
            files.flatten().any(|file| file.file_name().to_string_lossy().ends_with("_rt.asan.a"))
        });
        if !runtime {
            return Err(
                Missing::new(format!("this Rust toolchain has no AddressSanitizer for {target}")).into()
            );
        }
        Ok(Self { target })
    }

    /// The target to build for, which names the folder of the build.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Makes `cargo` build with the sanitizer and with `flags`.
    ///
    /// The target is named so that build scripts and procedural macros are built without: they would not run.
    pub fn apply(&self, cargo: &mut Command, flags: &[&str]) {
        let flags = [flags, &["-Zsanitizer=address"]].concat().join(" ");
        cargo.args(["--target", &self.target]).env("RUSTFLAGS", flags).env("RUSTC_BOOTSTRAP", "1");
    }
}
