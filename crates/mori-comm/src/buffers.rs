//! The symmetric memory of a handle: where every region lies, on every rank alike.

use std::ptr::NonNull;

use ep_transport::{Heap, HeapLayout, Result, RowCursor, StatusBoard, SymOffset, SymWord};
use fused_moe_core::{CombineWire, Layout, MoeConfig, Plan, Rank};

use crate::record::Fields;
use crate::sum::travelling_bytes;

/// A region of rows of equal size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    start: SymOffset,
    row_bytes: usize,
    rows: usize,
}

impl Region {
    fn reserve(layout: &mut HeapLayout, row_bytes: usize, rows: usize) -> Self {
        Self { start: layout.region(row_bytes * rows), row_bytes, rows }
    }

    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Where row `index` starts.
    pub fn row(&self, index: usize) -> SymOffset {
        self.start + index * self.row_bytes
    }
}

/// Regions and signals of a handle. `rows` is `world_size · max_tokens_per_rank`, so that the worst case (every token
/// of every rank comes here) fits, unless the configuration says that fewer come.
#[derive(Clone, Debug)]
pub(crate) struct Buffers {
    layout: HeapLayout,
    /// `[rows]` of each field: the tokens that this rank's experts read.
    pub received: Fields<Region>,
    /// `[rows, hidden]` in the configuration's type: the experts' output.
    pub expert_out: Region,
    /// `[rows]` of the same as it travels, read by the ranks of the node.
    pub outputs: Region,
    /// Next free row.
    pub cursor: RowCursor,
    /// Who has dispatched how many rows to this rank.
    pub dispatched: StatusBoard,
    /// Whose expert outputs are ready.
    pub ready: StatusBoard,
    /// What several nodes need.
    pub rails: Option<RailBuffers>,
}

impl Buffers {
    pub fn new(config: &MoeConfig, plan: &Plan) -> Self {
        let mut layout = HeapLayout::default();
        let ranks = config.ep_size();
        let rows = plan.max_rows();
        let received = Fields::of_plan(config, plan).map(|bytes| Region::reserve(&mut layout, bytes, rows));
        let expert_out = Region::reserve(&mut layout, config.hidden * config.in_dtype.size_bytes(), rows);
        let outputs = match plan.combine_wire() {
            CombineWire::InDtype => expert_out,
            _ => Region::reserve(&mut layout, travelling_bytes(config, plan), rows),
        };
        let cursor = RowCursor::reserve(&mut layout);
        let dispatched = StatusBoard::reserve(&mut layout, ranks);
        let ready = StatusBoard::reserve(&mut layout, ranks);
        let rails = (!config.is_single_node()).then(|| RailBuffers::reserve(&mut layout, config, plan));
        Self { layout, received, expert_out, outputs, cursor, dispatched, ready, rails }
    }

    pub fn layout(&self) -> &HeapLayout {
        &self.layout
    }

    pub fn required_bytes(&self) -> usize {
        self.layout.size().required_bytes()
    }
}

/// Tokens that travel between nodes in one put.
pub(crate) const CHUNK: usize = 64;

const _: () = assert!(CHUNK <= ep_transport::Chunk::MOST_ROWS);

/// Regions and signals of a rank for its proxies: a window for each of the other nodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RailBuffers {
    /// `[2 parities of the round, windows, max_tokens_per_rank]` records, from the rank in this one's place on the
    /// window's node.
    pub inbox: Region,
    /// `[windows, max_tokens_per_rank]` rows as they travel, of this rank's own tokens, summed over the window's node.
    pub returned: Region,
    /// Whose part of forwarding is done, with the number of rows forwarded to this rank.
    pub forwarded: StatusBoard,
    /// `[2 parities, windows, chunks]`: see [`crate::rails`].
    arrived: SymWord,
    /// `[windows, chunks]`: the round whose outputs are in the chunk.
    back: SymWord,
    windows: usize,
    /// Rows of a window.
    pub rows: usize,
    chunks: usize,
}

impl RailBuffers {
    fn reserve(layout: &mut HeapLayout, config: &MoeConfig, plan: &Plan) -> Self {
        let windows = config.ep_size() / config.ranks_per_node - 1;
        let rows = config.max_tokens_per_rank;
        let chunks = rows.div_ceil(CHUNK);
        let record = Fields::of_plan(config, plan).record_bytes();
        Self {
            inbox: Region::reserve(layout, record, 2 * windows * rows),
            returned: Region::reserve(layout, travelling_bytes(config, plan), windows * rows),
            forwarded: StatusBoard::reserve(layout, config.ep_size()),
            arrived: layout.words(2 * windows * chunks),
            back: layout.words(windows * chunks),
            windows,
            rows,
            chunks,
        }
    }

    fn parity_window(&self, round: u64, window: usize) -> usize {
        (round % 2) as usize * self.windows + window
    }

    /// First row of a window of the inbox.
    pub fn inbox_row(&self, round: u64, window: usize) -> usize {
        self.parity_window(round, window) * self.rows
    }

    /// The flag of a chunk of the inbox.
    pub fn arrived(&self, round: u64, window: usize, chunk: usize) -> SymWord {
        self.arrived + self.parity_window(round, window) * self.chunks + chunk
    }

    /// First row of a window of the returned outputs.
    pub fn returned_row(&self, window: usize) -> usize {
        window * self.rows
    }

    /// The flag of a chunk of the returned outputs.
    pub fn back(&self, window: usize, chunk: usize) -> SymWord {
        self.back + window * self.chunks + chunk
    }
}

/// One region of one rank, mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    base: NonNull<u8>,
    row_bytes: usize,
    rows: usize,
}

// SAFETY: the pointer is into a symmetric heap, which any thread may address; who touches which bytes when is the
// protocol's business, argued at each access.
unsafe impl Send for Rows {}

impl Rows {
    /// Maps `region` of `rank`; `None` if its memory is out of reach.
    pub fn map(heap: &dyn Heap, rank: Rank, region: Region) -> Result<Option<Self>> {
        let Region { start, row_bytes, rows } = region;
        Ok(heap.peer_ptr(rank, start, row_bytes * rows)?.map(|base| Self { base, row_bytes, rows }))
    }

    /// Row `index`, to write.
    ///
    /// # Safety
    /// The heap is alive, and no one else touches the row while the reference lives.
    #[expect(clippy::mut_from_ref, reason = "exclusive by the protocol, not by a borrow")]
    pub unsafe fn row_mut(&self, index: usize) -> &mut [u8] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        // SAFETY: the row lies inside the mapped region (asserted, and mapped whole); the caller has it alone.
        unsafe {
            std::slice::from_raw_parts_mut(self.base.add(index * self.row_bytes).as_ptr(), self.row_bytes)
        }
    }

    /// Row `index`, to read.
    ///
    /// # Safety
    /// The heap is alive, and no one writes the row while the reference lives.
    pub unsafe fn row(&self, index: usize) -> &[u8] {
        // SAFETY: any bytes are a `u8`; the caller vouches for the rest.
        unsafe { self.row_as(index) }
    }

    /// Row `index`, to read as elements of `T`.
    ///
    /// # Safety
    /// The heap is alive, no one writes the row while the reference lives, and any bytes are a `T`.
    pub unsafe fn row_as<T>(&self, index: usize) -> &[T] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        // SAFETY: the row lies inside the mapped region; regions start at 64-byte boundaries and rows are whole
        // numbers of `T`, so the row is aligned; the caller vouches for the rest.
        unsafe {
            let start = self.base.add(index * self.row_bytes).as_ptr().cast();
            std::slice::from_raw_parts(start, self.row_bytes / size_of::<T>())
        }
    }

    /// The whole region as a contiguous tensor allocation.
    pub fn allocation(&self, dtype: fused_moe_core::DType) -> fused_moe_core::Allocation {
        let bytes = self.row_bytes * self.rows;
        fused_moe_core::Allocation {
            base: self.base.as_ptr(),
            bytes,
            dtype,
            device: fused_moe_core::Device::HOST,
        }
    }

    /// Layout of the region as `[rows, elements per row]`.
    pub fn tensor_layout(&self, dtype: fused_moe_core::DType) -> Layout {
        Layout::contiguous(&[self.rows, self.row_bytes / dtype.size_bytes()])
    }
}
