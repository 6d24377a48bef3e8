//! Linear tickets: the order of the four phases, kept by types and checked at run time.
//!
//! A backend owns a [`TicketLedger`]; only a ledger makes tickets, and it redeems only its own, once, in the
//! round they were made for. The routing travels inside the tickets, so the combine sees this rank's own
//! pre-dispatch ids and nobody can hand it others (mori #475).

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::MoeConfig;
use crate::dtype::DeviceKind;
use crate::error::{Error, ErrorKind, Result, Source, Stage};
use crate::fault::Fault;
use crate::placement::Rank;
use crate::prepare_finalize::{MonolithicInput, PrepareInput};
use crate::validate;

/// The halves of a round, as types.
pub mod phase {
    /// Between `prepare_send` and `prepare_recv`.
    #[derive(Debug)]
    pub enum Prepare {}
    /// Between `finalize_send` and `finalize_recv`.
    #[derive(Debug)]
    pub enum Finalize {}
}

/// This rank's own routing of one round, `num_tokens` rows of `top_k`.
#[derive(Debug, Default)]
pub struct Routing {
    ids: Vec<i32>,
    weights: Vec<f32>,
    num_tokens: usize,
    top_k: usize,
}

impl Routing {
    /// Tokens of the round on this rank.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Slots per token; 0 in a monolithic round, where experts route by themselves.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// `[num_tokens, top_k]` global expert ids; empty if they were lent in device memory.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// `[num_tokens, top_k]` routing weights.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The ids of one token.
    pub fn ids_of(&self, token: usize) -> &[i32] {
        &self.ids[token * self.top_k..(token + 1) * self.top_k]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    handle: u64,
    round: u64,
}

/// Receipt of a send. It borrows what was lent to the send, so that outlives the flight, and it can be redeemed
/// once:
///
/// ```
/// # use fused_moe_core::*;
/// fn once(p: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, sent: Sent<'_, phase::Prepare>) {
///     let _ = p.prepare_recv(cx, sent);
/// }
/// ```
///
/// not twice:
///
/// ```compile_fail,E0382
/// # use fused_moe_core::*;
/// fn twice(p: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, sent: Sent<'_, phase::Prepare>) {
///     let _ = p.prepare_recv(cx, sent);
///     let _ = p.prepare_recv(cx, sent);
/// }
/// ```
///
/// The receipt of one half is not a receipt of the other:
///
/// ```compile_fail,E0308
/// # use fused_moe_core::*;
/// fn crossed(p: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, sent: Sent<'_, phase::Finalize>) {
///     let _ = p.prepare_recv(cx, sent);
/// }
/// ```
#[must_use = "the peers wait until this ticket is received"]
#[derive(Debug)]
pub struct Sent<'a, P> {
    stamp: Stamp,
    routing: Routing,
    _inputs: PhantomData<&'a ()>,
    _phase: PhantomData<P>,
}

impl<P> Sent<'_, P> {
    /// This rank's own routing of the round.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// Sequence number of the round on its handle, from 1.
    pub fn round(&self) -> u64 {
        self.stamp.round
    }
}

/// Receipt of a dispatch: what `finalize_send` needs to know, and nothing that borrows the handle.
///
/// Its routing can be read:
///
/// ```
/// # use fused_moe_core::*;
/// fn read(real: &Routed) -> &Routing {
///     real.routing()
/// }
/// ```
///
/// but not replaced, and nobody else can make one:
///
/// ```compile_fail,E0451
/// # use fused_moe_core::*;
/// fn forge(real: Routed, routing: Routing) -> Routed {
///     Routed { routing, ..real }
/// }
/// ```
#[must_use = "the peers wait until this ticket is finalized"]
#[derive(Debug)]
pub struct Routed {
    stamp: Stamp,
    routing: Routing,
}

impl Routed {
    /// This rank's own routing of the round.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// Sequence number of the round on its handle, from 1.
    pub fn round(&self) -> u64 {
        self.stamp.round
    }
}

/// A ticket that was dropped, made again so that the round can be brought to its end.
#[derive(Debug)]
pub enum Outstanding {
    /// Dropped between `prepare_send` and `prepare_recv`.
    PrepareSent(Sent<'static, phase::Prepare>),
    /// Dropped between `prepare_recv` and `finalize_send`.
    Dispatched(Routed),
    /// Dropped between `finalize_send` and `finalize_recv`.
    FinalizeSent(Sent<'static, phase::Finalize>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    PrepareSent,
    Dispatched,
    FinalizeSent,
    Lost(Rank),
}

/// The only maker and redeemer of a handle's tickets.
#[derive(Debug)]
pub struct TicketLedger {
    backend: &'static str,
    rank: Rank,
    handle: u64,
    round: u64,
    state: State,
    spare: Routing,
    detail: Option<Source>,
}

static NEXT_HANDLE: AtomicU64 = AtomicU64::new(1);

impl TicketLedger {
    /// The ledger of a new handle, with room for the largest routing of `config`.
    pub fn new(backend: &'static str, rank: Rank, config: &MoeConfig) -> Self {
        let slots = config.max_tokens_per_rank * config.top_k;
        let spare = Routing {
            ids: Vec::with_capacity(slots),
            weights: Vec::with_capacity(slots),
            ..Routing::default()
        };
        let handle = NEXT_HANDLE.fetch_add(1, Ordering::Relaxed);
        Self { backend, rank, handle, round: 0, state: State::Idle, spare, detail: None }
    }

    /// Sequence number of the current round, from 1; 0 before the first.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// The round whose tickets are still out; `None` between rounds and after a loss.
    pub fn in_flight(&self) -> Option<u64> {
        (!matches!(self.state, State::Idle | State::Lost(_))).then_some(self.round)
    }

    /// Opens a modular round: checks the input and copies the routing into the ticket.
    ///
    /// With a fault (an invalid input, or one that the caller reports) the ticket holds no tokens, and the
    /// backend sends the fault to every peer instead.
    ///
    /// # Errors
    /// `Contract` if a round is open (call `settle` first), `PeerLost` if the handle has lost a peer.
    pub fn open<'a>(
        &mut self,
        config: &MoeConfig,
        input: &PrepareInput<'a>,
    ) -> Result<(Sent<'a, phase::Prepare>, Option<Fault>)> {
        let checked = match input.fault {
            Some(fault) => Err((fault, None)),
            None => validate::prepare_input(config, input),
        };
        self.open_round(checked, |routing| {
            routing.num_tokens = input.hidden.dims()[0];
            routing.top_k = config.top_k;
            if input.topk.ids.device().kind != DeviceKind::Host {
                // A device backend copies the ids on its stream into a buffer of its own.
                return Ok(());
            }
            for token in 0..routing.num_tokens {
                routing.ids.extend_from_slice(input.topk.ids.row(token)?);
                routing.weights.extend_from_slice(input.topk.weights.row(token)?);
            }
            Ok(())
        })
    }

    /// Opens a monolithic round; otherwise as [`TicketLedger::open`].
    ///
    /// # Errors
    /// As [`TicketLedger::open`].
    pub fn open_monolithic<'a>(
        &mut self,
        config: &MoeConfig,
        input: &MonolithicInput<'a>,
    ) -> Result<(Sent<'a, phase::Prepare>, Option<Fault>)> {
        let checked = match input.fault {
            Some(fault) => Err((fault, None)),
            None => validate::monolithic_input(config, input),
        };
        self.open_round(checked, |routing| {
            routing.num_tokens = input.hidden.dims()[0];
            Ok(())
        })
    }

    fn open_round<'a>(
        &mut self,
        checked: std::result::Result<(), (Fault, Option<Source>)>,
        fill: impl FnOnce(&mut Routing) -> std::result::Result<(), crate::ViewError>,
    ) -> Result<(Sent<'a, phase::Prepare>, Option<Fault>)> {
        self.expect(State::Idle, Stage::QuantizeDispatch)?;
        let mut routing = std::mem::take(&mut self.spare);
        routing.clear();
        let checked =
            checked.and_then(|()| fill(&mut routing).map_err(|e| (Fault::BadTensor, Some(e.into()))));
        let fault = checked.err().map(|(fault, detail)| {
            routing.clear();
            self.detail = detail;
            fault
        });
        self.round += 1;
        self.state = State::PrepareSent;
        Ok((self.sent(routing), fault))
    }

    /// Redeems the ticket of `prepare_send`.
    ///
    /// # Errors
    /// `Contract` for a foreign or stale ticket.
    pub fn receive_prepare(&mut self, sent: Sent<'_, phase::Prepare>) -> Result<Routed> {
        self.check(sent.stamp, State::PrepareSent, Stage::QuantizeDispatch)?;
        self.state = State::Dispatched;
        Ok(Routed { stamp: sent.stamp, routing: sent.routing })
    }

    /// Redeems the ticket of `prepare_recv` for one of `finalize_send`.
    ///
    /// # Errors
    /// `Contract` for a foreign or stale ticket.
    pub fn send_finalize<'a>(&mut self, routed: Routed) -> Result<Sent<'a, phase::Finalize>> {
        self.check(routed.stamp, State::Dispatched, Stage::Combine)?;
        self.state = State::FinalizeSent;
        Ok(self.sent(routed.routing))
    }

    /// Redeems the ticket of `finalize_send`. The round stays open until [`TicketLedger::close`].
    ///
    /// # Errors
    /// `Contract` for a foreign or stale ticket.
    pub fn receive_finalize(&mut self, sent: Sent<'_, phase::Finalize>) -> Result<Routing> {
        self.check(sent.stamp, State::FinalizeSent, Stage::Combine)?;
        Ok(sent.routing)
    }

    /// Ends the round; the routing's memory serves the next one. A handle that has lost a peer stays lost.
    pub fn close(&mut self, routing: Routing) {
        self.spare = routing;
        self.detail = None;
        if !matches!(self.state, State::Lost(_)) {
            self.state = State::Idle;
        }
    }

    /// Keeps what only this rank can say about its own failure; the error that ends the round carries it.
    pub fn explain(&mut self, detail: impl Into<Source>) {
        self.detail = Some(detail.into());
    }

    /// Ends a round that failed on `rank` in its dispatch half, with the error that every rank returns.
    pub fn fail_prepare(&mut self, routed: Routed, rank: Rank, fault: Fault) -> Error {
        self.fail(routed.routing, rank, fault, Stage::QuantizeDispatch)
    }

    /// Ends a round that failed on `rank` in its combine half, with the error that every rank returns.
    pub fn fail_finalize(&mut self, routing: Routing, rank: Rank, fault: Fault) -> Error {
        let stage = if fault == Fault::ExpertsFailed { Stage::Experts } else { Stage::Combine };
        self.fail(routing, rank, fault, stage)
    }

    fn fail(&mut self, routing: Routing, rank: Rank, fault: Fault, stage: Stage) -> Error {
        let mut error = Error::new(ErrorKind::RankFailed { rank, fault }, stage, self.backend);
        // Only the rank at fault knows more than the status word says.
        error.source = if rank == self.rank { self.detail.take() } else { None };
        self.close(routing);
        error
    }

    /// Marks the handle as unusable after `rank` missed a deadline.
    pub fn lost(&mut self, rank: Rank, stage: Stage) -> Error {
        self.state = State::Lost(rank);
        Error::new(ErrorKind::PeerLost { rank, round: self.round }, stage, self.backend)
    }

    /// The ticket of an open round, made again with no tokens; `None` between rounds and after a loss.
    pub fn outstanding(&mut self) -> Option<Outstanding> {
        let stamp = Stamp { handle: self.handle, round: self.round };
        let routing = Routing::default();
        match self.state {
            State::Idle | State::Lost(_) => None,
            State::PrepareSent => Some(Outstanding::PrepareSent(self.sent(routing))),
            State::Dispatched => Some(Outstanding::Dispatched(Routed { stamp, routing })),
            State::FinalizeSent => Some(Outstanding::FinalizeSent(self.sent(routing))),
        }
    }

    fn sent<'a, P>(&self, routing: Routing) -> Sent<'a, P> {
        let stamp = Stamp { handle: self.handle, round: self.round };
        Sent { stamp, routing, _inputs: PhantomData, _phase: PhantomData }
    }

    fn check(&self, stamp: Stamp, state: State, stage: Stage) -> Result<()> {
        if stamp.handle != self.handle {
            let why = format!("ticket of handle {} given to handle {}", stamp.handle, self.handle);
            return Err(Error::contract(stage, self.backend, why));
        }
        if stamp.round != self.round {
            let why = format!("ticket of round {} given in round {}", stamp.round, self.round);
            return Err(Error::contract(stage, self.backend, why));
        }
        self.expect(state, stage)
    }

    fn expect(&self, state: State, stage: Stage) -> Result<()> {
        match self.state {
            State::Lost(rank) => {
                Err(Error::new(ErrorKind::PeerLost { rank, round: self.round }, stage, self.backend))
            }
            found if found == state => Ok(()),
            found => {
                let why = format!("round {} is {found:?}, the call needs {state:?}", self.round);
                Err(Error::contract(stage, self.backend, why))
            }
        }
    }
}

impl Routing {
    fn clear(&mut self) {
        self.ids.clear();
        self.weights.clear();
        self.num_tokens = 0;
        self.top_k = 0;
    }
}
