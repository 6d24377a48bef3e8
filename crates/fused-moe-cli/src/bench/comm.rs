//! `fmoe bench comm`: dispatch and combine of every backend, beside what copying memory can do, in one process.

mod cells;
#[cfg(target_os = "linux")]
mod processes;
mod rounds;
mod tables;

use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::{Context, anyhow};
use fused_moe::transport::probe::{Stores, copy_bandwidth};
use fused_moe::transport::{Endpoint, ThreadOptions, Transport, run_ranks, transport_of};
use fused_moe::{ErrorKind, ProcessGroup, Registry};
use serde::Serialize;

use crate::args::{BenchCommArgs, Draw, Ranks};
#[cfg(not(feature = "mpi"))]
use crate::exit::WITHOUT_MPI;
use crate::exit::{Failure, OrFailure, refused};
#[cfg(feature = "mpi")]
use crate::mpi::Job;
use crate::report::print_json;
use cells::{Cell, Cells, Group, Layer, Refused};
use rounds::{HalfSample, Measured};

/// How long a rank waits for another: a round of the largest calls takes seconds on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What ranks were.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Substrate {
    Threads,
    Processes,
    #[cfg(feature = "mpi")]
    Mpi,
}

impl Substrate {
    const fn name(self) -> &'static str {
        match self {
            Substrate::Threads => "threads",
            Substrate::Processes => "processes",
            #[cfg(feature = "mpi")]
            Substrate::Mpi => "mpi",
        }
    }
}

#[derive(Serialize)]
struct Report {
    layer: Layer,
    cores: usize,
    /// GB/s of copies on as many threads as there are cores.
    copy: CopyRates,
    rows: Vec<Row>,
    refused: Vec<Refused>,
    /// Each backend against each that gathers, on the same wire: how many times fewer bytes and less time.
    ratios: Vec<Ratio>,
    /// Each backend on more ranks against the fewest, at the same number of tokens over all ranks.
    crowding: Vec<Crowding>,
}

/// Of rows as dispatch copies them, in the caches and beyond them; before the first row and behind the last.
#[derive(Serialize)]
struct CopyRates {
    hot_gb_s: [f64; 2],
    beyond_caches_gb_s: [f64; 2],
    beyond_caches_streamed_gb_s: [f64; 2],
}

/// One backend in one cell. Bytes and rates are over all ranks; times are medians.
#[derive(Clone, Serialize)]
struct Row {
    substrate: Substrate,
    ep_size: usize,
    ranks_per_node: usize,
    all2all: &'static str,
    wire: String,
    routing: &'static str,
    tokens_per_rank: usize,
    dispatch: Half,
    combine: Half,
    /// Dispatch, combine and nothing in between.
    round_us: f64,
    round_us_spread: [f64; 2],
    /// Copies beyond the caches, just before this row, with the stores that are faster.
    copy_gb_s: f64,
    /// What dispatch copied per second, to the own rank too, over that.
    dispatch_of_copy: f64,
}

#[derive(Clone, Copy, Serialize)]
struct Half {
    us: f64,
    /// As the transport counted: what crossed from rank to rank, and of that from node to node.
    remote_bytes: u64,
    internode_bytes: u64,
    /// What a rank copied to itself.
    local_bytes: u64,
    /// Bytes that are useful to someone, copies on the own rank included, per second: the convention of DeepEP and MoRI.
    algorithm_gb_s: f64,
    /// Remote bytes per second.
    physical_gb_s: f64,
}

impl Half {
    fn new(sample: &HalfSample, useful_bytes: f64) -> Self {
        let per_second = |bytes: f64| if sample.us > 0.0 { bytes / sample.us / 1e3 } else { 0.0 };
        Self {
            us: sample.us,
            remote_bytes: sample.bytes.remote,
            internode_bytes: sample.bytes.internode,
            local_bytes: sample.bytes.local,
            algorithm_gb_s: per_second(useful_bytes),
            physical_gb_s: per_second(sample.bytes.remote as f64),
        }
    }
}

impl Half {
    fn copied_gb_s(&self) -> f64 {
        let copied = (self.remote_bytes + self.local_bytes) as f64;
        if self.us > 0.0 { copied / self.us / 1e3 } else { 0.0 }
    }
}

#[derive(Serialize)]
struct Ratio {
    substrate: Substrate,
    ep_size: usize,
    wire: String,
    routing: &'static str,
    tokens_per_rank: usize,
    all2all: &'static str,
    against: &'static str,
    fewer_bytes: f64,
    less_time: f64,
}

#[derive(Serialize)]
struct Crowding {
    substrate: Substrate,
    ep_size: usize,
    against_ep_size: usize,
    wire: String,
    routing: &'static str,
    tokens: usize,
    all2all: &'static str,
    times_the_time: f64,
}

/// Runs the command.
pub fn run(args: &BenchCommArgs) -> Result<(), Failure> {
    match args.ranks[..] {
        [Ranks::Mpi] => run_as_mpi_rank(args),
        // An MPI rank that waits keeps a core busy, and would be measured with the others.
        ref ranks if ranks.contains(&Ranks::Mpi) => {
            refused("--ranks mpi goes alone: every rank is one of mpirun's")
        }
        _ => run_here(args),
    }
}

fn run_here(args: &BenchCommArgs) -> Result<(), Failure> {
    let registry = fused_moe::default_backends();
    let bench = Bench::new(args, &registry)?;
    #[cfg(target_os = "linux")]
    if let Ok(seat) = std::env::var(processes::SEAT) {
        return other_rank(&seat, &registry, &bench.groups, args.reps).or_failed();
    }
    bench.report(args, |Cells { group, measured: cells, .. }| {
        let mut rows = Vec::new();
        for &substrate in &args.ranks {
            rows.extend(measure_group(substrate, *group, |endpoint| {
                measure_all(cells, &registry, &endpoint, args.reps)
            })?);
        }
        Ok(rows)
    })
}

#[cfg(feature = "mpi")]
fn run_as_mpi_rank(args: &BenchCommArgs) -> Result<(), Failure> {
    let job = Job::join(TIMEOUT)?;
    let registry = fused_moe::default_backends();
    // Ranks beyond those of a group have nothing to do in it.
    let measure = |Cells { group, measured: cells, .. }: &Cells| -> anyhow::Result<Vec<Row>> {
        let Some(endpoint) = job.group(group.ranks, group.ranks_per_node)? else { return Ok(Vec::new()) };
        let rows = measure_all(cells, &registry, &endpoint, args.reps)?;
        Ok(rows.into_iter().map(|row| Row { substrate: Substrate::Mpi, ..row }).collect())
    };
    let Some(bench) = job.told_once(Bench::new(args, &registry))? else { return Ok(()) };
    if job.reports() {
        return bench.report(args, measure);
    }
    bench.measured().try_for_each(|cells| measure(cells).map(drop)).or_failed()
}

#[cfg(not(feature = "mpi"))]
fn run_as_mpi_rank(_: &BenchCommArgs) -> Result<(), Failure> {
    refused(WITHOUT_MPI)
}

/// What is to be measured.
struct Bench {
    layer: Layer,
    groups: Vec<Cells>,
}

impl Bench {
    fn new(args: &BenchCommArgs, registry: &Registry) -> Result<Self, Failure> {
        if args.reps == 0 {
            return refused("--reps 0: at least one sample is needed");
        }
        let layer = Layer::new(args).or_refused()?;
        for name in &args.all2all {
            registry.comm(name).or_refused()?;
        }
        let mut groups = Vec::new();
        for &ranks in &args.ep_size {
            let group = Group::new(args, ranks).or_refused()?;
            groups.push(cells::all(args, &layer, registry, group).or_refused()?);
        }
        Ok(Self { layer, groups })
    }

    /// The groups for which there is something to measure.
    fn measured(&self) -> impl Iterator<Item = &Cells> {
        self.groups.iter().filter(|cells| !cells.measured.is_empty())
    }

    /// Measures all groups between two looks at what the machine can copy, and reports.
    fn report(
        self,
        args: &BenchCommArgs,
        measure: impl Fn(&Cells) -> anyhow::Result<Vec<Row>>,
    ) -> Result<(), Failure> {
        let before = copy_rates(&self.layer);
        let mut rows = Vec::new();
        for cells in self.measured() {
            rows.extend(measure(cells).or_failed()?);
        }
        let after = copy_rates(&self.layer);
        let pair = |rate: fn(&[f64; 3]) -> f64| [rate(&before), rate(&after)];
        let report = Report {
            cores: cores().get(),
            copy: CopyRates {
                hot_gb_s: pair(|rates| rates[0]),
                beyond_caches_gb_s: pair(|rates| rates[1]),
                beyond_caches_streamed_gb_s: pair(|rates| rates[2]),
            },
            ratios: ratios(&rows),
            crowding: crowding(&rows),
            layer: self.layer,
            rows,
            refused: self.groups.into_iter().flat_map(|cells| cells.refused).collect(),
        };
        if let Some(file) = &args.csv {
            let text = tables::csv(&report.rows);
            std::fs::write(file, text)
                .with_context(|| format!("cannot write {}", file.display()))
                .or_failed()?;
        }
        if args.json { print_json(&report).or_failed() } else { tables::print_all(&report).or_failed() }
    }
}

/// The rows of one group on one substrate.
fn measure_group(
    substrate: Ranks,
    group: Group,
    measure: impl Fn(Endpoint) -> anyhow::Result<Vec<Row>> + Sync,
) -> anyhow::Result<Vec<Row>> {
    if substrate == Ranks::Processes {
        #[cfg(target_os = "linux")]
        {
            let of_processes = |row| Row { substrate: Substrate::Processes, ..row };
            return Ok(processes::run(group, measure)?.into_iter().map(of_processes).collect());
        }
        #[cfg(not(target_os = "linux"))]
        anyhow::bail!("--ranks processes needs Linux");
    }
    let ranks_per_node = NonZeroUsize::new(group.ranks_per_node);
    let ends = run_ranks(group.ranks, ThreadOptions { ranks_per_node, timeout: TIMEOUT }, measure)?;
    // Every rank has the same rows. Of failures, one that is not about a lost peer explains the others.
    let explains = |end: &&anyhow::Result<Vec<Row>>| match end {
        Err(error) => 1 + usize::from(!is_peer_lost(error)),
        Ok(_) => 0,
    };
    let worst = (0..ends.len()).max_by_key(|&rank| explains(&&ends[rank])).unwrap_or(0);
    ends.into_iter().nth(worst).unwrap_or_else(|| Ok(Vec::new()))
}

/// A rank that another process started: it measures what that one measures, and says nothing.
#[cfg(target_os = "linux")]
fn other_rank(seat: &str, registry: &Registry, groups: &[Cells], reps: usize) -> anyhow::Result<()> {
    let seat: processes::Seat = seat.parse()?;
    let mine = groups.iter().find(|cells| cells.group.ranks == seat.ranks);
    let mine = mine.ok_or_else(|| anyhow!("no group of {} ranks", seat.ranks))?;
    measure_all(&mine.measured, registry, &seat.join(mine.group)?, reps).map(drop)
}

/// All cells on one rank of a group; the rows are those of all ranks together.
fn measure_all(
    cells: &[Cell],
    registry: &Registry,
    endpoint: &Endpoint,
    reps: usize,
) -> anyhow::Result<Vec<Row>> {
    let transport = transport_of(endpoint).ok_or_else(|| anyhow!("the group has no transport"))?;
    let mut rows: Vec<Row> = Vec::new();
    for cell in cells {
        // One rank probes while the others sleep, and tells them.
        let mut copy_gb_s = 0.0;
        if endpoint.rank().index() == 0 {
            let rate = |stores| beyond_caches(cell.payload_bytes(), stores);
            copy_gb_s = rate(Stores::Ordinary).max(rate(Stores::NonTemporal));
        }
        let of_all = transport.all_gather(&copy_gb_s.to_le_bytes(), transport.deadline())?;
        copy_gb_s = of_all
            .iter()
            .filter_map(|rate| Some(f64::from_le_bytes(*rate.first_chunk()?)))
            .fold(0.0, f64::max);
        let mine = rounds::measure(cell, registry, endpoint, reps)
            .with_context(|| format!("{} at {} tokens per rank", cell.plan.comm(), cell.tokens))?;
        let all = gather(&*transport, &mine)?;
        rows.push(Row::new(cell, &Measured::over_ranks(&all, reps), copy_gb_s));
    }
    Ok(rows)
}

fn is_peer_lost(error: &anyhow::Error) -> bool {
    let is_lost = |error: &fused_moe::Error| matches!(error.kind, ErrorKind::PeerLost { .. });
    error.downcast_ref().is_some_and(is_lost)
}

fn gather(transport: &dyn Transport, mine: &Measured) -> anyhow::Result<Vec<Measured>> {
    let all = transport.all_gather(&serde_json::to_vec(mine)?, transport.deadline())?;
    all.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect()
}

impl Row {
    fn new(cell: &Cell, measured: &Measured, copy_gb_s: f64) -> Self {
        let rounds = measured.medians();
        let useful = measured.useful_rows as f64;
        let dispatch = Half::new(&rounds.dispatch, useful * cell.payload_bytes() as f64);
        let output = cell.config.hidden * cell.config.in_dtype.size_bytes();
        Self {
            substrate: Substrate::Threads,
            ep_size: cell.config.ep_size(),
            ranks_per_node: cell.config.ranks_per_node,
            all2all: cell.plan.comm(),
            wire: cell.plan.wire().to_string(),
            routing: routing_name(cell.draw),
            tokens_per_rank: cell.tokens,
            dispatch,
            combine: Half::new(&rounds.combine, useful * output as f64),
            round_us: rounds.round_us,
            round_us_spread: rounds.spread,
            copy_gb_s,
            dispatch_of_copy: if copy_gb_s > 0.0 { dispatch.copied_gb_s() / copy_gb_s } else { 0.0 },
        }
    }

    fn remote_bytes(&self) -> f64 {
        (self.dispatch.remote_bytes + self.combine.remote_bytes) as f64
    }
}

fn routing_name(draw: Draw) -> &'static str {
    match draw {
        Draw::Model => "group-limited",
        Draw::Uniform => "uniform",
    }
}

/// Backends that send every token everywhere: what the others are there to beat.
const GATHERING: [&str; 2] = ["allgather_reducescatter", "naive"];

fn ratios(rows: &[Row]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for row in rows.iter().filter(|row| !GATHERING.contains(&row.all2all)) {
        let key =
            |row: &Row| (row.substrate, row.ep_size, row.wire.clone(), row.routing, row.tokens_per_rank);
        let others = rows.iter().filter(|other| GATHERING.contains(&other.all2all) && key(other) == key(row));
        for other in others.filter(|_| row.remote_bytes() > 0.0) {
            ratios.push(Ratio {
                substrate: row.substrate,
                ep_size: row.ep_size,
                wire: row.wire.clone(),
                routing: row.routing,
                tokens_per_rank: row.tokens_per_rank,
                all2all: row.all2all,
                against: other.all2all,
                fewer_bytes: other.remote_bytes() / row.remote_bytes(),
                less_time: other.round_us / row.round_us,
            });
        }
    }
    ratios
}

fn crowding(rows: &[Row]) -> Vec<Crowding> {
    let fewest = rows.iter().map(|row| row.ep_size).min().unwrap_or(0);
    let key = |row: &Row| {
        (row.substrate, row.all2all, row.wire.clone(), row.routing, row.tokens_per_rank * row.ep_size)
    };
    let mut crowding = Vec::new();
    for row in rows.iter().filter(|row| row.ep_size > fewest) {
        let few = rows.iter().find(|few| few.ep_size == fewest && key(few) == key(row));
        crowding.extend(few.map(|few| Crowding {
            substrate: row.substrate,
            ep_size: row.ep_size,
            against_ep_size: fewest,
            wire: row.wire.clone(),
            routing: row.routing,
            tokens: row.tokens_per_rank * row.ep_size,
            all2all: row.all2all,
            times_the_time: row.round_us / few.round_us,
        }));
    }
    crowding
}

fn cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Hot, beyond the caches, and the same with non-temporal stores, in GB/s.
fn copy_rates(layer: &Layer) -> [f64; 3] {
    const HOT_ROWS: NonZeroUsize = NonZeroUsize::new(8).unwrap();
    let row = layer.hidden * 2;
    [
        copy_bandwidth(cores(), HOT_ROWS, row, Stores::Ordinary) / 1e9,
        beyond_caches(row, Stores::Ordinary),
        beyond_caches(row, Stores::NonTemporal),
    ]
}

/// GB/s of rows of `row_bytes` where source and target of each thread are 128 MiB.
fn beyond_caches(row_bytes: usize, stores: Stores) -> f64 {
    let rows = NonZeroUsize::new((128 << 20) / row_bytes.max(1)).unwrap_or(NonZeroUsize::MIN);
    copy_bandwidth(cores(), rows, row_bytes, stores) / 1e9
}
