//! The command lines of `fmoe chaos` and of its ranks.

use clap::{Args, ValueEnum};

/// Arguments of `fmoe chaos`.
#[derive(Clone, Debug, Args)]
pub struct ChaosArgs {
    /// Layer calls, in most of which something happens to a rank.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub rounds: u64,
    /// Ranks, each a process.
    #[arg(long, value_name = "R", default_value_t = 4)]
    pub ep_size: usize,
    /// What the layer, its tokens and the faults are drawn from; printed, and a fresh one if not given.
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// What may happen to a rank.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = FaultKind::ALL)]
    pub faults: Vec<FaultKind>,
    /// How long a rank waits for another before it takes it for lost.
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    pub timeout_ms: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Makes rank 0 misbehave now and then, to see that it is found out.
    #[arg(long, value_enum, hide = true)]
    pub sabotage: Option<Sabotage>,
}

/// What may happen to a rank of `fmoe chaos`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FaultKind {
    /// It is killed.
    Kill,
    /// It is stopped until the others have gone on without it.
    Stop,
    /// It is late.
    Delay,
}

impl FaultKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Kill, Self::Stop, Self::Delay];
}

/// How a rank of `fmoe chaos` can misbehave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sabotage {
    /// Its output is wrong in one element.
    Wrong,
    /// It does not return.
    Hang,
    /// It keeps a descriptor.
    Leak,
}

/// Arguments of `fmoe chaos-rank`.
#[derive(Clone, Debug, Args)]
pub struct ChaosRankArgs {
    /// As of `fmoe chaos`.
    #[arg(long)]
    pub seed: u64,
    /// Seats of the run.
    #[arg(long)]
    pub seats: usize,
    /// Which of them this process takes.
    #[arg(long)]
    pub seat: u32,
    /// As of `fmoe chaos`.
    #[arg(long, value_enum)]
    pub sabotage: Option<Sabotage>,
}
