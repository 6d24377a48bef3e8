//! The support table of the README: written, compared, and tested in full.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::repo::{Repo, stdout_of};
use crate::steps::Steps;

const BEGIN: &str = "<!-- matrix:begin -->";
const END: &str = "<!-- matrix:end -->";

/// What `cargo xtask matrix` was asked for.
pub enum MatrixAction {
    /// Put the table into the README.
    Write,
    /// Fail if the table in the README is stale.
    Compare,
    /// Run the full product of combinations as a test.
    FullTest,
}

/// Runs the action.
pub fn matrix(repo: &Repo, action: MatrixAction) -> Result<()> {
    let readme = repo.root().join("README.md");
    match action {
        MatrixAction::Write => {
            let old = read(&readme)?;
            let new = with_table(&old, &table(repo)?)?;
            if new == old {
                eprintln!("README.md is up to date");
                return Ok(());
            }
            std::fs::write(&readme, new).context("writing README.md")?;
            eprintln!("README.md: support table written");
            Ok(())
        }
        MatrixAction::Compare => compare(repo),
        MatrixAction::FullTest => {
            let mut steps = Steps::new("matrix --full");
            let test = ["test", "--release", "-p", "moe-tests", "--test", "matrix", "--", "--full"];
            steps.command("matrix", repo.cargo().args(test))?;
            steps.finish();
            Ok(())
        }
    }
}

/// Fails if the table in the README is not what `fmoe matrix` prints.
pub fn compare(repo: &Repo) -> Result<()> {
    let old = read(&repo.root().join("README.md"))?;
    let new = with_table(&old, &table(repo)?)?;
    ensure!(new == old, "README.md: the support table is stale; run `cargo xtask matrix`");
    Ok(())
}

fn read(readme: &Path) -> Result<String> {
    std::fs::read_to_string(readme).with_context(|| format!("reading {}", readme.display()))
}

/// The table as `fmoe` prints it from the registered capabilities.
fn table(repo: &Repo) -> Result<String> {
    let run = ["run", "--quiet", "--package", "fused-moe-cli", "--bin", "fmoe", "--", "matrix", "--markdown"];
    let printed = stdout_of(repo.cargo().args(run))?;
    ensure!(printed.contains('|'), "`fmoe matrix --markdown` printed no table: {printed:?}");
    Ok(printed)
}

/// `readme` with `table` between the markers.
fn with_table(readme: &str, table: &str) -> Result<String> {
    let (Some(begin), Some(end)) = (readme.find(BEGIN), readme.find(END)) else {
        bail!("README.md lacks the markers {BEGIN} and {END}");
    };
    let head = begin + BEGIN.len();
    ensure!(head <= end, "README.md: {END} comes before {BEGIN}");
    Ok(format!("{}\n{}\n{}", &readme[..head], table.trim(), &readme[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_replaces_what_is_between_the_markers_and_nothing_else() {
        let readme = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = with_table(&readme, "| new |\n\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\n| new |\n{END}\nb\n"));
        assert_eq!(with_table(&new, "| new |\n").unwrap(), new, "writing twice changes nothing");
    }

    #[test]
    fn missing_or_swapped_markers_are_refused() {
        assert!(with_table("no markers", "t").is_err());
        assert!(with_table(&format!("{END} {BEGIN}"), "t").is_err());
    }
}
