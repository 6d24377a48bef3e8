//! Errors of a running layer: what a correct caller cannot foresee, and what a rank tells its peers.

use crate::fault::Fault;
use crate::placement::Rank;

/// A stage of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Stage 1: logits to top-k.
    Router,
    /// Stage 2: quantise and send tokens to the ranks of their experts.
    QuantizeDispatch,
    /// Stage 3: gemm1, activation, gemm2.
    Experts,
    /// Stage 4: send the outputs back and sum them.
    Combine,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stage::Router => "router",
            Stage::QuantizeDispatch => "quantize-dispatch",
            Stage::Experts => "experts",
            Stage::Combine => "combine",
        })
    }
}

/// What went wrong, for code that matches on it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A rank could not do its part of this round and told its peers. All ranks return this very value; the
    /// handles stay usable.
    RankFailed {
        /// The rank at fault (the lowest, if several are).
        rank: Rank,
        /// What happened there.
        fault: Fault,
    },
    /// The input of a stage that works on its own (the router) holds a value that it refuses.
    BadInput(Fault),
    /// A peer did not answer by the deadline. The handle cannot be used again.
    PeerLost {
        /// The silent rank.
        rank: Rank,
        /// Sequence number of the round on this handle.
        round: u64,
    },
    /// The ranks of a group were built differently.
    Mismatch(Box<Mismatch>),
    /// Memory could not be had.
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The caller broke the contract of a function: a foreign or stale ticket, a misfit view.
    Contract,
    /// Anything else; the source says what.
    Other,
}

impl std::fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ErrorKind::RankFailed { rank, fault } => write!(f, "{rank} failed: {fault}"),
            ErrorKind::BadInput(fault) => write!(f, "{fault}"),
            ErrorKind::PeerLost { rank, round } => {
                write!(f, "{rank} did not answer by the deadline in round {round}")
            }
            ErrorKind::Mismatch(mismatch) => mismatch.fmt(f),
            ErrorKind::OutOfMemory { bytes } => write!(f, "{bytes} bytes of memory could not be had"),
            ErrorKind::Contract => f.write_str("the caller broke the contract"),
            ErrorKind::Other => f.write_str("failed"),
        }
    }
}

/// A field in which the ranks of a group differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Name of the field.
    pub field: String,
    /// This rank's value.
    pub mine: String,
    /// The other rank's value.
    pub theirs: String,
    /// The other rank.
    pub rank: Rank,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Mismatch { field, mine, theirs, rank } = self;
        write!(f, "{field} differs between ranks: {mine} here, {theirs} on {rank}")
    }
}

/// The cause underneath an [`Error`]: a backend's own error type.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// A stage that failed at run time, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{stage} ({backend}): {kind}")]
#[non_exhaustive]
pub struct Error {
    /// What went wrong.
    pub kind: ErrorKind,
    /// The stage.
    pub stage: Stage,
    /// Name of the backend that reports it.
    pub backend: &'static str,
    /// The backend's own error, if there is more to say.
    #[source]
    pub source: Option<Source>,
}

impl Error {
    /// An error without a source.
    pub fn new(kind: ErrorKind, stage: Stage, backend: &'static str) -> Self {
        Self { kind, stage, backend, source: None }
    }

    /// A broken contract, with the values in `why`.
    pub fn contract(stage: Stage, backend: &'static str, why: impl Into<Source>) -> Self {
        Self::new(ErrorKind::Contract, stage, backend).caused_by(why)
    }

    /// Any other failure, with its cause.
    pub fn other(stage: Stage, backend: &'static str, why: impl Into<Source>) -> Self {
        Self::new(ErrorKind::Other, stage, backend).caused_by(why)
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }
}

/// Result of a stage.
pub type Result<T, E = Error> = std::result::Result<T, E>;
