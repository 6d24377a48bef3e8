//! The memory of a handle: where every region lies in the symmetric heap, on every rank alike.

use ep_transport::{HeapLayout, StatusBoard, SymOffset};
use fused_moe_core::{MoeConfig, Plan, Rank};

/// A region of rows of equal size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub start: SymOffset,
    pub row_bytes: usize,
    pub rows: usize,
}

impl Region {
    fn reserve(layout: &mut HeapLayout, row_bytes: usize, rows: usize) -> Self {
        Self { start: layout.region(row_bytes.saturating_mul(rows)), row_bytes, rows }
    }

    /// Where row `index` starts.
    pub fn row(&self, index: usize) -> SymOffset {
        self.start + index * self.row_bytes
    }

    /// Bytes of the region.
    pub fn bytes(&self) -> usize {
        self.row_bytes * self.rows
    }
}

/// Sizes that regions and rows follow from, the same on every rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub ranks: usize,
    /// Rows of a source rank's window in a batch.
    pub max_tokens: usize,
    pub top_k: usize,
    /// Experts of the rank that holds most.
    pub max_experts: usize,
    pub hidden: usize,
    pub payload_bytes: usize,
    pub scale_bytes: usize,
    pub output_bytes: usize,
}

/// Bytes that a (token, slot) pair moves in dispatch.
pub(crate) fn dispatch_row_bytes(payload: usize, scales: usize) -> usize {
    payload + scales + size_of::<u32>()
}

impl Shape {
    pub fn new(config: &MoeConfig, plan: &Plan) -> Self {
        let ranks = (0..config.ep_size() as u32).map(Rank);
        let experts = ranks.map(|rank| config.placement.num_local_experts(rank));
        Self {
            ranks: config.ep_size(),
            max_tokens: config.max_tokens_per_rank,
            top_k: config.top_k,
            max_experts: experts.max().unwrap_or(0),
            hidden: config.hidden,
            payload_bytes: plan.wire().payload_bytes(config.hidden),
            scale_bytes: plan.wire().scale_bytes(config.hidden),
            output_bytes: config.hidden.saturating_mul(config.in_dtype.size_bytes()),
        }
    }

    /// Rows of the batch of one expert.
    pub fn max_rows(&self) -> usize {
        self.ranks.saturating_mul(self.max_tokens)
    }

    /// (token, slot) pairs of a rank.
    pub fn slots(&self) -> usize {
        self.max_tokens.saturating_mul(self.top_k)
    }

    /// First row of the window of `source` in the batch of local expert `expert`.
    pub fn window(&self, expert: usize, source: Rank) -> usize {
        expert * self.max_rows() + source.index() * self.max_tokens
    }

    /// Bytes of this rank's own bookkeeping.
    pub fn local_bytes(&self) -> usize {
        let staged = self.max_tokens.saturating_mul(self.payload_bytes.saturating_add(self.scale_bytes));
        let cells = self.ranks * self.max_experts;
        let words = [self.slots(), cells, cells, self.max_experts];
        let words = words.into_iter().fold(0, usize::saturating_add);
        staged.saturating_add(words.saturating_mul(size_of::<u32>()))
    }
}

/// Regions and signals of a handle.
#[derive(Clone, Debug)]
pub(crate) struct Buffers {
    layout: HeapLayout,
    /// `[max_experts, max_rows, hidden]` in the wire's payload type.
    pub payload: Region,
    /// `[max_experts, max_rows, scales_per_token]`; no bytes without scales.
    pub scales: Region,
    /// `[max_experts, max_rows]` u32: slot of the source's routing, `token · top_k + slot`.
    pub slots: Region,
    /// `[ranks, max_experts]` u32: rows that each rank has put into its window of each batch.
    pub counts: Region,
    /// `[max_tokens_per_rank · top_k, hidden]` in the configuration's type: outputs for this rank's own slots.
    pub outputs: Region,
    /// Who has put its rows here.
    pub dispatched: StatusBoard,
    /// Who has put the outputs of this rank's rows.
    pub returned: StatusBoard,
}

impl Buffers {
    pub fn new(shape: &Shape) -> Self {
        let mut layout = HeapLayout::default();
        let rows = shape.max_experts.saturating_mul(shape.max_rows());
        let payload = Region::reserve(&mut layout, shape.payload_bytes, rows);
        let scales = Region::reserve(&mut layout, shape.scale_bytes, rows);
        let slots = Region::reserve(&mut layout, size_of::<u32>(), rows);
        let counts = Region::reserve(&mut layout, shape.max_experts * size_of::<u32>(), shape.ranks);
        let outputs = Region::reserve(&mut layout, shape.output_bytes, shape.slots());
        let dispatched = StatusBoard::reserve(&mut layout, shape.ranks);
        let returned = StatusBoard::reserve(&mut layout, shape.ranks);
        Self { layout, payload, scales, slots, counts, outputs, dispatched, returned }
    }

    pub fn layout(&self) -> &HeapLayout {
        &self.layout
    }
}
