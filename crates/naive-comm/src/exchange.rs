//! What the phases ask of the thing that moves rows: [`OneRank`](crate::local::OneRank) or
//! [`AllGather`](crate::all_gather::AllGather).

use ep_transport::{Result, Status};
use fused_moe_core::{Fault, Outstanding, Rank};

use crate::row::COLUMNS;
use crate::sum::Partials;

/// A step of a round as all ranks agree on it: its result, or the lowest rank that could not do its part.
pub(crate) type Verdict<T> = std::result::Result<T, (Rank, Fault)>;

/// The memory that arrived rows and expert outputs lie in, `max_rows` rows each.
pub(crate) struct Received<'p> {
    /// The columns of [`crate::row::columns`].
    pub(crate) columns: [&'p [u8]; COLUMNS],
    /// For the experts' output.
    pub(crate) output: Option<&'p mut [u8]>,
}

/// The experts' outputs of a rank.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outputs<'a> {
    /// In [`Received::output`].
    InPlace,
    /// `[rows, hidden]` in the configuration's element type, at least the received rows.
    Lent(&'a [u8]),
    /// Nowhere.
    Failed(Fault),
}

/// Moves the rows of a round between the ranks. Called in the order of the methods, once per round each,
/// except that a round ends where a [`Verdict`] is an error. Nothing is allocated.
pub(crate) trait Exchange: Send {
    /// Bytes of all buffers.
    fn allocated_bytes(&self) -> usize;

    /// Begins round `round`: tells every rank how many rows this one brings, or why it brings none.
    fn announce(&mut self, round: u64, own: Status) -> Result<()>;

    /// The columns for this rank's own rows, `max_tokens_per_rank` each.
    fn staging(&mut self) -> Result<[&mut [u8]; COLUMNS]>;

    /// Brings the rows of all ranks together, in rank order, and returns their number. `late` is a fault of
    /// this rank since it announced its rows.
    fn gather(&mut self, round: u64, late: Option<Fault>) -> Result<Verdict<usize>>;

    /// The gathered rows.
    fn received(&mut self) -> Result<Received<'_>>;

    /// Sends each rank the outputs of its rows.
    fn scatter(&mut self, round: u64, outputs: Outputs<'_>) -> Result<()>;

    /// Waits for the outputs of this rank's rows.
    fn collect(&mut self, round: u64) -> Result<Verdict<Partials<'_>>>;

    /// Tells the peers that this rank takes no part in what is left of the round. Does not wait.
    fn abandon(&mut self, round: u64, outstanding: Outstanding) -> Result<()>;
}
