//! The two kinds of layer behind one private face, so that a round is written once.

use crate::error::Result;
use crate::exec::ExecCx;
use crate::experts::{ExpertWeights, ExpertsModular, ExpertsMonolithic};
use crate::fault::Fault;
use crate::prepare_finalize::{
    Arrived, Dispatched, DispatchedMonolithic, ExpertOut, MonolithicInput, PrepareAndFinalizeModular,
    PrepareAndFinalizeMonolithic, PrepareInput,
};
use crate::router::TopK;
use crate::tensor::{TensorView, TensorViewMut};
use crate::ticket::{Routed, Sent, phase};

/// Router outside, any comm, any modular experts.
#[derive(Debug)]
pub enum Modular {}

/// Router inside the experts.
#[derive(Debug)]
pub enum Monolithic {}

/// `[tokens, num_experts]` f32 router logits.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a>(pub TensorView<'a>);

/// What [`crate::ComposedKernel`] needs to know of its kind. Implemented by [`Modular`] and [`Monolithic`] alone.
pub trait Kind {
    /// The prepare/finalize trait object.
    type Comm: ?Sized;
    /// The experts trait object.
    type Experts: ?Sized;
    /// What a call brings beside the hidden states.
    type Routing<'a>: Copy;
    /// What arrives at the experts.
    type Dispatched<'p>: Batch<'p>;

    /// Bytes of the comm's buffers.
    fn comm_bytes(comm: &Self::Comm) -> usize;
    /// Bytes of the experts' workspace.
    fn workspace_bytes(experts: &Self::Experts) -> usize;
    /// First phase.
    ///
    /// # Errors
    /// As the stage.
    fn prepare_send<'a>(
        comm: &mut Self::Comm,
        cx: &mut ExecCx<'_>,
        input: Input<'a, Self::Routing<'a>>,
    ) -> Result<Sent<'a, phase::Prepare>>;
    /// Second phase.
    ///
    /// # Errors
    /// As the stage.
    fn prepare_recv<'p>(
        comm: &'p mut Self::Comm,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Self::Dispatched<'p>, Routed)>;
    /// Stage 3.
    ///
    /// # Errors
    /// As the stage.
    fn run_experts(
        experts: &Self::Experts,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Self::Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()>;
    /// Third phase.
    ///
    /// # Errors
    /// As the stage.
    fn finalize_send<'a>(
        comm: &mut Self::Comm,
        cx: &mut ExecCx<'_>,
        routed: Routed,
        out: ExpertOut<'a>,
    ) -> Result<Sent<'a, phase::Finalize>>;
    /// Fourth phase.
    ///
    /// # Errors
    /// As the stage.
    fn finalize_recv(
        comm: &mut Self::Comm,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        out: TensorViewMut<'_>,
    ) -> Result<()>;
}

/// What a round starts with, of either kind.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a, R> {
    /// `[tokens, hidden]`.
    pub hidden: TensorView<'a>,
    /// Top-k or logits.
    pub routing: R,
    /// The layer's static scale.
    pub input_scale: Option<f32>,
    /// A failure of this rank before the round.
    pub fault: Option<Fault>,
}

/// What the composition asks of a dispatched batch.
pub trait Batch<'p> {
    /// Takes the backend's own output buffer out.
    fn take_output(&mut self) -> Option<TensorViewMut<'p>>;
    /// Top-k and number of the received rows, where a reduction outside the experts may need them.
    fn received(&self) -> Option<(TopK<'p>, usize)>;
}

impl<'p> Batch<'p> for Dispatched<'p> {
    fn take_output(&mut self) -> Option<TensorViewMut<'p>> {
        self.output.take()
    }

    fn received(&self) -> Option<(TopK<'p>, usize)> {
        match self.arrived {
            Arrived::Standard { topk, rows } => Some((topk, rows.on_host().ok()?)),
            Arrived::Batched { .. } => None,
        }
    }
}

impl<'p> Batch<'p> for DispatchedMonolithic<'p> {
    fn take_output(&mut self) -> Option<TensorViewMut<'p>> {
        self.output.take()
    }

    fn received(&self) -> Option<(TopK<'p>, usize)> {
        None
    }
}

macro_rules! kind {
    ($kind:ident: $comm:ident, $experts:ident, $routing:ident, $dispatched:ident, $input:expr) => {
        impl Kind for $kind {
            type Comm = dyn $comm;
            type Experts = dyn $experts;
            type Routing<'a> = $routing<'a>;
            type Dispatched<'p> = $dispatched<'p>;

            fn comm_bytes(comm: &Self::Comm) -> usize {
                comm.allocated_bytes()
            }
            fn workspace_bytes(experts: &Self::Experts) -> usize {
                experts.workspace_bytes()
            }
            fn prepare_send<'a>(
                comm: &mut Self::Comm,
                cx: &mut ExecCx<'_>,
                input: Input<'a, Self::Routing<'a>>,
            ) -> Result<Sent<'a, phase::Prepare>> {
                comm.prepare_send(cx, $input(input))
            }
            fn prepare_recv<'p>(
                comm: &'p mut Self::Comm,
                cx: &mut ExecCx<'_>,
                sent: Sent<'_, phase::Prepare>,
            ) -> Result<(Self::Dispatched<'p>, Routed)> {
                comm.prepare_recv(cx, sent)
            }
            fn run_experts(
                experts: &Self::Experts,
                cx: &mut ExecCx<'_>,
                weights: &ExpertWeights,
                input: &Self::Dispatched<'_>,
                out: TensorViewMut<'_>,
            ) -> Result<()> {
                experts.apply(cx, weights, input, out)
            }
            fn finalize_send<'a>(
                comm: &mut Self::Comm,
                cx: &mut ExecCx<'_>,
                routed: Routed,
                out: ExpertOut<'a>,
            ) -> Result<Sent<'a, phase::Finalize>> {
                comm.finalize_send(cx, routed, out)
            }
            fn finalize_recv(
                comm: &mut Self::Comm,
                cx: &mut ExecCx<'_>,
                sent: Sent<'_, phase::Finalize>,
                out: TensorViewMut<'_>,
            ) -> Result<()> {
                comm.finalize_recv(cx, sent, out)
            }
        }
    };
}

fn modular<'a>(input: Input<'a, TopK<'a>>) -> PrepareInput<'a> {
    PrepareInput {
        hidden: input.hidden,
        topk: input.routing,
        input_scale: input.input_scale,
        fault: input.fault,
    }
}

fn monolithic<'a>(input: Input<'a, Logits<'a>>) -> MonolithicInput<'a> {
    MonolithicInput {
        hidden: input.hidden,
        logits: input.routing.0,
        input_scale: input.input_scale,
        fault: input.fault,
    }
}

kind!(Modular: PrepareAndFinalizeModular, ExpertsModular, TopK, Dispatched, modular);
kind!(Monolithic: PrepareAndFinalizeMonolithic, ExpertsMonolithic, Logits, DispatchedMonolithic, monolithic);
