//! `fmoe demo`: made-up checkpoints, every dispatch backend, checked against the oracle.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, anyhow};
use fused_moe::{BLOCK, Rank, Registry};
use half::bf16;
use moe_checkpoint::Checkpoint;
use rand::SeedableRng;
use rand_pcg::Pcg64;

use crate::args::{DemoArgs, LayerArgs, OnDevice, Quant};
use crate::ep::{self, LoadedLayer};
use crate::eplb::Replicas;
use crate::exit::{Failure, OrFailure, refused};
use crate::layer;
use crate::report::{human_bytes, print};
use crate::run::progress;
use crate::synthetic::{Family, Model, normal};
use crate::tokens::HiddenStates;
use crate::verify::{self, Subject};

const MODELS: [Model; 3] = [
    Model {
        name: "qwen3-moe bf16",
        family: Family::Qwen3Moe,
        fp8_block: false,
        hidden: 512,
        intermediate: 192,
        experts: 64,
        top_k: 8,
    },
    Model {
        name: "qwen3-moe fp8-block",
        family: Family::Qwen3Moe,
        fp8_block: true,
        hidden: 512,
        intermediate: 192,
        experts: 64,
        top_k: 8,
    },
    Model {
        name: "deepseek-v3 fp8-block",
        family: Family::DeepSeekV3,
        fp8_block: true,
        hidden: 896,
        intermediate: 256,
        experts: 64,
        top_k: 8,
    },
];

const BACKENDS: [&str; 3] = ["mori_high_throughput", "allgather_reducescatter", "naive"];

const ON_DEVICE: [&str; 1] = ["local"];

/// More would not be a demonstration.
const MAX_TOKENS: usize = 1 << 16;

/// Runs the command.
pub fn run(args: &DemoArgs) -> Result<(), Failure> {
    let (usual, backends, whole) = match args.device {
        OnDevice::Host => (8, &BACKENDS[..], 1),
        _ => (1, &ON_DEVICE[..], BLOCK),
    };
    let ep_size = args.ep_size.unwrap_or(usual);
    if ep_size == 0 {
        return refused("--ep-size 0: at least one rank is needed");
    }
    if args.tokens > MAX_TOKENS {
        return refused(format!("--tokens {}: at most {MAX_TOKENS}", args.tokens));
    }
    let temporary;
    let folder: &Path = match &args.keep {
        Some(folder) if folder.exists() => return refused(format!("{} exists already", folder.display())),
        Some(folder) => folder,
        None => {
            temporary = tempfile::tempdir().or_failed()?;
            temporary.path()
        }
    };
    // New numbers every time; the seed is printed so that a failure can be repeated.
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
    let registry = fused_moe::backends_on(args.device.device());
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "checkpoint",
        "all2all x experts",
        "wire",
        "router",
        "dispatch",
        "experts",
        "combine",
        "total",
        "sent",
        "error",
    ]);
    let mut failures = Vec::new();
    let bar = progress((MODELS.len() * backends.len()) as u64, "running");
    for model in MODELS {
        // Kernels of devices take whole tiles.
        let model = Model { intermediate: model.intermediate.next_multiple_of(whole), ..model };
        let folder: PathBuf = folder.join(model.name.replace(' ', "-"));
        model.write(&folder, seed).or_failed()?;
        let checkpoint = Checkpoint::open(&folder).or_failed()?;
        let hidden = hidden_states(args.tokens, model.hidden, seed);
        for &backend in backends {
            let subject = Demo {
                registry: &registry,
                checkpoint: &checkpoint,
                hidden: &hidden,
                ep_size,
                device: args.device,
            };
            let (row, passes) = subject.run(backend)?;
            if !passes {
                failures.push(format!("{} with {backend}", model.name));
            }
            table.add_row(std::iter::once(model.name.to_string()).chain(row));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let tokens = args.tokens;
    let times = match args.device {
        OnDevice::Host => "times are those of the slowest rank, in ms",
        _ => "times of stages are those to enqueue them, in ms; the total is with copies",
    };
    print(format_args!(
        "{tokens} tokens over {ep_size} ranks in threads of this process, seed {seed}\n{table}\n\
         {times}; sent is what the transport counted between ranks;\n\
         error is the relative L2 distance to the f64 oracle, which quantises where the layer does"
    ))
    .or_failed()?;
    if failures.is_empty() {
        return Ok(());
    }
    Err(Failure::Failed(anyhow!("error above its bound: {}", failures.join(", "))))
}

/// Normal hidden states in which a few channels are much larger than the others, as in real models.
fn hidden_states(tokens: usize, hidden: usize, seed: u64) -> HiddenStates {
    let mut random = Pcg64::seed_from_u64(seed ^ 0x9e37_79b9);
    let value = |i: usize, x: f32| bf16::from_f32(if i % hidden % 97 == 13 { 8.0 * x } else { x });
    let values = (0..tokens * hidden).map(|i| value(i, normal(&mut random))).collect();
    HiddenStates { values, tokens }
}

struct Demo<'d> {
    registry: &'d Registry,
    checkpoint: &'d Checkpoint,
    hidden: &'d HiddenStates,
    ep_size: usize,
    device: OnDevice,
}

impl Demo<'_> {
    /// One row of the table, and whether every element is within its bound.
    fn run(&self, backend: &str) -> Result<(Vec<String>, bool), Failure> {
        let ranks = self.ep_size;
        let args = LayerArgs {
            layer: None,
            ep_size: ranks,
            device: self.device,
            all2all: Some(backend.to_string()),
            experts: "auto".into(),
            quant: Quant::Auto,
            combine_quant: Default::default(),
            sort_policy: Default::default(),
            gpus_per_node: None,
        };
        let stored = layer::open(self.checkpoint, None)?;
        let max_tokens = ep::share(self.hidden.tokens, ranks, Rank(0)).len();
        let config = layer::config(&stored, &args, max_tokens)?;
        let selection = layer::selection(&args);
        let plan = layer::choose(self.registry, &config, selection)?.plan;
        let replicas = Replicas::new(None, stored.index(), config)?;
        let weights = layer::load(self.registry, &stored, &replicas, &plan, || ())?;
        let shared =
            layer::load_shared(self.registry, &stored, &replicas.config, plan.experts(), args.quant)?;
        let loaded = LoadedLayer { stored: &stored, replicas: &replicas, shared: shared.as_ref() };
        let done = ep::run(self.registry, (&loaded, &weights), selection, self.hidden);
        let done = done.with_context(|| backend.to_string()).or_failed()?;
        let subject = Subject { stored: &stored, replicas: &replicas, plan: &plan, quant: args.quant };
        let verdict = verify::verify(&subject, self.hidden, &done).or_failed()?;
        let ms = |time: std::time::Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
        let times = done.times;
        let row = vec![
            format!("{} x {}", plan.comm(), plan.experts()),
            plan.wire().to_string(),
            ms(times.router),
            ms(times.stages.dispatch),
            ms(times.stages.experts),
            ms(times.stages.combine),
            ms(times.total),
            human_bytes(done.traffic.remote_bytes as f64),
            format!("{:.1e} {}", verdict.output, if verdict.passes { "ok" } else { "TOO LARGE" }),
        ];
        Ok((row, verdict.passes))
    }
}
