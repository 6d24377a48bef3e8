//! The repository's own rules. Each rule is a function from text to findings, with a snippet that it fails.

mod edges;
mod links;
mod source;
mod style;

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::matrix;
use crate::repo::{Repo, stdout_of};
use source::Source;

/// A broken rule: the line it is on (0 for the whole file) and what is wrong.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    line: usize,
    what: String,
}

impl Finding {
    fn at(line: usize, what: impl Into<String>) -> Self {
        Self { line, what: what.into() }
    }
}

/// Checks every rule and prints every finding.
pub fn tidy(repo: &Repo) -> Result<()> {
    let mut findings = Vec::new();
    rust_files(repo, &mut findings)?;
    markdown_files(repo, &mut findings)?;
    packages(repo, &mut findings)?;
    if let Err(error) = matrix::compare(repo) {
        findings.push(format!("{error:#}"));
    }
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    ensure!(findings.is_empty(), "tidy: {} findings", findings.len());
    eprintln!("tidy: nothing found");
    Ok(())
}

fn rust_files(repo: &Repo, findings: &mut Vec<String>) -> Result<()> {
    for path in repo.files(&["rs"])? {
        let relative = repo.relative(&path);
        let text = read(&path)?;
        let source = Source::parse(&text);
        let mut found = style::file_size(&text);
        found.extend(style::safety_comments(&source));
        found.extend(style::forbidden_code(&source));
        found.extend(style::unfinished_comments(&source));
        if relative.ends_with("src/lib.rs") {
            found.extend(style::crate_docs(&text));
        }
        if is_library(relative) {
            found.extend(style::environment_reads(&source));
        }
        findings.extend(located(relative, found));
    }
    Ok(())
}

/// Sources of crates that others link: all of `crates/` but the program.
fn is_library(relative: &Path) -> bool {
    let mut parts = relative.iter().map(|part| part.to_string_lossy());
    let (top, name, folder) = (parts.next(), parts.next(), parts.next());
    top.as_deref() == Some("crates")
        && folder.as_deref() == Some("src")
        && name.as_deref() != Some(edges::PROGRAM)
}

fn markdown_files(repo: &Repo, findings: &mut Vec<String>) -> Result<()> {
    for path in repo.files(&["md"])? {
        let dir = path.parent().context("a file has a folder")?;
        let found = links::broken_links(&read(&path)?, |target| dir.join(target).exists());
        findings.extend(located(repo.relative(&path), found));
    }
    Ok(())
}

fn packages(repo: &Repo, findings: &mut Vec<String>) -> Result<()> {
    for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
        if !repo.root().join(licence).is_file() {
            findings.push(format!("{licence} is missing"));
        }
    }
    let metadata = stdout_of(repo.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let packages = edges::packages(&metadata)?;
    findings.extend(packages.iter().flat_map(edges::findings));
    Ok(())
}

fn located(relative: &Path, found: Vec<Finding>) -> impl Iterator<Item = String> {
    let path = relative.display().to_string();
    found.into_iter().map(move |Finding { line, what }| match line {
        0 => format!("{path}: {what}"),
        line => format!("{path}:{line}: {what}"),
    })
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_told_from_programs_and_tests() {
        assert!(is_library(Path::new("crates/quant/src/codec.rs")));
        assert!(!is_library(Path::new("crates/quant/tests/bits.rs")));
        assert!(!is_library(Path::new("crates/fused-moe-cli/src/main.rs")));
        assert!(!is_library(Path::new("xtask/src/main.rs")));
    }
}
