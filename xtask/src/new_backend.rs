//! `new-backend`: a crate that compiles, refuses every configuration, and says so in the conformance suite.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::repo::Repo;

/// Which stages the backend covers.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// Stages 2 and 4: dispatch and combine.
    Comm,
    /// Stage 3: gemm1, activation, gemm2.
    Experts,
}

impl BackendKind {
    fn name(self) -> &'static str {
        match self {
            BackendKind::Comm => "comm",
            BackendKind::Experts => "experts",
        }
    }

    fn templates(self) -> [(&'static str, &'static str); 4] {
        match self {
            BackendKind::Comm => [
                ("README.md", include_str!("../templates/comm/README.md.in")),
                ("src/lib.rs", include_str!("../templates/comm/lib.rs.in")),
                ("src/provider.rs", include_str!("../templates/comm/provider.rs.in")),
                ("tests/conformance.rs", include_str!("../templates/comm/conformance.rs.in")),
            ],
            BackendKind::Experts => [
                ("README.md", include_str!("../templates/experts/README.md.in")),
                ("src/lib.rs", include_str!("../templates/experts/lib.rs.in")),
                ("src/provider.rs", include_str!("../templates/experts/provider.rs.in")),
                ("tests/conformance.rs", include_str!("../templates/experts/conformance.rs.in")),
            ],
        }
    }
}

/// What to make.
pub struct NewBackend {
    /// Package name.
    pub name: String,
    /// Its stages.
    pub kind: BackendKind,
    /// Folder of the crate's folder; `crates` of this repository unless given.
    pub path: Option<PathBuf>,
}

/// Makes the crate and prints what is left to do by hand.
pub fn new_backend(repo: &Repo, wanted: &NewBackend) -> Result<()> {
    let names = Names::new(&wanted.name, wanted.kind)?;
    let parent = wanted.path.clone().unwrap_or_else(|| repo.root().join("crates"));
    let dir = parent.join(&names.package);
    ensure!(!dir.exists(), "{} exists already", dir.display());
    let manifest =
        if inherits(&parent) { inherited_manifest(&names) } else { own_manifest(&names, repo.root()) };

    let mut sources = Vec::new();
    write(&dir.join("Cargo.toml"), &manifest)?;
    for (file, template) in wanted.kind.templates() {
        let path = dir.join(file);
        write(&path, &names.fill(template))?;
        sources.extend(file.ends_with(".rs").then_some(path));
    }
    // Line breaks depend on the length of the names. A crate that is not formatted is still a crate.
    let mut rustfmt = Command::new("rustfmt");
    rustfmt.args(["--edition", "2024", "--config-path"]).arg(repo.root()).args(&sources);
    if !rustfmt.status().is_ok_and(|status| status.success()) {
        eprintln!("rustfmt did not run; format {} by hand", dir.display());
    }
    print!("{}", next_steps(&names, &dir));
    Ok(())
}

/// The spellings of a backend's name.
struct Names {
    /// `deep-comm`
    package: String,
    /// `deep_comm`
    library: String,
    /// `deep`, by which users choose it.
    backend: String,
    /// `DeepComm`
    provider: String,
    kind: BackendKind,
}

impl Names {
    fn new(package: &str, kind: BackendKind) -> Result<Self> {
        let suffix = format!("-{}", kind.name());
        let stem = package.strip_suffix(&suffix).unwrap_or_default();
        let is_word = |word: &str| {
            let starts_right = word.starts_with(|c: char| c.is_ascii_lowercase());
            starts_right && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        };
        ensure!(
            stem.split('-').all(is_word),
            "{package:?} is no name for a {0} backend: lower-case words joined by hyphens, the last one {0}",
            kind.name()
        );
        let capitalised = |word: &str| word[..1].to_uppercase() + &word[1..];
        Ok(Self {
            package: package.to_string(),
            library: package.replace('-', "_"),
            backend: stem.replace('-', "_"),
            provider: package.split('-').map(capitalised).collect(),
            kind,
        })
    }

    fn fill(&self, template: &str) -> String {
        template
            .replace("{{package}}", &self.package)
            .replace("{{library}}", &self.library)
            .replace("{{backend}}", &self.backend)
            .replace("{{Provider}}", &self.provider)
    }

    fn description(&self) -> String {
        match self.kind {
            BackendKind::Comm => format!("Stages 2 and 4: {} dispatch and combine", self.backend),
            BackendKind::Experts => format!("Stage 3: {} experts", self.backend),
        }
    }
}

/// Whether a crate in `parent` can take its versions from the workspace above.
fn inherits(parent: &Path) -> bool {
    let manifest = parent.join("..").join("Cargo.toml");
    fs::read_to_string(manifest).is_ok_and(|text| {
        let mut shared = text.lines().skip_while(|line| line.trim() != "[workspace.dependencies]");
        shared.any(|line| line.starts_with("fused-moe-core ="))
    })
}

fn inherited_manifest(names: &Names) -> String {
    format!(
        "[package]
name = \"{}\"
description = \"{}\"
version.workspace = true
edition.workspace = true
rust-version.workspace = true
license.workspace = true
repository.workspace = true

[dependencies]
fused-moe-core.workspace = true

[dev-dependencies]
moe-conformance.workspace = true

[lints]
workspace = true
",
        names.package,
        names.description()
    )
}

fn own_manifest(names: &Names, root: &Path) -> String {
    let crates = root.join("crates");
    format!(
        "[package]
name = \"{}\"
description = \"{}\"
version = \"0.1.0\"
edition = \"2024\"
rust-version = \"1.89\"
license = \"MIT OR Apache-2.0\"

[dependencies]
fused-moe-core.path = {:?}

[dev-dependencies]
moe-conformance.path = {:?}
",
        names.package,
        names.description(),
        crates.join("fused-moe-core"),
        crates.join("moe-conformance"),
    )
}

fn next_steps(names: &Names, dir: &Path) -> String {
    let Names { package, library, backend, provider, kind } = names;
    let kind = kind.name();
    format!(
        "made {dir}

It compiles and refuses everything: try `cargo test -p {package}`.
Next: CONTRIBUTING.md, \"Add a backend\", from step 2.

Programs that are to know it add it to their registry:
    Registry::new().with_{kind}({library}::{provider})
To have it in the façade of this repository, add
    Cargo.toml, [workspace.dependencies]         {package} = {{ path = \"crates/{package}\", version = \"0.1.0\" }}
    crates/fused-moe/Cargo.toml, [dependencies]  {package}.workspace = true
    crates/fused-moe/src, the default registry   .with_{kind}({library}::{provider})
and run `cargo xtask matrix`: users then choose it as `{backend}`.
",
        dir = dir.display(),
    )
}

fn write(path: &Path, text: &str) -> Result<()> {
    let dir = path.parent().context("a file has a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_spelled_in_every_way_that_is_needed() {
        let names = Names::new("deep-ep2-comm", BackendKind::Comm).unwrap();
        assert_eq!(names.library, "deep_ep2_comm");
        assert_eq!(names.backend, "deep_ep2");
        assert_eq!(names.provider, "DeepEp2Comm");
    }

    #[test]
    fn names_that_would_not_fit_are_refused() {
        for bad in [
            "deep",
            "comm",
            "-comm",
            "deep-experts",
            "Deep-comm",
            "deep_comm",
            "deep--comm",
            "2-comm",
            "../x-comm",
        ] {
            assert!(Names::new(bad, BackendKind::Comm).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_filled_template_has_no_gap() {
        for (name, kind) in [("a-comm", BackendKind::Comm), ("a-experts", BackendKind::Experts)] {
            let names = Names::new(name, kind).unwrap();
            for (file, template) in kind.templates() {
                assert!(!names.fill(template).contains("{{"), "{name}: {file}");
            }
        }
    }
}
