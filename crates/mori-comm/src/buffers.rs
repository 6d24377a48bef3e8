//! The symmetric memory of a handle: where every region lies, on every rank alike.

use std::ptr::NonNull;

use ep_transport::{Heap, HeapLayout, Result, RowCursor, StatusBoard, SymOffset};
use fused_moe_core::{Layout, MoeConfig, Plan, Rank};

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
}

/// Regions and signals of an IntraNode handle. `rows` is `world_size · max_tokens_per_rank`, so that the worst case
/// (every token of every rank comes here) always fits.
#[derive(Clone, Debug)]
pub(crate) struct Buffers {
    layout: HeapLayout,
    /// `[rows, hidden]` in the wire's payload type.
    pub payload: Region,
    /// `[rows, scales_per_token]`; no bytes without scales.
    pub scales: Region,
    /// `[rows, top_k]` i32 global expert ids.
    pub ids: Region,
    /// `[rows, top_k]` f32.
    pub weights: Region,
    /// `[rows]` u32: `source rank · max_tokens_per_rank + token`.
    pub source: Region,
    /// `[rows, hidden]` in the configuration's type: the experts' output, read by the tokens' owners.
    pub expert_out: Region,
    /// Next free row.
    pub cursor: RowCursor,
    /// Who has dispatched how many rows to this rank.
    pub dispatched: StatusBoard,
    /// Whose expert outputs are ready.
    pub ready: StatusBoard,
}

impl Buffers {
    pub fn new(config: &MoeConfig, plan: &Plan) -> Self {
        let mut layout = HeapLayout::default();
        let rows = config.ep_size() * config.max_tokens_per_rank;
        let wire = plan.wire();
        let mut region = |row_bytes| Region::reserve(&mut layout, row_bytes, rows);
        let payload = region(wire.payload_bytes(config.hidden));
        let scales = region(wire.scale_bytes(config.hidden));
        let ids = region(config.top_k * size_of::<i32>());
        let weights = region(config.top_k * size_of::<f32>());
        let source = region(size_of::<u32>());
        let expert_out = region(config.hidden * config.in_dtype.size_bytes());
        let cursor = RowCursor::reserve(&mut layout);
        let dispatched = StatusBoard::reserve(&mut layout, config.ep_size());
        let ready = StatusBoard::reserve(&mut layout, config.ep_size());
        Self { layout, payload, scales, ids, weights, source, expert_out, cursor, dispatched, ready }
    }

    pub fn layout(&self) -> &HeapLayout {
        &self.layout
    }

    pub fn required_bytes(&self) -> usize {
        self.layout.size().required_bytes()
    }

    /// Bytes that one copy of a token moves in dispatch.
    pub fn dispatch_row_bytes(&self) -> usize {
        [self.payload, self.scales, self.ids, self.weights, self.source].iter().map(|r| r.row_bytes).sum()
    }

    /// Bytes that one output row moves in combine.
    pub fn combine_row_bytes(&self) -> usize {
        self.expert_out.row_bytes
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
