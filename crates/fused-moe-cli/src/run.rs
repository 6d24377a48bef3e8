//! `fmoe run`: one layer of a checkpoint on hidden states from a file.

use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::anyhow;
use fused_moe::transport::Endpoint;
use fused_moe::{DeviceKind, Plan, Rank, Registry};
use indicatif::{ProgressBar, ProgressStyle};
use moe_checkpoint::{Checkpoint, MoeLayer};
use serde::Serialize;

use crate::args::{Ranks, RunArgs};
use crate::ep::{self, LayerRun, LoadedLayer};
use crate::eplb::{BalanceReport, Recorded, Replicas, to_json};
#[cfg(not(feature = "mpi"))]
use crate::exit::WITHOUT_MPI;
use crate::exit::{Failure, OrFailure, refused};
use crate::layer::{self, Choice, SharedLayer};
#[cfg(feature = "mpi")]
use crate::mpi::Job;
#[cfg(target_os = "linux")]
use crate::processes::{Group, World};
use crate::report::{
    BytesReport, PlanReport, RejectedReport, TimesReport, TrafficReport, human_bytes, print, print_json,
};
use crate::spmd;
use crate::tokens::{HiddenStates, OutputFile};
use crate::tune;
use crate::verify::{self, Subject, Verdict};

#[derive(Serialize)]
struct Report {
    layer: usize,
    tokens: usize,
    ep_size: usize,
    device: String,
    scheme: String,
    plan: PlanReport,
    rejected: Vec<RejectedReport>,
    bytes_per_rank: BytesReport,
    times_ms: TimesReport,
    wire: TrafficReport,
    load: BalanceReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    verify: Option<Verdict>,
}

/// Runs the command.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    if args.ranks == Ranks::Mpi { run_as_mpi_rank(args) } else { run_with(args, None) }
}

#[cfg(feature = "mpi")]
fn run_as_mpi_rank(args: &RunArgs) -> Result<(), Failure> {
    let job = Job::join(ep::TIMEOUT)?;
    let ranks_per_node = args.layer.gpus_per_node.unwrap_or(args.layer.ep_size);
    let group = job.everyone(args.layer.ep_size, ranks_per_node);
    job.told_once(group.and_then(|group| run_with(args, Some(&group)))).map(drop)
}

#[cfg(not(feature = "mpi"))]
fn run_as_mpi_rank(_: &RunArgs) -> Result<(), Failure> {
    refused(WITHOUT_MPI)
}

/// Runs the command in this process: as a rank of `job`, or as the one that has or starts the ranks.
fn run_with(args: &RunArgs, job: Option<&Endpoint>) -> Result<(), Failure> {
    let executor = args.tuning.as_deref().map(tune::executor).transpose().or_refused();
    let executor = agreed(job, executor)?;
    let registry = layer::tuned_backends(&args.layer, executor);
    let checkpoint = agreed(job, Checkpoint::open(&args.checkpoint).or_refused())?;
    let reports = job.is_none_or(|group| group.transport().rank() == Rank(0));
    let Prepared { files, stored, hidden, replicas, choice } =
        agreed(job, Prepared::new(args, &registry, &checkpoint, reports))?;
    let (config, Choice { plan, survey }) = (&replicas.config, choice);
    tracing::info!(all2all = plan.comm(), experts = plan.experts(), wire = %plan.wire(), "plan");

    let layer = Layer {
        args,
        registry: &registry,
        stored: &stored,
        replicas: &replicas,
        plan: &plan,
        hidden: &hidden,
    };
    let (Some(done), Some(files)) = (layer.run(job)?, files) else { return Ok(()) };
    let verdict = if args.verify {
        let spinner = progress(0, "computing the oracle");
        let subject = Subject { stored: &stored, replicas: &replicas, plan: &plan, quant: args.layer.quant };
        let verdict = verify::verify(&subject, &hidden, &done).or_failed()?;
        spinner.finish_and_clear();
        Some(verdict)
    } else {
        None
    };
    let passes = verdict.is_none_or(|v| v.passes);
    let recorded = Recorded::new(&replicas, stored.index(), &done.slots).or_failed()?;
    let staged = passes.then(|| files.output.stage(&done.output)).transpose().or_failed()?;
    let staged_load = files.load.as_ref().filter(|_| passes);
    let staged_load = staged_load.map(|file| file.stage_bytes(&to_json(&recorded.file)?));
    let staged_load = staged_load.transpose().or_failed()?;
    let report = Report {
        layer: stored.index(),
        tokens: hidden.tokens,
        ep_size: config.ep_size(),
        device: format!("{:?}", config.device).to_lowercase(),
        scheme: config.quant.to_string(),
        plan: (&plan).into(),
        rejected: survey.refused.iter().map(Into::into).collect(),
        bytes_per_rank: done.bytes.into(),
        times_ms: done.times.into(),
        wire: done.traffic.into(),
        load: recorded.balance,
        verify: verdict,
    };
    if args.json {
        print_json(&report).or_failed()?;
    } else {
        let (comm, experts, wire) = (plan.comm(), plan.experts(), plan.wire());
        print(format_args!(
            "layer {}: {} tokens over {} ranks, {}\nplan: {comm} x {experts}, wire {wire}",
            report.layer, report.tokens, report.ep_size, config.quant
        ))
        .or_failed()?;
        let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
        let stages = done.times.stages;
        print(format_args!(
            "time: router {}, dispatch {}, experts {}, combine {} (shared experts {}), total {}\n\
             wire: {} between ranks\n\
             load: the busiest rank has {:.3} times the mean",
            ms(done.times.router),
            ms(stages.dispatch),
            ms(stages.experts),
            ms(stages.combine),
            ms(done.times.shared),
            ms(done.times.total),
            human_bytes(done.traffic.remote_bytes as f64),
            report.load.max_over_mean,
        ))
        .or_failed()?;
        if config.device != DeviceKind::Host {
            let device = &report.device;
            print(format_args!(
                "on {device}: times of stages are those to enqueue them; the total is with copies"
            ))
            .or_failed()?;
        }
        if let Some(v) = verdict {
            print(format_args!(
                "against the oracle: {:.3} of the error bound at worst (relative L2 error: routed {:.2e}, output {:.2e})",
                v.bound_ratio, v.routed, v.output
            ))
            .or_failed()?;
        }
    }
    // Last, so that a report that cannot be printed leaves no output behind.
    for staged in [staged_load, staged].into_iter().flatten() {
        staged.commit().or_failed()?;
    }
    match verdict {
        Some(v) if !passes => Err(Failure::Failed(anyhow!(
            "verification failed: an element is {:.3e} times its error bound off (relative L2 error: routed {:.3e}, \
             output {:.3e}, at most {:.1e} can be right); {} was not written",
            v.bound_ratio,
            v.routed,
            v.output,
            v.tolerance,
            args.output.display()
        ))),
        _ => Ok(()),
    }
}

/// The files to write.
struct Files {
    output: OutputFile,
    load: Option<OutputFile>,
}

impl Files {
    fn check(args: &RunArgs) -> Result<Self, Failure> {
        let output = OutputFile::check(&args.output).or_refused()?;
        let load = args.record_load.as_deref().map(OutputFile::check).transpose().or_refused()?;
        if load.as_ref().is_some_and(|load| load.is(&output)) {
            return refused("--record-load and --output are the same file");
        }
        Ok(Self { output, load })
    }
}

/// What the arguments ask for, checked before anything is loaded.
struct Prepared<'c> {
    /// Of the rank that reports.
    files: Option<Files>,
    stored: MoeLayer<'c>,
    hidden: HiddenStates,
    replicas: Replicas,
    choice: Choice,
}

impl<'c> Prepared<'c> {
    fn new(
        args: &RunArgs,
        registry: &Registry,
        checkpoint: &'c Checkpoint,
        reports: bool,
    ) -> Result<Self, Failure> {
        let selection = layer::selection(&args.layer);
        layer::check_names(registry, selection)?;
        let files = reports.then(|| Files::check(args)).transpose()?;
        let stored = layer::open(checkpoint, args.layer.layer)?;
        let hidden = HiddenStates::read(&args.input, stored.model().hidden).or_refused()?;
        let max_tokens = hidden.tokens.div_ceil(args.layer.ep_size.max(1));
        let config = layer::config(&stored, &args.layer, max_tokens)?;
        let replicas = Replicas::new(args.placement.as_deref(), stored.index(), config)?;
        let choice = layer::choose(registry, &replicas.config, selection)?;
        Ok(Self { files, stored, hidden, replicas, choice })
    }
}

/// What all ranks of `job` agree on; without a job, what there is.
fn agreed<T>(job: Option<&Endpoint>, mine: Result<T, Failure>) -> Result<T, Failure> {
    match job {
        Some(group) => spmd::agree(group, mine),
        None => mine,
    }
}

/// A layer that can be run.
struct Layer<'j> {
    args: &'j RunArgs,
    registry: &'j Registry,
    stored: &'j MoeLayer<'j>,
    replicas: &'j Replicas,
    plan: &'j Plan,
    hidden: &'j HiddenStates,
}

impl Layer<'_> {
    /// Loads the layer and runs it. `None` in a process that is not the one to report.
    fn run(&self, job: Option<&Endpoint>) -> Result<Option<LayerRun>, Failure> {
        match (job, self.args.ranks) {
            (Some(group), _) => {
                let done = self.as_rank(group)?;
                Ok((group.transport().rank() == Rank(0)).then_some(done))
            }
            #[cfg(target_os = "linux")]
            (None, Ranks::Processes) => self.over_processes(),
            (None, Ranks::Threads) => self.over_threads().map(Some),
            (None, other) => refused(format!("--ranks {other:?}: this program runs ranks as threads only")),
        }
    }

    fn over_threads(&self) -> Result<LayerRun, Failure> {
        let bar = progress(self.replicas.config.num_experts() as u64, "loading experts");
        let weights = layer::load(self.registry, self.stored, self.replicas, self.plan, || bar.inc(1))?;
        let shared = self.shared()?;
        bar.finish_and_clear();
        let run = ep::run(
            self.registry,
            (&self.loaded(shared.as_ref()), &weights),
            layer::selection(&self.args.layer),
            self.hidden,
        );
        run.map_err(failure)
    }

    #[cfg(target_os = "linux")]
    fn over_processes(&self) -> Result<Option<LayerRun>, Failure> {
        let config = &self.replicas.config;
        let world = World::join(Group {
            world_size: config.ep_size(),
            ranks_per_node: NonZeroUsize::new(config.ranks_per_node),
            timeout: ep::TIMEOUT,
        })?;
        let done = self.as_rank(&world.endpoint);
        if !world.reports() {
            return done.map(|_| None).map_err(|failure| Failure::Elsewhere(failure.code()));
        }
        let done = done?;
        world.end().or_failed()?;
        Ok(Some(done))
    }

    /// Loads this rank's share, runs it, and gets the whole.
    fn as_rank(&self, group: &Endpoint) -> Result<LayerRun, Failure> {
        let rank = group.transport().rank();
        let load = || -> Result<_, Failure> {
            let mine = self.replicas.config.placement.experts_of(rank).count() as u64;
            let bar = if rank == Rank(0) { progress(mine, "loading experts") } else { ProgressBar::hidden() };
            let (replicas, plan) = (self.replicas, self.plan);
            let weights =
                layer::load_rank(self.registry, self.stored, (replicas, plan), rank, || bar.inc(1))?;
            let shared = self.shared()?;
            bar.finish_and_clear();
            Ok((weights, shared))
        };
        let (weights, shared) = spmd::agree(group, load())?;
        let part = ep::run_rank(
            self.registry,
            (&self.loaded(shared.as_ref()), &weights),
            layer::selection(&self.args.layer),
            (group, self.hidden),
        );
        spmd::collect(group, part).map_err(failure)
    }

    fn shared(&self) -> Result<Option<SharedLayer>, Failure> {
        let config = &self.replicas.config;
        layer::load_shared(self.registry, self.stored, config, self.plan.experts(), self.args.layer.quant)
    }

    fn loaded<'l>(&'l self, shared: Option<&'l SharedLayer>) -> LoadedLayer<'l> {
        LoadedLayer { stored: self.stored, replicas: self.replicas, shared }
    }
}

fn failure(error: anyhow::Error) -> Failure {
    if ep::is_bad_input(&error) { Failure::Refused(error) } else { Failure::Failed(error) }
}

/// A progress bar on stderr; a spinner if `length` is 0. Nothing is drawn where stderr is not a terminal.
pub fn progress(length: u64, message: &'static str) -> ProgressBar {
    let bar = if length == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(length) };
    let template = if length == 0 { "{spinner} {msg}" } else { "{msg} [{bar:30}] {pos}/{len}" };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(message);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
