//! Stages 2 and 4: quantise and dispatch, then combine.
//!
//! Four phases, because that is what the hardware does: each half is started by a send and ended by a receive,
//! and other work may run in between. One value is one micro-batch in flight.

use crate::config::MoeConfig;
use crate::dtype::DType;
use crate::error::{ErrorKind, Result};
use crate::exec::ExecCx;
use crate::fault::Fault;
use crate::layout::ViewError;
use crate::negotiate::PrepareCaps;
use crate::router::TopK;
use crate::tensor::{TensorView, TensorViewMut};
use crate::ticket::{Outstanding, Routed, Sent, TicketLedger, phase};

/// What a modular round starts with on one rank.
#[derive(Clone, Copy, Debug)]
pub struct PrepareInput<'a> {
    /// `[tokens, hidden]` in the configuration's element type; rows contiguous, gaps between rows allowed.
    pub hidden: TensorView<'a>,
    /// `[tokens, top_k]` ids and weights.
    pub topk: TopK<'a>,
    /// The layer's static scale, [`crate::ExpertWeights::input_scale`]: positive and finite for FP8 schemes with
    /// static scales, which a dispatch may quantise by; not read for others.
    pub input_scale: Option<f32>,
    /// A failure of this rank before the round: it takes part with zero tokens, and every rank returns it.
    pub fault: Option<Fault>,
}

/// What a monolithic round starts with on one rank.
#[derive(Clone, Copy, Debug)]
pub struct MonolithicInput<'a> {
    /// `[tokens, hidden]` in the configuration's element type; rows contiguous, gaps between rows allowed.
    pub hidden: TensorView<'a>,
    /// `[tokens, num_experts]` f32 router logits.
    pub logits: TensorView<'a>,
    /// As in [`PrepareInput::input_scale`].
    pub input_scale: Option<f32>,
    /// As in [`PrepareInput::fault`].
    pub fault: Option<Fault>,
}

/// How many rows of a received `[max_rows, hidden]` tensor are valid: one i32. Rows behind are garbage.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedRows<'p>(pub TensorView<'p>);

impl ReceivedRows<'_> {
    /// The count, if it lies on the host.
    ///
    /// # Errors
    /// [`ViewError::NotHost`] for a count in device memory.
    pub fn on_host(&self) -> Result<usize, ViewError> {
        Ok(self.0.as_slice::<i32>()?.first().map_or(0, |&n| n.max(0) as usize))
    }
}

/// How many rows of each local expert are valid: `[local_experts]` i32. Rows behind are garbage.
#[derive(Clone, Copy, Debug)]
pub struct TokensPerExpert<'p>(pub TensorView<'p>);

/// What came with the payload, by activation format.
#[derive(Clone, Copy, Debug)]
pub enum Arrived<'p> {
    /// For `[max_rows, hidden]`: the source's whole top-k row travels with every token.
    Standard {
        /// `[max_rows, top_k]` global ids, those of other ranks included, and weights.
        topk: TopK<'p>,
        /// Valid rows.
        rows: ReceivedRows<'p>,
    },
    /// For `[local_experts, max_rows, hidden]`: the position says the expert.
    Batched {
        /// Valid rows per expert.
        tokens: TokensPerExpert<'p>,
    },
}

/// Tokens that have arrived at their experts, in the backend's buffers.
#[derive(Debug)]
pub struct Dispatched<'p> {
    /// Payload in the plan's wire format, `[max_rows, hidden]` or `[local_experts, max_rows, hidden]`.
    pub hidden: TensorView<'p>,
    /// Scales, `[max_rows, scales_per_token]` (batched: with the experts in front); `Some` exactly when the
    /// plan's wire has scales.
    pub scale: Option<TensorView<'p>>,
    /// Routing and counts.
    pub arrived: Arrived<'p>,
    /// The backend's own buffer for the experts' output, `[max_rows, hidden]` in the configuration's element
    /// type; `Some` exactly when the plan says `in_place_output`.
    pub output: Option<TensorViewMut<'p>>,
}

/// Tokens and logits that have arrived at monolithic experts, in the backend's buffers.
#[derive(Debug)]
pub struct DispatchedMonolithic<'p> {
    /// Payload in the plan's wire format, `[max_rows, hidden]`.
    pub hidden: TensorView<'p>,
    /// As in [`Dispatched::scale`].
    pub scale: Option<TensorView<'p>>,
    /// `[max_rows, num_experts]` f32.
    pub logits: TensorView<'p>,
    /// Valid rows.
    pub rows: ReceivedRows<'p>,
    /// As in [`Dispatched::output`].
    pub output: Option<TensorViewMut<'p>>,
}

/// Where the experts' output is.
#[derive(Clone, Copy, Debug)]
pub enum ExpertOut<'a> {
    /// In the buffer that [`Dispatched::output`] lent.
    InPlace,
    /// Here, in the shape and element type of that buffer.
    Lent(TensorView<'a>),
    /// Nowhere: this rank failed after its dispatch.
    Failed(Fault),
}

/// Whether `out` can take the outputs of `tokens` tokens: `[tokens, hidden]` f32 or the configuration's element type.
/// A round without tokens writes nothing, so it takes any `out`.
///
/// # Errors
/// What `out` is and what it must be.
pub fn check_output(config: &MoeConfig, tokens: usize, out: &TensorViewMut<'_>) -> Result<(), String> {
    let (dims, dtype, hidden) = (out.dims(), out.dtype(), config.hidden);
    if tokens == 0 || (dims == [tokens, hidden] && (dtype == DType::F32 || dtype == config.in_dtype)) {
        return Ok(());
    }
    Err(format!("output is {dims:?} of {dtype}, needs [{tokens}, {hidden}] of f32 or {}", config.in_dtype))
}

macro_rules! settle {
    () => {
        /// Brings a round whose ticket was dropped to its end, telling the peers that it was abandoned. Every
        /// `prepare_send` starts with it.
        ///
        /// # Errors
        /// `PeerLost`. The failure of the abandoned round itself is not an error here.
        fn settle(&mut self, cx: &mut ExecCx<'_>) -> Result<()> {
            let failed_round = |error: crate::Error| match error.kind {
                ErrorKind::RankFailed { .. } => Ok(()),
                _ => Err(error),
            };
            while let Some(outstanding) = self.ledger().outstanding() {
                let step = match outstanding {
                    Outstanding::PrepareSent(sent) => {
                        self.prepare_recv(cx, sent).map(|(_, dropped)| drop(dropped))
                    }
                    Outstanding::Dispatched(routed) => {
                        self.finalize_send(cx, routed, ExpertOut::Failed(Fault::Abandoned)).map(drop)
                    }
                    Outstanding::FinalizeSent(sent) => {
                        let out = TensorViewMut::from_slice::<f32>(&mut [], DType::F32, &[0, 0]);
                        let out = out.expect("an empty slice holds an empty tensor");
                        self.finalize_recv(cx, sent, out)
                    }
                };
                step.or_else(failed_round)?;
            }
            Ok(())
        }
    };
}

/// What stages 2 and 4 have in common, whether the router runs before them or inside the experts: the combine half,
/// and what a kernel asks of any backend.
pub trait PrepareAndFinalize: Send {
    /// What it was built to do.
    fn caps(&self) -> &PrepareCaps;

    /// Bytes that its buffers occupy; equal to what its provider's `required_bytes` said.
    fn allocated_bytes(&self) -> usize;

    /// The maker of its tickets.
    fn ledger(&mut self) -> &mut TicketLedger;

    /// Starts the combine of the experts' outputs.
    ///
    /// # Errors
    /// `PeerLost` and `Contract`.
    fn finalize_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        routed: Routed,
        out: ExpertOut<'a>,
    ) -> Result<Sent<'a, phase::Finalize>>;

    /// Waits for the outputs of this rank's own tokens and sums them into `out`, `[tokens, hidden]` f32 or the
    /// configuration's element type, where `tokens` is what this rank sent.
    ///
    /// # Errors
    /// `RankFailed` (the round is over), `PeerLost`, `Contract`.
    fn finalize_recv(
        &mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        out: TensorViewMut<'_>,
    ) -> Result<()>;

    /// Combine without overlap: send and receive.
    ///
    /// # Errors
    /// As the two phases.
    fn finalize(
        &mut self,
        cx: &mut ExecCx<'_>,
        routed: Routed,
        expert_out: ExpertOut<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        let sent = self.finalize_send(cx, routed, expert_out)?;
        self.finalize_recv(cx, sent, out)
    }
}

/// Stages 2 and 4 of a modular layer.
///
/// All ranks of a group call each phase in the same order, with zero tokens if they have none. A rank that
/// fails still takes part (see [`PrepareInput::fault`] and [`ExpertOut::Failed`]); the receive that ends the
/// half then returns the same [`ErrorKind::RankFailed`] on every rank and the handle is ready for the next
/// round. Sends fail only when the handle cannot go on.
///
/// A `Dispatched` borrows the handle, so it is read before `finalize_send`:
///
/// ```
/// # use fused_moe_core::*;
/// fn read(p: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, sent: Sent<'_, phase::Prepare>) {
///     let (dispatched, routed) = p.prepare_recv(cx, sent).unwrap();
///     let _ = dispatched.hidden.address();
///     let _ = p.finalize_send(cx, routed, ExpertOut::InPlace);
/// }
/// ```
///
/// and never after it:
///
/// ```compile_fail,E0499
/// # use fused_moe_core::*;
/// fn held(p: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, sent: Sent<'_, phase::Prepare>) {
///     let (dispatched, routed) = p.prepare_recv(cx, sent).unwrap();
///     let _ = p.finalize_send(cx, routed, ExpertOut::InPlace);
///     let _ = dispatched.hidden.address();
/// }
/// ```
///
/// What is lent to a send stays lent until its receive, and may go then:
///
/// ```
/// # use fused_moe_core::*;
/// fn kept(p: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, x: Lease<'_, ()>, topk: TopK<'static>) {
///     let sent = p.prepare_send(cx, PrepareInput { hidden: x.view(), topk, input_scale: None, fault: None }).unwrap();
///     let _ = p.prepare_recv(cx, sent);
///     drop(x);
/// }
/// ```
///
/// but not before:
///
/// ```compile_fail,E0505
/// # use fused_moe_core::*;
/// fn freed(p: &mut dyn PrepareAndFinalizeModular, cx: &mut ExecCx<'_>, x: Lease<'_, ()>, topk: TopK<'static>) {
///     let sent = p.prepare_send(cx, PrepareInput { hidden: x.view(), topk, input_scale: None, fault: None }).unwrap();
///     drop(x);
///     let _ = p.prepare_recv(cx, sent);
/// }
/// ```
pub trait PrepareAndFinalizeModular: PrepareAndFinalize {
    /// Starts the dispatch of this rank's tokens.
    ///
    /// # Errors
    /// `PeerLost` and `Contract`; an invalid input is reported by `prepare_recv`, on all ranks.
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>>;

    /// Waits for the tokens of this rank's experts.
    ///
    /// # Errors
    /// `RankFailed` (the round is over), `PeerLost`, `Contract`.
    fn prepare_recv<'p>(
        &'p mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)>;

    settle!();

    /// Dispatch without overlap: send and receive.
    ///
    /// # Errors
    /// As the two phases.
    fn prepare<'p>(
        &'p mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'_>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        let sent = self.prepare_send(cx, input)?;
        self.prepare_recv(cx, sent)
    }
}

/// Stages 2 and 4 of a monolithic layer: hidden states and logits go out, partial sums come back.
///
/// The rules are those of [`PrepareAndFinalizeModular`].
pub trait PrepareAndFinalizeMonolithic: PrepareAndFinalize {
    /// Starts the dispatch of this rank's tokens.
    ///
    /// # Errors
    /// As [`PrepareAndFinalizeModular::prepare_send`].
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: MonolithicInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>>;

    /// Waits for the tokens that this rank's experts route.
    ///
    /// # Errors
    /// As [`PrepareAndFinalizeModular::prepare_recv`].
    fn prepare_recv<'p>(
        &'p mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(DispatchedMonolithic<'p>, Routed)>;

    settle!();
}

macro_rules! forward {
    ($name:ident, $input:ident, $dispatched:ident, $($target:tt)+) => {
        impl<T: $name + ?Sized> $name for $($target)+ {
            fn prepare_send<'a>(
                &mut self,
                cx: &mut ExecCx<'_>,
                input: $input<'a>,
            ) -> Result<Sent<'a, phase::Prepare>> {
                (**self).prepare_send(cx, input)
            }
            fn prepare_recv<'p>(
                &'p mut self,
                cx: &mut ExecCx<'_>,
                sent: Sent<'_, phase::Prepare>,
            ) -> Result<($dispatched<'p>, Routed)> {
                (**self).prepare_recv(cx, sent)
            }
        }
    };
    ($($target:tt)+) => {
        impl<T: PrepareAndFinalize + ?Sized> PrepareAndFinalize for $($target)+ {
            fn caps(&self) -> &PrepareCaps {
                (**self).caps()
            }
            fn allocated_bytes(&self) -> usize {
                (**self).allocated_bytes()
            }
            fn ledger(&mut self) -> &mut TicketLedger {
                (**self).ledger()
            }
            fn finalize_send<'a>(
                &mut self,
                cx: &mut ExecCx<'_>,
                routed: Routed,
                out: ExpertOut<'a>,
            ) -> Result<Sent<'a, phase::Finalize>> {
                (**self).finalize_send(cx, routed, out)
            }
            fn finalize_recv(
                &mut self,
                cx: &mut ExecCx<'_>,
                sent: Sent<'_, phase::Finalize>,
                out: TensorViewMut<'_>,
            ) -> Result<()> {
                (**self).finalize_recv(cx, sent, out)
            }
        }

        forward!(PrepareAndFinalizeModular, PrepareInput, Dispatched, $($target)+);
        forward!(PrepareAndFinalizeMonolithic, MonolithicInput, DispatchedMonolithic, $($target)+);
    };
}

forward!(Box<T>);
forward!(&mut T);
