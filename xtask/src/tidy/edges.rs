//! Which package may depend on which.
//!
//! ```text
//! program → façade → {*-comm, *-experts} → {router, quant, grouped-gemm, …} → core
//! ```

use anyhow::{Context, Result};
use serde_json::Value;

/// The crate of the program: the only one in `crates/` that is not a library.
pub const PROGRAM: &str = "fused-moe-cli";

const CORE: &str = "fused-moe-core";
const CONFORMANCE: &str = "moe-conformance";

/// What every crate may count its allocations with in its own tests.
const COUNTING_ALLOC: &str = "counting-alloc";

/// What every backend may build on.
const BELOW_BACKENDS: &[&str] = &[
    CORE,
    "fused-moe-router",
    "fused-moe-quant",
    "grouped-gemm",
    "moe-kernels",
    "ep-transport",
    "device-runtime",
];

/// Package, or `*-suffix` for all of a kind, and the packages of this workspace that it may depend on. The first
/// row that fits decides; a package without a row is an error, so that its place is decided when it is added.
const ALLOWED: &[(&str, &[&[&str]])] = &[
    (CORE, &[]),
    ("fused-moe-router", &[&[CORE]]),
    ("fused-moe-quant", &[&[CORE]]),
    ("grouped-gemm", &[&[CORE, "fused-moe-quant"]]),
    ("moe-kernels", &[&[CORE, "device-runtime", "fused-moe-router"]]),
    ("ep-transport", &[&[CORE]]),
    ("device-runtime", &[&[CORE]]),
    ("*-comm", &[BELOW_BACKENDS]),
    ("*-experts", &[BELOW_BACKENDS]),
    ("moe-checkpoint", &[&[CORE]]),
    ("moe-cost", &[&[CORE]]),
    (CONFORMANCE, &[&[CORE, "fused-moe-quant", "fused-moe-router", "ep-transport"]]),
    ("fused-moe", &[BELOW_BACKENDS, &["*-comm", "*-experts"]]),
    (PROGRAM, &[&["fused-moe", "moe-checkpoint", "moe-cost", CONFORMANCE, "grouped-gemm"]]),
    (COUNTING_ALLOC, &[]),
    ("moe-tests", &[&["*"]]),
    ("moe-benches", &[&["*"]]),
    ("xtask", &[]),
];

/// What may use the conformance suite in its own tests.
const TESTED_BY_CONFORMANCE: &[&str] = &["*-comm", "*-experts"];

/// What the core takes from outside.
const CORE_EXTERNAL: &[&str] = &["half", "smallvec", "thiserror", "enum_dispatch"];

const LICENCE: &str = "MIT OR Apache-2.0";

/// A package of the workspace as far as the rules go.
#[derive(Debug)]
pub struct Package {
    name: String,
    licence: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug)]
struct Dependency {
    name: String,
    /// A path: a package of this workspace.
    is_ours: bool,
    is_dev: bool,
}

/// The packages in the output of `cargo metadata --no-deps`.
pub fn packages(metadata: &str) -> Result<Vec<Package>> {
    let metadata: Value = serde_json::from_str(metadata).context("reading cargo metadata")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let dependency = |value: &Value| Dependency {
        name: text(&value["name"]),
        is_ours: value["path"].is_string(),
        is_dev: value["kind"] == "dev",
    };
    let package = |value: &Value| Package {
        name: text(&value["name"]),
        licence: text(&value["license"]),
        dependencies: value["dependencies"].as_array().into_iter().flatten().map(dependency).collect(),
    };
    Ok(packages.iter().map(package).collect())
}

/// What is wrong with a package's place in the workspace.
pub fn findings(package: &Package) -> Vec<String> {
    let name = &package.name;
    let mut findings = Vec::new();
    if package.licence != LICENCE {
        findings.push(format!("{name}: licence is {:?}, not {LICENCE:?}", package.licence));
    }
    let Some((_, allowed)) = ALLOWED.iter().find(|(pattern, _)| matches(pattern, name)) else {
        findings
            .push(format!("{name}: no row in the table of allowed dependencies (xtask/src/tidy/edges.rs)"));
        return findings;
    };
    for dependency in &package.dependencies {
        let on = &dependency.name;
        if !dependency.is_ours {
            findings.extend(external(package, dependency));
            continue;
        }
        let in_table = allowed.iter().copied().flatten().any(|pattern| matches(pattern, on));
        let in_tests = dependency.is_dev
            && (on == COUNTING_ALLOC
                || on == CONFORMANCE && TESTED_BY_CONFORMANCE.iter().any(|pattern| matches(pattern, name)));
        if !in_table && !in_tests {
            findings.push(format!(
                "{name} must not depend on {on}: see the dependency direction in ARCHITECTURE.md"
            ));
        }
    }
    findings
}

/// A crate from outside where it does not belong.
fn external(package: &Package, dependency: &Dependency) -> Option<String> {
    let (name, on) = (&package.name, &dependency.name);
    if dependency.is_dev {
        return None;
    }
    if name == CORE && !CORE_EXTERNAL.contains(&on.as_str()) {
        return Some(format!(
            "{name} must not depend on {on}: it takes only {} from outside",
            CORE_EXTERNAL.join(", ")
        ));
    }
    let is_program = [PROGRAM, "xtask", "moe-tests", "moe-benches"].contains(&name.as_str());
    (on == "anyhow" && !is_program)
        .then(|| format!("{name} must not depend on anyhow: libraries have typed errors"))
}

/// `*` is any package, `*-comm` any that ends so.
fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_prefix('*').map_or(pattern == name, |suffix| name.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A package with one dependency, as cargo describes it.
    fn check(name: &str, on: &str, kind: &str, path: &str) -> Vec<String> {
        let dependency = format!(r#"{{"name": "{on}", "kind": {kind}, "path": {path}}}"#);
        let package =
            format!(r#"{{"name": "{name}", "license": "{LICENCE}", "dependencies": [{dependency}]}}"#);
        let packages = packages(&format!(r#"{{"packages": [{package}]}}"#)).unwrap();
        packages.iter().flat_map(findings).collect()
    }

    #[test]
    fn the_direction_is_kept() {
        for (name, on) in [
            ("naive-comm", "aiter-experts"),
            ("aiter-experts", "mori-comm"),
            ("mori-comm", "naive-comm"),
            ("fused-moe-core", "fused-moe-quant"),
            ("fused-moe-quant", "fused-moe-router"),
            ("mori-comm", "fused-moe"),
            ("fused-moe", "fused-moe-cli"),
            ("fused-moe-cli", "mori-comm"),
            ("mori-comm", "moe-conformance"),
            ("moe-conformance", "mori-comm"),
            ("fused-moe", "moe-conformance"),
        ] {
            assert_eq!(check(name, on, "null", "\"/x\"").len(), 1, "{name} -> {on}");
        }
        for (name, on) in [
            ("fused-moe", "anything-comm"),
            ("anything-experts", "grouped-gemm"),
            // Monolithic experts route by themselves.
            ("trtllm-experts", "fused-moe-router"),
            ("fused-moe-cli", "fused-moe"),
            ("moe-conformance", "ep-transport"),
            ("moe-tests", "mori-comm"),
        ] {
            assert_eq!(check(name, on, "null", "\"/x\""), [""; 0], "{name} -> {on}");
        }
    }

    #[test]
    fn some_crates_are_for_tests_only() {
        assert_eq!(check("fused-moe-core", "counting-alloc", "\"dev\"", "\"/x\""), [""; 0]);
        assert_eq!(check("fused-moe-core", "counting-alloc", "null", "\"/x\"").len(), 1);
        assert_eq!(check("mori-comm", "moe-conformance", "\"dev\"", "\"/x\""), [""; 0]);
        assert_eq!(check("mori-comm", "aiter-experts", "\"dev\"", "\"/x\"").len(), 1);
        assert_eq!(check("fused-moe-quant", "moe-conformance", "\"dev\"", "\"/x\"").len(), 1);
    }

    #[test]
    fn outside_crates_stay_where_they_belong() {
        assert_eq!(check("fused-moe-core", "half", "null", "null"), [""; 0]);
        assert_eq!(check("fused-moe-core", "rayon", "null", "null").len(), 1);
        assert_eq!(check("fused-moe-core", "rstest", "\"dev\"", "null"), [""; 0]);
        assert_eq!(check("fused-moe-quant", "anyhow", "null", "null").len(), 1);
        assert_eq!(check("fused-moe-cli", "anyhow", "null", "null"), [""; 0]);
    }

    #[test]
    fn a_package_needs_a_row_and_the_licence() {
        assert_eq!(check("newcomer", "half", "null", "null").len(), 1);
        let bare = r#"{"packages": [{"name": "xtask", "license": null, "dependencies": []}]}"#;
        assert_eq!(packages(bare).unwrap().iter().flat_map(findings).count(), 1);
    }
}
