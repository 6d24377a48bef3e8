//! `fmoe` as a program of MPI ranks: what it writes is what it writes over threads.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Job;

/// A small model with a shared expert and FP8 weights.
const CHECKPOINT: &str = "tests/golden/deepseek_v3_fp8_block";

/// What is run over every job.
const BACKENDS: [&str; 4] = ["mori_high_throughput", "mori_low_latency", "allgather_reducescatter", "naive"];

/// A call of `fmoe run`.
struct Call<'c> {
    /// Instead of [`CHECKPOINT`].
    checkpoint: Option<&'c str>,
    ep_size: usize,
    all2all: &'c str,
    ranks: &'c str,
    output: &'c Path,
}

impl Call<'_> {
    /// The words of the command line; half of the ranks are on each node.
    fn words(&self, job: &Job<'_>) -> Vec<String> {
        let golden = job.repo.root().join(CHECKPOINT);
        let path = |path: PathBuf| path.display().to_string();
        let input = path(golden.join("input.safetensors"));
        let checkpoint = self.checkpoint.map_or_else(|| path(golden), str::to_owned);
        let mut words = vec!["run".to_owned(), "--verify".to_owned()];
        for (option, value) in [
            ("--checkpoint", checkpoint),
            ("--input", input),
            ("--output", path(self.output.to_path_buf())),
            ("--ep-size", self.ep_size.to_string()),
            ("--gpus-per-node", self.ep_size.div_ceil(2).to_string()),
            ("--all2all", self.all2all.to_owned()),
            ("--ranks", self.ranks.to_owned()),
        ] {
            words.extend([option.to_owned(), value]);
        }
        words
    }

    /// The program under `mpirun`.
    fn over(&self, job: &Job<'_>) -> Command {
        job.command(&self.words(job).iter().map(String::as_str).collect::<Vec<_>>())
    }
}

fn folder(job: &Job<'_>) -> Result<PathBuf> {
    let dir = job.repo.root().join("target/mpi-test");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// Runs the same layer over threads and over `job`, on every backend, and compares the files.
pub fn writes_the_same(job: &Job<'_>) -> Result<()> {
    let [here, there] =
        ["threads.safetensors", "mpi.safetensors"].map(|name| folder(job).map(|dir| dir.join(name)));
    let (here, there) = (here?, there?);
    for all2all in BACKENDS {
        let call = Call { checkpoint: None, ep_size: job.ranks, all2all, ranks: "threads", output: &here };
        succeeds(Command::new(job.program).args(call.words(job)))?;
        succeeds(&mut Call { ranks: "mpi", output: &there, ..call }.over(job))?;
        let read = |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
        ensure!(read(&here)? == read(&there)?, "{all2all}: ranks of MPI gave other bits than threads");
        std::fs::remove_file(&there)?;
    }
    Ok(())
}

/// A job of another size than was asked for, and a checkpoint that is not there: refused once, for all ranks.
pub fn refuses(job: &Job<'_>) -> Result<()> {
    let output = &folder(job)?.join("refused.safetensors");
    let call = Call { checkpoint: None, ep_size: job.ranks, all2all: BACKENDS[0], ranks: "mpi", output };
    let small = Call { ep_size: job.ranks / 2, ..call };
    refused(
        &mut small.over(job),
        &[&format!("--ep-size {}", small.ep_size), &format!("{} ranks", job.ranks)],
    )?;
    refused(&mut Call { checkpoint: Some("/nowhere"), ..call }.over(job), &["/nowhere"])?;
    ensure!(!output.exists(), "a refused run has written {}", output.display());
    Ok(())
}

fn refused(command: &mut Command, wanted: &[&str]) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(2), "{command:?} ended with {}:\n{said}", output.status);
    ensure!(wanted.iter().all(|word| said.contains(word)), "{command:?} does not name {wanted:?}:\n{said}");
    let times = said.matches("fmoe: ").count();
    ensure!(times == 1, "{command:?} was refused {times} times:\n{said}");
    Ok(())
}

fn succeeds(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    ensure!(output.status.success(), "{command:?} ended with {}:\n{}", output.status, said.concat());
    Ok(())
}
