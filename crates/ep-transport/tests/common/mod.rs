//! Rounds in which every rank sends every other a payload, each in a way of its own.

use std::sync::Arc;

use ep_transport::{
    Deadline, Endpoint, Heap, HeapLayout, Payload, Result, Signal, SymOffset, SymWord, Until,
};
use fused_moe_core::Rank;
use rand::{Rng, RngCore, SeedableRng};
use rand_pcg::Pcg64;

/// Longest payload of a transfer, in bytes.
const MAX_LEN: usize = 600;

pub fn ranks(world_size: usize) -> impl Iterator<Item = Rank> {
    (0..world_size as u32).map(Rank)
}

/// How a payload and its signal travel.
#[derive(Clone, Copy, Debug)]
enum Way {
    PutSignal,
    PutFenceSet,
    Direct,
}

/// All-to-all rounds over one slot per (source, destination), each slot reused every round.
pub struct Exchange {
    heap: Arc<dyn Heap>,
    world_size: usize,
    seed: u64,
    slots: SymOffset,
    arrived: SymWord,
    consumed: SymWord,
    deadline: Deadline,
}

impl Exchange {
    pub fn new(group: &Endpoint, seed: u64) -> Result<Self> {
        let transport = group.transport();
        let world_size = transport.world_size();
        let mut layout = HeapLayout::default();
        let slots = layout.region(world_size * MAX_LEN);
        let (arrived, consumed) = (layout.words(world_size), layout.words(world_size));
        let heap = transport.allocate(layout.size(), transport.deadline())?;
        Ok(Self { heap, world_size, seed, slots, arrived, consumed, deadline: transport.deadline() })
    }

    /// What `source` sends to `to` in `round`, and how. Both ends can tell.
    fn transfer(&self, source: Rank, to: Rank, round: u64) -> (Vec<u8>, Way) {
        let stream = (round << 16) | u64::from(source.0 << 8) | u64::from(to.0);
        let mut rng = Pcg64::seed_from_u64(self.seed ^ stream);
        // One transfer in eight is empty.
        let len = if rng.random_ratio(1, 8) { 0 } else { rng.random_range(1..=MAX_LEN) };
        let mut payload = vec![0; len];
        rng.fill_bytes(&mut payload);
        let way = [Way::PutSignal, Way::PutFenceSet, Way::Direct][rng.random_range(0..3)];
        (payload, way)
    }

    fn slot(&self, source: Rank) -> SymOffset {
        self.slots + source.index() * MAX_LEN
    }

    /// Sends this round's payload to `to`, or, as a saboteur, the signal alone.
    fn send(&self, to: Rank, round: u64, sabotage: bool) -> Result<()> {
        let me = self.heap.rank();
        let (bytes, way) = self.transfer(me, to, round);
        let payload = Payload { offset: self.slot(me), bytes: &bytes };
        let signal = Signal { word: self.arrived + me.index(), value: round };
        if sabotage {
            return self.heap.signal_set(to, signal);
        }
        // SAFETY: the slot is this rank's at `to`, and `to` has signalled that it consumed the last round.
        unsafe {
            match way {
                Way::PutSignal => self.heap.put_signal(to, payload, signal),
                Way::PutFenceSet => {
                    self.heap.put_nbi(to, payload)?;
                    self.heap.fence();
                    self.heap.signal_set(to, signal)
                }
                Way::Direct => {
                    let slot = self.heap.peer_slice_mut(to, payload.offset, bytes.len())?;
                    slot.expect("one node").copy_from_slice(&bytes);
                    self.heap.signal_set(to, signal)
                }
            }
        }
    }

    /// Waits for the payload of `source` and tells it once it is consumed. Whether the payload was right.
    fn receive(&self, source: Rank, round: u64) -> Result<bool> {
        let me = self.heap.rank();
        let word = self.arrived + source.index();
        self.heap.signal_wait_until(word, Until::Eq(round), source, self.deadline)?;
        let (want, _) = self.transfer(source, me, round);
        // SAFETY: the source writes the slot again only after the signal below.
        let right = unsafe { self.heap.local(self.slot(source), want.len())? } == want;
        self.heap.signal_set(source, Signal { word: self.consumed + me.index(), value: round })?;
        Ok(right)
    }

    /// One round with everyone. The sources whose payload was wrong.
    pub fn round(&self, round: u64, sabotage: bool) -> Result<Vec<Rank>> {
        for to in ranks(self.world_size) {
            let word = self.consumed + to.index();
            self.heap.signal_wait_until(word, Until::Ge(round - 1), to, self.deadline)?;
            self.send(to, round, sabotage)?;
        }
        let mut wrong = Vec::new();
        for source in ranks(self.world_size) {
            if !self.receive(source, round)? {
                wrong.push(source);
            }
        }
        Ok(wrong)
    }
}
