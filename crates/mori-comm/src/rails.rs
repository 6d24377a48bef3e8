//! Between nodes: tokens in chunks to the proxies, sums of outputs back.
//!
//! Ranks in the same place of their nodes are proxies of each other. A token goes once to each other node that it
//! visits, to the proxy there, which hands it on inside the node; in combine the proxy sums what its node computed
//! for the token, rounds the sum to the type that travels, and sends it back to the slot of the token.
//!
//! # Flags
//! A chunk is one put with its signal ([`Chunk`]). A rank that sends nothing, for whatever reason, sends an empty last
//! chunk, so every round of every rail has an end.
//!
//! # Who may touch which bytes when
//! - *A window of the inbox* is written by the proxy that it belongs to, and read between its flags and this rank's
//!   `forwarded` status. There are two by the parity of the round: a proxy is in round r + 2 only when it has seen this
//!   rank's dispatch status of round r + 1, and so the end of its forwarding in round r, even if that round failed.
//! - *A window of the returned outputs* is written by its proxy in combine, and read after its flags and before this
//!   rank's dispatch status of the next round, for which the proxy waits before it writes again.

use std::sync::Arc;

use ep_transport::{Chunk, Deadline, Heap, Payload, Signal, Until};
use fused_moe_core::{MoeConfig, Plan, Rank};
use half::bf16;

use crate::buffers::{CHUNK, RailBuffers};
use crate::kernel::Token;
use crate::node::{Node, RowOn};
use crate::nodes::{Destinations, Nodes};
use crate::record::{Fields, read_ids};
use crate::sum::{FewRows, OutputRow, travelling_bytes};

/// No slot: a token that does not visit the node.
const NO_SLOT: u32 = u32::MAX;

/// One other node: what this rank sends there, and what it forwards and sums for its proxy there.
struct Rail {
    node: usize,
    proxy: Rank,
    /// This rank's windows for the node.
    window: usize,
    /// The proxy's windows for this node.
    there: usize,
    /// `[max_tokens]` records: the sources of puts.
    outgoing: Vec<u8>,
    /// Records in `outgoing`, and how many of them were put.
    staged: usize,
    put: usize,
    /// `[max_tokens]`: the slot of each token in the windows, [`NO_SLOT`] if it does not visit the node.
    slots: Vec<u32>,
    /// Tokens that came from the proxy, and whether those were all.
    forwarded: usize,
    complete: bool,
    /// `[max_tokens, top_k]`: where the proxy's tokens lie on this node.
    rows: Vec<RowOn>,
    /// `[max_tokens]` sums of outputs for the proxy as they travel, the sources of puts.
    sums: Vec<u8>,
}

/// All other nodes.
pub(crate) struct Rails {
    rails: Vec<Rail>,
    buffers: RailBuffers,
    record: Fields<usize>,
    ids: Vec<i32>,
    /// `[hidden]`: a sum over this node, and the same as it travels.
    sum: Vec<bf16>,
    own: Vec<u8>,
    heap: Arc<dyn Heap>,
}

impl Rails {
    pub fn new(
        (config, plan): (&MoeConfig, &Plan),
        nodes: Nodes,
        buffers: RailBuffers,
        heap: Arc<dyn Heap>,
    ) -> Self {
        let record = Fields::of_plan(config, plan);
        let tokens = config.max_tokens_per_rank;
        let rail = |node| Rail {
            node,
            proxy: nodes.proxy(node),
            window: Nodes::window(nodes.mine(), node),
            there: Nodes::window(node, nodes.mine()),
            outgoing: vec![0; tokens * record.record_bytes()],
            staged: 0,
            put: 0,
            slots: vec![NO_SLOT; tokens],
            forwarded: 0,
            complete: false,
            rows: vec![RowOn::NOWHERE; tokens * config.top_k],
            sums: vec![0; tokens * travelling_bytes(config, plan)],
        };
        Self {
            rails: nodes.others().map(rail).collect(),
            buffers,
            record,
            ids: vec![0; config.top_k],
            sum: vec![bf16::ZERO; config.hidden],
            own: vec![0; travelling_bytes(config, plan)],
            heap,
        }
    }

    /// Bytes of this rank's own bookkeeping.
    pub fn local_bytes(config: &MoeConfig, plan: &Plan) -> usize {
        let record = Fields::of_plan(config, plan).record_bytes();
        let row = travelling_bytes(config, plan);
        let token = record + size_of::<u32>() + config.top_k * size_of::<RowOn>() + row;
        let rails = Nodes::new(config, Rank(0)).count() - 1;
        let once = config.top_k * size_of::<i32>() + config.hidden * size_of::<bf16>() + row;
        rails * config.max_tokens_per_rank * token + once
    }

    /// What is allocated of it.
    pub fn allocated_bytes(&self) -> usize {
        let rail = |rail: &Rail| {
            rail.outgoing.len()
                + rail.slots.len() * size_of::<u32>()
                + rail.rows.len() * size_of::<RowOn>()
                + rail.sums.len()
        };
        self.rails.iter().map(rail).sum::<usize>()
            + self.ids.len() * size_of::<i32>()
            + size_of_val(&*self.sum)
            + self.own.len()
    }

    pub fn buffers(&self) -> &RailBuffers {
        &self.buffers
    }

    /// Begins a round: waits until the puts of the one before have left, so that their sources may change.
    pub fn begin(&mut self, deadline: Deadline) -> ep_transport::Result<()> {
        for rail in &mut self.rails {
            (rail.staged, rail.put, rail.forwarded, rail.complete) = (0, 0, 0, false);
            rail.slots.fill(NO_SLOT);
        }
        self.heap.quiet(deadline)
    }

    /// Takes a token, and puts the chunk before it if that is full. `whole`: to nodes that it does not visit, too.
    pub fn send(
        &mut self,
        destinations: &Destinations,
        Token { index, ids, fields }: Token<'_>,
        (round, whole): (u64, bool),
    ) -> ep_transport::Result<()> {
        let Self { rails, buffers, record, heap, .. } = self;
        let bytes = record.record_bytes();
        for rail in rails {
            let visits = destinations.visits(ids, rail.node);
            if !visits && !whole {
                continue;
            }
            if visits {
                rail.slots[index] = rail.staged as u32;
            }
            if rail.staged == rail.put + CHUNK {
                rail.put_chunk(&**heap, buffers, (round, false))?;
            }
            let to = record.split_mut(&mut rail.outgoing[rail.staged * bytes..][..bytes]);
            for (to, from) in to.into_array().into_iter().zip(fields.into_array()) {
                to.copy_from_slice(from);
            }
            rail.staged += 1;
        }
        Ok(())
    }

    /// Puts the last chunk of every rail; an empty one if the round has failed here.
    pub fn end(&mut self, round: u64, failed: bool) -> ep_transport::Result<()> {
        let Self { rails, buffers, heap, .. } = self;
        let mut told = Ok(());
        for rail in rails {
            if failed {
                rail.staged = rail.put;
            }
            told = told.and(rail.put_chunk(&**heap, buffers, (round, true)));
        }
        told
    }

    /// Hands the tokens of all proxies on to the ranks of this node, chunk by chunk as they come.
    pub fn forward(
        &mut self,
        (node, destinations): (&mut Node, &Destinations),
        round: u64,
        deadline: Deadline,
    ) -> ep_transport::Result<()> {
        let Self { rails, buffers, record, ids, heap, .. } = self;
        loop {
            let mut waiting = None;
            let mut progress = false;
            for rail in rails.iter_mut().filter(|rail| !rail.complete) {
                let flag = buffers.arrived(round, rail.window, rail.forwarded / CHUNK);
                match Chunk::look(&**heap, flag, round)? {
                    Some(chunk) => {
                        let heap = (&**heap, &*buffers);
                        rail.forward_chunk((node, destinations), heap, (*record, ids), chunk)?;
                        progress = true;
                    }
                    None => waiting = waiting.or(Some((flag, rail.proxy))),
                }
            }
            match waiting {
                Some((flag, proxy)) if !progress => {
                    Chunk::wait(&**heap, flag, round, proxy, deadline)?;
                }
                None if !progress => return Ok(()),
                _ => {}
            }
        }
    }

    /// Sums what this node has computed for the tokens of its proxies, and puts the sums back.
    pub fn give_back(&mut self, node: &mut Node, round: u64) -> ep_transport::Result<()> {
        let Self { rails, buffers, ids, sum, heap, .. } = self;
        let (top_k, row_bytes) = (ids.len(), buffers.returned.row_bytes());
        for rail in rails {
            for first in (0..rail.forwarded).step_by(CHUNK) {
                let tokens = first..(first + CHUNK).min(rail.forwarded);
                for token in tokens.clone() {
                    let rows = &rail.rows[token * top_k..][..top_k];
                    // A token of a whole window that does not visit this node: nobody reads its slot.
                    if rows.iter().all(|on| *on == RowOn::NOWHERE) {
                        continue;
                    }
                    node.sum_outputs(rows, OutputRow::Bf16(sum));
                    node.sums().pack(sum, &mut rail.sums[token * row_bytes..][..row_bytes]);
                }
                let row = buffers.returned_row(rail.there) + first;
                let bytes = &rail.sums[first * row_bytes..tokens.end * row_bytes];
                let payload = Payload { offset: buffers.returned.row(row), bytes };
                let signal = Signal { word: buffers.back(rail.there, first / CHUNK), value: round };
                // SAFETY: the proxy reads the rows after the flag and has read those of the round before: see the head
                // of the file. The sums change after the `quiet` of the next round.
                unsafe { heap.put_signal(rail.proxy, payload, signal)? };
            }
        }
        Ok(())
    }

    /// Waits for the sums of all nodes that this rank's tokens went to.
    pub fn collect(&self, round: u64, deadline: Deadline) -> ep_transport::Result<()> {
        for rail in &self.rails {
            for chunk in 0..rail.staged.div_ceil(CHUNK) {
                let flag = self.buffers.back(rail.window, chunk);
                self.heap.signal_wait_until(flag, Until::Ge(round), rail.proxy, deadline)?;
            }
        }
        Ok(())
    }

    /// Sums what all nodes have computed for one of this rank's tokens, in node order. `rows`: where it lies on this
    /// node.
    pub fn sum(
        &mut self,
        (node, nodes): (&mut Node, Nodes),
        (token, rows): (usize, &[RowOn]),
        out: OutputRow<'_>,
    ) -> ep_transport::Result<()> {
        let Self { rails, buffers, sum, own, heap, .. } = self;
        // This node's own sum is rounded as if it had travelled, so that it does not matter who asks.
        let here = rows.iter().any(|on| *on != RowOn::NOWHERE);
        if here {
            node.sum_outputs(rows, OutputRow::Bf16(sum));
            node.sums().pack(sum, own);
        }
        let mut terms = FewRows::<&[u8]>::new();
        for number in 0..nodes.count() {
            if number == nodes.mine() {
                terms.extend(here.then_some(&**own));
                continue;
            }
            let rail = rails.iter().find(|rail| rail.node == number);
            let slot = rail.map(|rail| (rail.window, rail.slots[token])).filter(|&(_, slot)| slot != NO_SLOT);
            let Some((window, slot)) = slot else { continue };
            let row = buffers.returned.row(buffers.returned_row(window) + slot as usize);
            // SAFETY: the flag of the row's chunk was seen, and the proxy writes it again only after this rank's
            // next dispatch status.
            terms.push(unsafe { heap.local(row, buffers.returned.row_bytes())? });
        }
        node.sums().write(terms.into_iter(), out);
        Ok(())
    }
}

impl Rail {
    /// Puts the records that were staged since the last chunk.
    fn put_chunk(
        &mut self,
        heap: &dyn Heap,
        buffers: &RailBuffers,
        (round, last): (u64, bool),
    ) -> ep_transport::Result<()> {
        let chunk = Chunk { round, rows: self.staged - self.put, last };
        let bytes = buffers.inbox.row_bytes();
        let payload = Payload {
            offset: buffers.inbox.row(buffers.inbox_row(round, self.there) + self.put),
            bytes: &self.outgoing[self.put * bytes..self.staged * bytes],
        };
        let word = buffers.arrived(round, self.there, self.put / CHUNK);
        // SAFETY: the window is this rank's and of this parity, which the proxy has done with: see the head of the
        // file. The records change after the `quiet` of the next round.
        unsafe { chunk.put(heap, self.proxy, payload, word)? };
        self.put = self.staged;
        Ok(())
    }

    /// Hands the next chunk of the proxy on.
    fn forward_chunk(
        &mut self,
        (node, destinations): (&mut Node, &Destinations),
        (heap, buffers): (&dyn Heap, &RailBuffers),
        (record, ids): (Fields<usize>, &mut [i32]),
        chunk: Chunk,
    ) -> ep_transport::Result<()> {
        let (top_k, bytes) = (ids.len(), buffers.inbox.row_bytes());
        let first = self.forwarded;
        // No sound rank has more tokens than its window rows.
        let tokens = chunk.rows.min(CHUNK).min(buffers.rows - first);
        let offset = buffers.inbox.row(buffers.inbox_row(chunk.round, self.window) + first);
        // SAFETY: the flag of the chunk was seen, and the proxy writes these rows again two rounds later.
        let records = unsafe { heap.local(offset, tokens * bytes)? };
        let rows = &mut self.rows[first * top_k..][..tokens * top_k];
        let each = || records.chunks_exact(bytes).map(|bytes| record.split(bytes));
        for (token, rows) in each().zip(rows.chunks_exact_mut(top_k)) {
            read_ids(token.ids, ids);
            node.find(destinations, ids, rows);
        }
        node.reserve(chunk.round)?;
        for (token, rows) in each().zip(rows.chunks_exact_mut(top_k)) {
            node.write(token, rows);
        }
        self.forwarded += tokens;
        self.complete = chunk.last;
        Ok(())
    }
}
