//! Embeds the code objects that `cargo xtask kernels build` has made, and builds the kernels as host SIMT if asked to.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Devices, as their folders are called.
const ARCHES: [&str; 3] = ["sm_90a", "gfx942", "gfx950"];

fn main() -> io::Result<()> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let objects = root.join("objects");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", objects.display());
    fs::write(out.join("objects.rs"), registry(&objects)?)?;
    #[cfg(feature = "host-simt")]
    host_simt::build(&root.join("../../kernels"))?;
    Ok(())
}

fn variable(name: &str) -> io::Result<String> {
    env::var(name).map_err(|error| io::Error::other(format!("{name}: {error}")))
}

/// Source of `[Object; N]`: what lies in `objects/<arch>/<name>.<cubin|hsaco>`, if the folder is there.
fn registry(objects: &Path) -> io::Result<String> {
    let mut source = String::from("[\n");
    for arch in ARCHES {
        let folder = objects.join(arch);
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        println!("cargo::rerun-if-changed={}", folder.display());
        let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        files.retain(|file| file.extension().is_some_and(|e| e == "cubin" || e == "hsaco"));
        files.sort();
        for file in files {
            let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            println!("cargo::rerun-if-changed={}", file.display());
            let _ = writeln!(
                source,
                "    Object {{ arch: {arch:?}, name: {stem:?}, image: include_bytes!({file:?}) }},"
            );
        }
    }
    source.push(']');
    Ok(source)
}

#[cfg(feature = "host-simt")]
mod host_simt {
    use std::fs;
    use std::io;
    use std::path::{Path, PathBuf};

    use super::ARCHES;

    /// Compiles every kernel once for each device that it can play, and the scheduler.
    pub fn build(kernels: &Path) -> io::Result<()> {
        let common = kernels.join("common");
        let mut stages: Vec<PathBuf> =
            fs::read_dir(kernels)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        stages.retain(|path| path.is_dir());
        let mut sources = Vec::new();
        for stage in &stages {
            println!("cargo::rerun-if-changed={}", stage.display());
            for entry in fs::read_dir(stage)? {
                let file = entry?.path();
                println!("cargo::rerun-if-changed={}", file.display());
                if file.extension().is_some_and(|e| e == "hip") {
                    sources.push(file);
                }
            }
        }
        sources.sort();
        compiler().file(common.join("host_simt.cpp")).compile("moe_host_simt");
        for arch in ARCHES {
            let mut build = compiler();
            build.define(&format!("MOE_AS_{}", arch.to_uppercase().replace('_', "")), None);
            // Kernels are C++ under another name.
            let sources = sources.iter().filter(|file| is_for(file, arch));
            build.flag("-x").flag("c++").files(sources).compile(&format!("moe_kernels_{arch}"));
        }
        // Libraries are searched in order, and the kernels call the scheduler.
        println!("cargo::rustc-link-lib=static=moe_host_simt");
        Ok(())
    }

    /// Whether `file` is for all devices, or for `arch`. The main loop of Hopper uses instructions that are not played yet.
    fn is_for(file: &Path, arch: &str) -> bool {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let ends_with = |arch: &str| stem.ends_with(&format!("_{}", arch.replace("sm_90a", "sm90")));
        ends_with(arch) && arch != "sm_90a" || !ARCHES.iter().any(|arch| ends_with(arch))
    }

    fn compiler() -> cc::Build {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).define("MOE_HOST_SIMT", None);
        // No product and sum become one operation that the devices, too, are told not to use.
        build.flag("-ffp-contract=off").flag("-Wall").flag("-Wextra").warnings_into_errors(true);
        build
    }
}
