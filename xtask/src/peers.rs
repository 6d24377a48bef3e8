//! `bench peers`: the experts of one rank, ours and other people's, measured in turn on the same calls.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rand::{SeedableRng, seq::index};
use rand_pcg::Pcg64Mcg;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::repo::{Repo, stdout_of};

/// What `cargo xtask bench peers` was asked for.
#[derive(Args)]
pub struct Peers {
    /// Shapes: names of files in benches/definitions.
    #[arg(long, value_delimiter = ',', default_value = "qwen3-30b-a3b,deepseek-v3-ep32")]
    shapes: Vec<String>,
    /// Tokens per call.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64,512")]
    tokens: Vec<usize>,
    /// Threads. One is measured by CPU time, more by wall time.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    threads: Vec<usize>,
    /// Our schemes, as `fmoe bench experts --quant` names them, and f32.
    #[arg(long, value_delimiter = ',', default_value = "none,fp8-block")]
    quant: Vec<String>,
    /// Peers of benches/peers/experts.py; none with an empty value.
    #[arg(long, value_delimiter = ',', default_value = "torch-loop,torch-grouped,sgl-bf16,sgl-fp8-w8a16")]
    kernels: Vec<String>,
    /// Rust peers of benches/peers/rust; none unless given.
    #[arg(long, value_delimiter = ',')]
    rust: Vec<String>,
    /// Calls per sitting and number of tokens, of which the median counts.
    #[arg(long, default_value_t = 9)]
    reps: usize,
    /// How often everything is measured, ours and theirs in turn.
    #[arg(long, default_value_t = 3)]
    sittings: usize,
    /// A Python with the packages of benches/peers/requirements.txt, instead of one that is set up in target/peers.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Print one JSON object, for `benches/record`.
    #[arg(long)]
    json: bool,
}

/// What every program here prints of a kernel.
#[derive(Deserialize)]
struct Measured {
    #[serde(alias = "scheme")]
    kernel: String,
    tokens: usize,
    median_ms: f64,
    #[serde(default)]
    fraction_of_roof: Option<f64>,
}

#[derive(Deserialize)]
struct Printed {
    rows: Vec<Measured>,
}

/// One line of the result: a kernel at one shape, number of tokens and threads, over all sittings.
#[derive(Serialize)]
struct Line {
    shape: String,
    threads: usize,
    tokens: usize,
    kernel: String,
    /// Median over the sittings of their medians.
    median_ms: f64,
    /// The medians of the sittings, ascending.
    sittings_ms: Vec<f64>,
    /// Of the machine's limit, where the program knows it.
    fraction_of_roof: Option<f64>,
}

/// Measures and prints.
pub fn peers(repo: &Repo, wanted: &Peers) -> Result<()> {
    ensure!(wanted.reps > 0 && wanted.sittings > 0, "--reps and --sittings are at least 1");
    let folder = repo.root().join("target/peers");
    std::fs::create_dir_all(&folder)?;
    let programs = Programs::build(repo, wanted, &folder)?;
    let mut lines = Vec::new();
    for shape in &wanted.shapes {
        let definition = repo.root().join("benches/definitions").join(format!("{shape}.toml"));
        let routing = folder.join(format!("{shape}.json"));
        write_calls(&definition, &routing, wanted)?;
        for &threads in &wanted.threads {
            let mut sittings: BTreeMap<(usize, String), Vec<Measured>> = BTreeMap::new();
            for sitting in 1..=wanted.sittings {
                eprintln!("{shape}, {threads} threads, sitting {sitting} of {}", wanted.sittings);
                for row in programs.measure(&definition, &routing, threads, wanted)? {
                    sittings.entry((row.tokens, row.kernel.clone())).or_default().push(row);
                }
            }
            lines.extend(
                sittings
                    .into_iter()
                    .map(|((tokens, kernel), rows)| line(shape, threads, tokens, kernel, rows)),
            );
        }
    }
    match wanted.json {
        true => println!("{}", serde_json::to_string_pretty(&json!({ "lines": lines }))?),
        false => print_table(&lines),
    }
    Ok(())
}

fn line(shape: &str, threads: usize, tokens: usize, kernel: String, rows: Vec<Measured>) -> Line {
    let mut sittings_ms: Vec<f64> = rows.iter().map(|row| row.median_ms).collect();
    let mut roofs: Vec<f64> = rows.iter().filter_map(|row| row.fraction_of_roof).collect();
    sittings_ms.sort_by(f64::total_cmp);
    roofs.sort_by(f64::total_cmp);
    Line {
        shape: shape.to_owned(),
        threads,
        tokens,
        kernel,
        median_ms: sittings_ms[sittings_ms.len() / 2],
        fraction_of_roof: roofs.get(roofs.len() / 2).copied(),
        sittings_ms,
    }
}

fn print_table(lines: &[Line]) {
    println!(
        "{:<18} {:>7} {:>6} {:<22} {:>10} {:>8}",
        "shape", "threads", "tokens", "kernel", "median ms", "of roof"
    );
    for line in lines {
        let roof = line.fraction_of_roof.map_or(String::new(), |part| format!("{:.0} %", part * 100.0));
        println!(
            "{:<18} {:>7} {:>6} {:<22} {:>10.3} {roof:>8}",
            line.shape, line.threads, line.tokens, line.kernel, line.median_ms
        );
    }
}

/// The routings of all calls, drawn uniformly.
fn write_calls(definition: &Path, routing: &Path, wanted: &Peers) -> Result<()> {
    #[derive(Deserialize)]
    struct Shape {
        experts: usize,
        top_k: usize,
    }
    let text =
        std::fs::read_to_string(definition).with_context(|| format!("reading {}", definition.display()))?;
    let Shape { experts, top_k } = toml::from_str(&text)?;
    ensure!(top_k <= experts, "top-{top_k} of {experts} experts in {}", definition.display());
    let mut random = Pcg64Mcg::seed_from_u64(7);
    let mut calls = Vec::new();
    for &tokens in &wanted.tokens {
        for _ in 0..wanted.reps {
            let ids = (0..tokens).flat_map(|_| index::sample(&mut random, experts, top_k).into_vec());
            calls.push(ids.collect::<Vec<_>>());
        }
    }
    std::fs::write(routing, json!({ "calls": calls }).to_string())?;
    Ok(())
}

/// What is run in turn.
struct Programs {
    fmoe: PathBuf,
    rust: PathBuf,
    python: PathBuf,
    script: PathBuf,
    sgl: PathBuf,
}

impl Programs {
    fn build(repo: &Repo, wanted: &Peers, folder: &Path) -> Result<Self> {
        let run = |command: &mut Command| -> Result<()> {
            eprintln!("==> {command:?}");
            let status = command.status().with_context(|| format!("starting {command:?}"))?;
            ensure!(status.success(), "{command:?} ended with {status}");
            Ok(())
        };
        let peers = repo.root().join("benches/peers");
        run(repo.cargo().args(["build", "--release", "--package", "fused-moe-cli"]))?;
        if !wanted.rust.is_empty() {
            let manifest = peers.join("rust/Cargo.toml");
            let target = folder.join("rust");
            run(repo
                .cargo()
                .args(["build", "--release", "--manifest-path"])
                .arg(manifest)
                .arg("--target-dir")
                .arg(&target))?;
        }
        let python = match &wanted.python {
            Some(python) => python.clone(),
            None => {
                let venv = folder.join("venv");
                let python = venv.join("bin/python");
                if !python.exists() && !wanted.kernels.is_empty() {
                    run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
                    let requirements = peers.join("requirements.txt");
                    run(Command::new(&python).args(["-m", "pip", "install", "-r"]).arg(requirements))?;
                }
                python
            }
        };
        Ok(Self {
            fmoe: repo.root().join("target/release/fmoe"),
            rust: folder.join("rust/release/peers"),
            python,
            script: peers.join("experts.py"),
            sgl: folder.join("sgl"),
        })
    }

    fn measure(
        &self,
        definition: &Path,
        routing: &Path,
        threads: usize,
        wanted: &Peers,
    ) -> Result<Vec<Measured>> {
        let threads = threads.to_string();
        let mut rows = Vec::new();
        let mut add = |whose: &str, command: &mut Command| -> Result<()> {
            let printed = stdout_of(command)?;
            let printed: Printed =
                serde_json::from_str(&printed).with_context(|| format!("what {command:?} printed"))?;
            rows.extend(
                printed
                    .rows
                    .into_iter()
                    .map(|row| Measured { kernel: format!("{whose}{}", row.kernel), ..row }),
            );
            Ok(())
        };
        let (f32, quants): (Vec<String>, Vec<String>) =
            wanted.quant.iter().cloned().partition(|quant| quant == "f32");
        for schemes in [vec!["--f32".to_owned(); f32.len()], vec!["--quant".to_owned(), quants.join(",")]] {
            if schemes.last().is_none_or(|last| last.is_empty()) {
                continue;
            }
            let mut ours = Command::new(&self.fmoe);
            ours.args(["bench", "experts", "--json", "--threads", &threads]).args(schemes);
            add("fused-moe ", ours.arg("--shape").arg(definition).arg("--routing").arg(routing))?;
        }
        if !wanted.kernels.is_empty() {
            let mut theirs = Command::new(&self.python);
            theirs.arg(&self.script).args(["--threads", &threads, "--kernels", &wanted.kernels.join(",")]);
            theirs.arg("--sgl").arg(&self.sgl);
            // torch waits for its threads by spinning otherwise, which is charged to the call as CPU time.
            theirs.env("OMP_NUM_THREADS", &threads);
            add("", theirs.arg("--shape").arg(definition).arg("--routing").arg(routing))?;
        }
        if !wanted.rust.is_empty() {
            let mut theirs = Command::new(&self.rust);
            theirs.args(["--threads", &threads, "--kernels", &wanted.rust.join(",")]);
            add("", theirs.arg("--shape").arg(definition).arg("--routing").arg(routing))?;
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_and_theirs_are_read_alike() {
        let ours =
            r#"{"rows": [{"scheme": "fp8-block", "tokens": 8, "median_ms": 2.0, "fraction_of_roof": 0.9}]}"#;
        let theirs = r#"{"shape": "s", "rows": [{"kernel": "torch-loop", "tokens": 8, "median_ms": 3.0}]}"#;
        let rows: Vec<Measured> = [ours, theirs]
            .into_iter()
            .flat_map(|printed| serde_json::from_str::<Printed>(printed).unwrap().rows)
            .collect();
        assert_eq!(
            rows.iter().map(|row| row.kernel.as_str()).collect::<Vec<_>>(),
            ["fp8-block", "torch-loop"]
        );
        assert_eq!((rows[0].fraction_of_roof, rows[1].fraction_of_roof), (Some(0.9), None));
    }

    #[test]
    fn a_line_has_the_median_of_the_sittings() {
        let row = |median_ms| Measured { kernel: "k".into(), tokens: 1, median_ms, fraction_of_roof: None };
        let line = line("s", 1, 1, "k".into(), vec![row(3.0), row(1.0), row(2.0)]);
        assert_eq!((line.median_ms, line.sittings_ms), (2.0, vec![1.0, 2.0, 3.0]));
    }
}
