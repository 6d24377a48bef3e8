//! Transports that break their word: what they do to a round must be seen by the conformance suite.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ep_transport::{
    Deadline, Endpoint, Heap, HeapSize, Payload, Result, Signal, SymOffset, SymWord, Traffic, Transport,
    Until, transport_of,
};
use fused_moe_core::{
    KernelKind, MoeConfig, Plan, PrepareCaps, PrepareFinalize, PrepareFinalizeProvider, ProcessGroup, Rank,
    Support, WireBytes,
};
use moe_conformance::{Outcome, Suite};
use mori_comm::MoriBackend;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Nothing: the control.
    None,
    /// This put of a rank to another node sets its flag and moves nothing.
    LostPut(usize),
    /// Rows for a rank land on its neighbour on the node.
    WrongRank,
}

/// The backend over a transport with a fault.
#[derive(Clone, Copy)]
struct Tampered(MoriBackend, Fault);

struct TamperedTransport {
    inner: Arc<dyn Transport>,
    fault: Fault,
}

struct TamperedHeap {
    inner: Arc<dyn Heap>,
    fault: Fault,
    ranks_per_node: usize,
    puts: AtomicUsize,
}

impl PrepareFinalizeProvider for Tampered {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        self.0.supports(config, kind)
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        self.0.required_bytes(config, plan)
    }

    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        self.0.wire_bytes_per_token(config, plan)
    }

    fn build(
        &self,
        config: &MoeConfig,
        plan: &Plan,
        group: &dyn ProcessGroup,
    ) -> fused_moe_core::Result<PrepareFinalize> {
        let inner = transport_of(group).expect("the suite runs over an ep-transport");
        let endpoint = Endpoint::new(Arc::new(TamperedTransport { inner, fault: self.1 }));
        self.0.build(config, plan, &endpoint)
    }
}

impl Transport for TamperedTransport {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn ranks_per_node(&self) -> usize {
        self.inner.ranks_per_node()
    }

    fn timeout(&self) -> Duration {
        self.inner.timeout()
    }

    fn all_gather(&self, mine: &[u8], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        self.inner.all_gather(mine, deadline)
    }

    fn barrier(&self, deadline: Deadline) -> Result<()> {
        self.inner.barrier(deadline)
    }

    fn allocate(&self, size: HeapSize, deadline: Deadline) -> Result<Arc<dyn Heap>> {
        let (fault, ranks_per_node) = (self.fault, self.ranks_per_node());
        let inner = self.inner.allocate(size, deadline)?;
        Ok(Arc::new(TamperedHeap { inner, fault, ranks_per_node, puts: AtomicUsize::new(0) }))
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }
}

// SAFETY: every access is the inner heap's; a put that is left out writes nothing, and pointers to another rank's
// memory are as valid as those asked for. What is broken is the order that the protocol relies on, and then bytes are
// stale, which every reader of rows has to stand.
unsafe impl Heap for TamperedHeap {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn size(&self) -> HeapSize {
        self.inner.size()
    }

    unsafe fn put_nbi(&self, to: Rank, payload: Payload<'_>) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.put_nbi(to, payload) }
    }

    unsafe fn put_signal(&self, to: Rank, payload: Payload<'_>, signal: Signal) -> Result<()> {
        let number = self.puts.fetch_add(1, Ordering::Relaxed);
        if self.fault == Fault::LostPut(number) {
            return self.inner.signal_set(to, signal);
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.put_signal(to, payload, signal) }
    }

    fn signal_set(&self, to: Rank, signal: Signal) -> Result<()> {
        self.inner.signal_set(to, signal)
    }

    fn signal_wait_until(&self, word: SymWord, until: Until, from: Rank, deadline: Deadline) -> Result<u64> {
        self.inner.signal_wait_until(word, until, from, deadline)
    }

    fn signal_read(&self, word: SymWord) -> Result<u64> {
        self.inner.signal_read(word)
    }

    fn atomic_fetch_add(&self, to: Rank, word: SymWord, n: u64) -> Result<u64> {
        self.inner.atomic_fetch_add(to, word, n)
    }

    fn fence(&self) {
        self.inner.fence();
    }

    fn quiet(&self, deadline: Deadline) -> Result<()> {
        self.inner.quiet(deadline)
    }

    fn peer_ptr(&self, of: Rank, offset: SymOffset, len: usize) -> Result<Option<NonNull<u8>>> {
        let (node, place) = (of.index() / self.ranks_per_node, of.index() % self.ranks_per_node);
        let neighbour = node * self.ranks_per_node + (place + 1) % self.ranks_per_node;
        let wrong = self.fault == Fault::WrongRank && of != self.rank() && neighbour != self.rank().index();
        self.inner.peer_ptr(if wrong { Rank(neighbour as u32) } else { of }, offset, len)
    }

    fn local_ptr(&self, offset: SymOffset, len: usize) -> Result<NonNull<u8>> {
        self.inner.local_ptr(offset, len)
    }

    fn count_direct(&self, with: Rank, bytes: usize) {
        self.inner.count_direct(with, bytes);
    }
}

/// Asserts that the suite fails the backend over a transport with `fault` in `case`.
fn is_caught(fault: Fault, case: &str) {
    for backend in MoriBackend::ALL {
        let outcome = |fault| Suite::comm(Tampered(backend, fault)).outcome(case);
        assert_eq!(outcome(Fault::None), Outcome::Pass, "{backend:?} without a fault in {case}");
        let Outcome::Fail(why) = outcome(fault) else { panic!("{backend:?} passes {case} with {fault:?}") };
        println!("{backend:?}, {fault:?}: {why:.200}");
    }
}

/// Among four ranks on two nodes the first put of a rank is its first chunk of tokens.
#[test]
fn a_lost_chunk_of_tokens() {
    is_caught(Fault::LostPut(0), "rows_none_ep4n2");
}

/// In a small case every round is one chunk out and one of sums back.
#[test]
fn a_lost_chunk_of_sums() {
    is_caught(Fault::LostPut(1), "twohandles_none_ep4n2");
}

#[test]
fn tokens_on_the_wrong_rank() {
    is_caught(Fault::WrongRank, "rows_none_ep8n2");
}
