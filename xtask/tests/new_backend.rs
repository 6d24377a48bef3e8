//! What `new-backend` makes compiles without a warning and is refused by the conformance suite.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An empty workspace that takes its versions from this repository.
///
/// A crate in `crates/` inherits them, a crate in `elsewhere/own/` does not.
fn workspace() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root");
    let workspace = Path::new(env!("CARGO_TARGET_TMPDIR")).join("new-backend");
    match fs::remove_dir_all(&workspace) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    for folder in ["crates", "elsewhere/own"] {
        fs::create_dir_all(workspace.join(folder)).unwrap();
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let lines = manifest.lines().map(|line| match line.split(" = ").next() {
        Some("members") => "members = [\"crates/*\", \"elsewhere/own/*\"]\n".into(),
        Some("default-members") => "\n".into(),
        _ => line.replace("path = \"", &format!("path = \"{}/", root.display())) + "\n",
    });
    fs::write(workspace.join("Cargo.toml"), lines.collect::<String>()).unwrap();
    fs::copy(root.join("Cargo.lock"), workspace.join("Cargo.lock")).unwrap();
    workspace
}

fn new_backend(workspace: &Path, name: &str, kind: &str, parent: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["new-backend", name, "--kind", kind, "--path"]).arg(workspace.join(parent));
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// Runs cargo in `workspace`, sharing what has been built already, and returns what it printed.
fn cargo(workspace: &Path, task: &str, behind: &[&str]) -> String {
    let target = Path::new(env!("CARGO_BIN_EXE_xtask")).ancestors().nth(2).expect("target/profile/xtask");
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(workspace).args([task, "--quiet", "--offline", "--workspace", "--all-targets"]);
    command.arg("--target-dir").arg(target).arg("--").args(behind);
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}\n{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    stdout
}

#[test]
fn a_new_backend_compiles_and_is_refused() {
    let workspace = workspace();
    new_backend(&workspace, "probe-comm", "comm", "crates");
    new_backend(&workspace, "probe-experts", "experts", "elsewhere/own");

    let manifest = |dir: &str| fs::read_to_string(workspace.join(dir).join("Cargo.toml")).unwrap();
    assert!(manifest("crates/probe-comm").contains("fused-moe-core.workspace = true"));
    assert!(!manifest("elsewhere/own/probe-experts").contains("workspace"));

    cargo(&workspace, "clippy", &["-D", "warnings"]);
    let printed = cargo(&workspace, "test", &["--nocapture"]);
    let cases = |outcome: &str| printed.lines().filter(|line| line.contains(outcome)).count();
    assert_eq!((cases("0 of "), cases(": pass")), (2, 0), "{printed}");
    assert!(cases(": refused") > 2 && cases("yet") > 2, "{printed}");
}

#[test]
fn nothing_is_overwritten() {
    let parent = Path::new(env!("CARGO_TARGET_TMPDIR")).join("new-backend-taken");
    fs::create_dir_all(parent.join("taken-comm")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let status =
        command.args(["new-backend", "taken-comm", "--kind", "comm", "--path"]).arg(&parent).status();
    assert!(!status.unwrap().success());
    assert_eq!(fs::read_dir(parent.join("taken-comm")).unwrap().count(), 0);
}
