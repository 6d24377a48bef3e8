//! One rank: rows stay where they are quantised.

use ep_transport::{Result, Status};
use fused_moe_core::{Arena, Fault, MoeConfig, Outstanding, Plan, Rank, Workspace};

use crate::exchange::{Exchange, Outputs, Received, Verdict};
use crate::row::{COLUMNS, Column, columns, elements_of};
use crate::sum::Partials;

const ONLY: Rank = Rank(0);

/// The exchange of a group of one.
#[derive(Debug)]
pub(crate) struct OneRank {
    memory: Workspace,
    sizes: Sizes,
    outputs: Column,
    max_tokens: usize,
    hidden: usize,
    own: Status,
}

/// Bytes of each column of the received rows, and of the experts' outputs.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    columns: [usize; COLUMNS],
    output: usize,
}

struct Pieces<'a> {
    columns: [&'a mut [u8]; COLUMNS],
    output: &'a mut [u8],
}

impl Sizes {
    fn new(config: &MoeConfig, plan: &Plan) -> Self {
        let rows = config.max_tokens_per_rank;
        Self {
            columns: columns(config, plan).map(|column| column.bytes(rows)),
            output: Column::outputs(config).bytes(rows),
        }
    }

    fn total(&self) -> usize {
        let pieces = self.columns.into_iter().chain([self.output]);
        pieces.map(Arena::bytes_for::<u8>).sum()
    }
}

impl OneRank {
    /// Bytes that [`OneRank::new`] allocates.
    pub(crate) fn required_bytes(config: &MoeConfig, plan: &Plan) -> usize {
        Workspace::rounded(Sizes::new(config, plan).total())
    }

    pub(crate) fn new(config: &MoeConfig, plan: &Plan) -> fused_moe_core::Result<Self> {
        let sizes = Sizes::new(config, plan);
        Ok(Self {
            memory: Workspace::new(config.device, sizes.total())?,
            sizes,
            outputs: Column::outputs(config),
            max_tokens: config.max_tokens_per_rank,
            hidden: config.hidden,
            own: Status::done(0),
        })
    }

    fn pieces(&mut self) -> Pieces<'_> {
        let mut arena = self.memory.arena();
        let mut take = |bytes| arena.take::<u8>(bytes).expect("the workspace was made for these pieces");
        Pieces { columns: self.sizes.columns.map(&mut take), output: take(self.sizes.output) }
    }

    fn verdict<T>(&self, value: T) -> Verdict<T> {
        self.own.fault.map_or(Ok(value), |fault| Err((ONLY, fault)))
    }
}

impl Exchange for OneRank {
    fn allocated_bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn announce(&mut self, _round: u64, own: Status) -> Result<()> {
        self.own = own;
        Ok(())
    }

    fn staging(&mut self) -> Result<[&mut [u8]; COLUMNS]> {
        Ok(self.pieces().columns)
    }

    fn gather(&mut self, _round: u64, late: Option<Fault>) -> Result<Verdict<usize>> {
        self.own.fault = self.own.fault.or(late);
        Ok(self.verdict(self.own.count as usize))
    }

    fn received(&mut self) -> Result<Received<'_>> {
        let Pieces { columns, output } = self.pieces();
        Ok(Received { columns: columns.map(|column| &*column), output: Some(output) })
    }

    fn scatter(&mut self, _round: u64, outputs: Outputs<'_>) -> Result<()> {
        match outputs {
            Outputs::InPlace => {}
            Outputs::Lent(rows) => {
                let bytes = self.outputs.bytes(self.own.count as usize);
                self.pieces().output[..bytes].copy_from_slice(&rows[..bytes]);
            }
            Outputs::Failed(fault) => self.own.fault = Some(fault),
        }
        Ok(())
    }

    fn collect(&mut self, _round: u64) -> Result<Verdict<Partials<'_>>> {
        if let Err(failure) = self.verdict(()) {
            return Ok(Err(failure));
        }
        let (max_tokens, hidden) = (self.max_tokens, self.hidden);
        let elements = elements_of(self.pieces().output);
        Ok(Ok(Partials { elements, max_tokens, hidden }))
    }

    fn abandon(&mut self, _round: u64, _outstanding: Outstanding) -> Result<()> {
        Ok(())
    }
}
