//! One node: rows on its ranks, reserved by atomic adds, written and read in place.
//!
//! # Who may touch which bytes when
//! - *Received rows* of rank `p` are written by the ranks of its node, each row by the rank that reserved it, before
//!   that rank's last status of the dispatch. `p` reads them between having seen these statuses and posting that its
//!   outputs are ready. They are written again only in the next round, which a rank enters when it has seen that the
//!   outputs of all ranks are ready, or a fault in the dispatch; then `p` has seen it too and reads nothing.
//! - *Outputs* of `p` are written by `p` alone before it posts that they are ready. The ranks of its node read them
//!   then, before they post their dispatch status of the next round, for which `p` waits before it writes again.

use std::sync::Arc;

use ep_transport::{Heap, RowCursor, TransportError, copy_streaming};
use fused_moe_core::{
    Arrived, DType, Dispatched, Error, Fault, MoeConfig, Plan, Rank, ReceivedRows, Result, Source, Stage,
    TensorView, TensorViewMut, TopK, ViewError,
};

use crate::buffers::{Buffers, Rows};
use crate::nodes::{Destinations, Nodes};
use crate::record::Fields;
use crate::sum::{OutputRow, Sums};

/// What the ranks of a node may write in a round and find in their last-level cache when they read it, in bytes. On
/// cores that share 32 MiB, 7 MB are faster with plain stores, and 15 MB by a fifth faster past the caches.
const CACHED: usize = 12 << 20;

/// Fields shorter than this, in bytes, are not worth streaming.
const STREAMED: usize = 1024;

/// Where a copy of a token lies on this node: the place of the rank, and its row there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowOn {
    place: u32,
    row: u32,
}

impl RowOn {
    /// What a top-k slot without a copy has: padding, another node, or a rank that an earlier slot already named.
    pub const NOWHERE: Self = Self { place: u32::MAX, row: u32::MAX };
}

/// The regions of one rank, mapped.
#[derive(Clone, Copy, Debug)]
struct Peer {
    received: Fields<Rows>,
    outputs: Rows,
}

/// How many rows of a rank this one has to do with in a round.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// Found, not yet reserved.
    found: u32,
    /// The next reserved row to write.
    next: u32,
    /// Written and not yet announced.
    fresh: u32,
    /// Written.
    written: u32,
}

/// The memory of this rank's node.
pub(crate) struct Node {
    nodes: Nodes,
    heap: Arc<dyn Heap>,
    cursor: RowCursor,
    peers: Vec<Peer>,
    tallies: Vec<Tally>,
    /// What this rank's experts write.
    expert_out: Rows,
    sums: Sums,
    /// Received rows that fit on a rank, and what came of it if there were more.
    max_rows: u32,
    overflow: Option<Fault>,
    row_bytes: usize,
    output_bytes: usize,
    /// Whether rows are written past the caches.
    streaming: bool,
    payload_dtype: DType,
    wire_has_scales: bool,
}

impl Node {
    pub fn new(
        (config, plan): (&MoeConfig, &Plan),
        nodes: Nodes,
        buffers: &Buffers,
        heap: Arc<dyn Heap>,
    ) -> Result<Self> {
        let failed = |error: TransportError| error.into_core(Stage::QuantizeDispatch, plan.comm(), 0);
        let map = |rank: Rank, region| -> Result<Rows> {
            let out_of_reach = || {
                let why = format!("the memory of {rank} is out of reach");
                Error::contract(Stage::QuantizeDispatch, plan.comm(), why)
            };
            Rows::map(&*heap, rank, region).map_err(failed)?.ok_or_else(out_of_reach)
        };
        let peer = |rank| {
            let received = buffers.received.try_map(|region| map(rank, region))?;
            Ok(Peer { received, outputs: map(rank, buffers.outputs)? })
        };
        let peers = nodes.peers().map(peer).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            tallies: vec![Tally::default(); peers.len()],
            cursor: buffers.cursor,
            expert_out: map(nodes.rank(), buffers.expert_out)?,
            sums: Sums::new(config, plan),
            max_rows: plan.max_rows() as u32,
            overflow: None,
            row_bytes: Fields::of_plan(config, plan).record_bytes(),
            output_bytes: buffers.outputs.row_bytes(),
            streaming: false,
            payload_dtype: plan.wire().payload,
            wire_has_scales: plan.wire().scale.is_some(),
            peers,
            nodes,
            heap,
        })
    }

    /// Bytes of this rank's own bookkeeping.
    pub fn local_bytes(config: &MoeConfig, plan: &Plan) -> usize {
        let tallies = Nodes::new(config, Rank(0)).ranks_per_node() * size_of::<Tally>();
        tallies + Sums::local_bytes(config, plan)
    }

    /// What is allocated of it.
    pub fn allocated_bytes(&self) -> usize {
        self.tallies.len() * size_of::<Tally>() + self.sums.allocated_bytes()
    }

    /// Begins a round. All ranks of the node have posted their last status of the dispatch before this one, so nobody
    /// takes rows of that round any more.
    pub fn begin(&mut self, round: u64) -> ep_transport::Result<()> {
        self.tallies.fill(Tally::default());
        self.overflow = None;
        self.cursor.rearm(&*self.heap, round)
    }

    /// Finds the ranks of this node that a token goes to. `rows` has a row for each slot.
    pub fn find(&mut self, destinations: &Destinations, ids: &[i32], rows: &mut [RowOn]) {
        for (slot, on) in rows.iter_mut().enumerate() {
            *on = RowOn::NOWHERE;
            if let Some(place) = destinations.local(ids, slot) {
                self.tallies[place].found += 1;
                // The row is known when it is written.
                on.place = place as u32;
            }
        }
    }

    /// Reserves rows for all tokens found since the last time: one atomic add per rank. Where there is no room for all
    /// of them, the rest is not written, and [`Node::overflow`] says so.
    pub fn reserve(&mut self, round: u64) -> ep_transport::Result<()> {
        self.streaming = self.streams();
        for (rank, tally) in self.nodes.peers().zip(&mut self.tallies).filter(|(_, tally)| tally.found > 0) {
            tally.next = self.cursor.take(&*self.heap, rank, round, u64::from(tally.found))? as u32;
            let rows = tally.next.saturating_add(tally.found);
            if rows > self.max_rows {
                let fault = Fault::TooManyReceivedRows { rank: rank.0, rows, max: self.max_rows };
                self.overflow.get_or_insert(fault);
            }
            tally.found = 0;
        }
        Ok(())
    }

    /// Whether the rows of this round are more than the caches hold. Other ranks write about as much as this one.
    fn streams(&self) -> bool {
        let rows: u32 = self.tallies.iter().map(|tally| tally.found + tally.written).sum();
        rows as usize * self.row_bytes * self.peers.len() > CACHED
    }

    /// Writes a token to the ranks that were found for it.
    pub fn write(&mut self, token: Fields<&[u8]>, rows: &mut [RowOn]) {
        for on in rows.iter_mut().filter(|on| on.place != RowOn::NOWHERE.place) {
            let tally = &mut self.tallies[on.place as usize];
            if tally.next >= self.max_rows {
                *on = RowOn::NOWHERE;
                continue;
            }
            on.row = tally.next;
            tally.next += 1;
            tally.fresh += 1;
            tally.written += 1;
            let received = self.peers[on.place as usize].received.into_array();
            for (to, from) in received.into_iter().zip(token.into_array()) {
                // SAFETY: this rank has reserved the row in this round (see the head of the file); the heap is owned
                // by `self`.
                let to = unsafe { to.row_mut(on.row as usize) };
                match self.streaming && from.len() >= STREAMED {
                    true => copy_streaming(to, from),
                    false => to.copy_from_slice(from),
                }
            }
        }
    }

    /// What this rank has to say of rows for which there was no room in this round.
    pub fn overflow(&self) -> Option<Fault> {
        self.overflow
    }

    /// Rows written to `rank` since the last announcement; none if it is on another node.
    pub fn fresh(&self, rank: Rank) -> u64 {
        match self.nodes.node_of(rank) == self.nodes.mine() {
            true => u64::from(self.tallies[rank.index() % self.nodes.ranks_per_node()].fresh),
            false => 0,
        }
    }

    /// Counts the fresh rows as moved and announced.
    pub fn announced(&mut self) {
        for (rank, tally) in self.nodes.peers().zip(&mut self.tallies).filter(|(_, tally)| tally.fresh > 0) {
            self.heap.count_direct(rank, tally.fresh as usize * self.row_bytes);
            tally.fresh = 0;
        }
    }

    /// Writes the sum of the outputs of `rows`, slot by slot. Zero if there are none.
    pub fn sum_outputs(&mut self, rows: &[RowOn], out: OutputRow<'_>) {
        let Self { peers, sums, .. } = self;
        let output = |on: &RowOn| {
            // SAFETY: the owner of the row has posted that its outputs are ready and writes them again only after
            // this rank's next dispatch status.
            unsafe { peers[on.place as usize].outputs.row(on.row as usize) }
        };
        sums.write(rows.iter().filter(|on| **on != RowOn::NOWHERE).map(output), out);
    }

    /// How rows travel in this handle's combine.
    pub fn sums(&mut self) -> &mut Sums {
        &mut self.sums
    }

    /// Brings the first `count` of this rank's expert outputs into the form in which they travel.
    pub fn publish(&mut self, count: usize) {
        if !self.sums.quantises() {
            return;
        }
        let (expert_out, outputs) = (self.expert_out, self.mine().outputs);
        for row in 0..count {
            // SAFETY: both rows are this rank's alone until it posts that its outputs are ready, and the experts have
            // handed the first back; any bytes are a bf16.
            unsafe { self.sums.pack(expert_out.row_as(row), outputs.row_mut(row)) };
        }
    }

    /// Counts the outputs of all rows written in this round as read.
    pub fn outputs_read(&self) {
        for (rank, tally) in self.nodes.peers().zip(&self.tallies).filter(|(_, tally)| tally.written > 0) {
            self.heap.count_direct(rank, tally.written as usize * self.output_bytes);
        }
    }

    fn mine(&self) -> &Peer {
        &self.peers[self.nodes.place()]
    }

    /// Views of this rank's received rows, of which the first `count` are valid.
    pub fn received<'a>(&'a self, count: &'a [i32; 1]) -> Result<Dispatched<'a>, ViewError> {
        let (Peer { received, .. }, expert_out) = (self.mine(), &self.expert_out);
        let view = |rows: &Rows, dtype| {
            // SAFETY: the writers of this round have posted their statuses and those of the next wait for this
            // rank's; `&self` keeps the heap alive and this rank from posting it.
            unsafe { TensorView::from_allocation(rows.allocation(dtype), rows.tensor_layout(dtype)) }
        };
        // SAFETY: this rank alone writes its expert outputs, and its peers read them after its status; the view
        // borrows `self`, and that status is posted after it.
        let output = unsafe {
            let dtype = DType::Bf16;
            TensorViewMut::from_allocation(expert_out.allocation(dtype), expert_out.tensor_layout(dtype))?
        };
        let topk =
            TopK { ids: view(&received.ids, DType::I32)?, weights: view(&received.weights, DType::F32)? };
        Ok(Dispatched {
            hidden: view(&received.payload, self.payload_dtype)?,
            scale: self.wire_has_scales.then(|| view(&received.scales, DType::F32)).transpose()?,
            arrived: Arrived::Standard {
                topk,
                rows: ReceivedRows(TensorView::from_slice(count, DType::I32, &[1])?),
            },
            output: Some(output),
        })
    }

    /// Copies the first `count` expert outputs, which the caller lent, into the region that peers read.
    pub fn take_lent(&mut self, lent: TensorView<'_>, count: usize) -> Result<(), Source> {
        let expert_out = self.expert_out;
        let layout = expert_out.tensor_layout(DType::Bf16);
        if lent.dims() != layout.dims() || lent.dtype() != DType::Bf16 {
            let (dims, dtype, wanted) = (lent.dims(), lent.dtype(), layout.dims());
            return Err(format!("expert output is {dims:?} of {dtype}, needs {wanted:?} of bf16").into());
        }
        for row in 0..count {
            let from = lent.row_bytes(row)?;
            // SAFETY: as for the output view in `received`; the lent tensor is not this region, which the caller
            // could only have borrowed from `self`.
            unsafe { expert_out.row_mut(row).copy_from_slice(from) };
        }
        Ok(())
    }
}
