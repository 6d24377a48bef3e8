//! Stage 1: router logits to the top-k experts of every token.

use crate::error::{Error, Result, Stage};
use crate::exec::ExecCx;
use crate::routing::RoutingConfig;
use crate::tensor::{TensorView, TensorViewMut};

/// The chosen experts of every token.
#[derive(Clone, Copy, Debug)]
pub struct TopK<'a> {
    /// `[tokens, top_k]` i32 global expert ids, or [`crate::NO_EXPERT`].
    pub ids: TensorView<'a>,
    /// `[tokens, top_k]` f32 routing weights.
    pub weights: TensorView<'a>,
}

/// Where a router writes the chosen experts.
#[derive(Debug)]
pub struct TopKMut<'a> {
    /// `[tokens, top_k]` i32.
    pub ids: TensorViewMut<'a>,
    /// `[tokens, top_k]` f32.
    pub weights: TensorViewMut<'a>,
}

/// What a router reads.
#[derive(Clone, Copy, Debug)]
pub struct RouterInput<'a> {
    /// `[tokens, num_experts]` f32.
    pub logits: TensorView<'a>,
    /// `[tokens]` i32 ids of the tokens in the vocabulary, for routers that look experts up by them; others
    /// do not read it.
    pub token_ids: Option<TensorView<'a>>,
}

/// Where a router writes everything it has to say.
#[derive(Debug)]
pub struct RouterOutput<'a> {
    /// The chosen experts, [`Router::slots`] of them per token.
    pub topk: TopKMut<'a>,
    /// `[tokens]` f32: what the token itself is multiplied by and added to the layer's output, for routers
    /// with zero-experts.
    pub identity: Option<TensorViewMut<'a>>,
}

/// Stage 1 of the pipeline.
pub trait Router: Send + Sync {
    /// Name of the backend.
    fn name(&self) -> &'static str;

    /// The method and its parameters.
    fn config(&self) -> &RoutingConfig;

    /// Slots of a row of the output: `top_k`, and more where shared experts are appended as slots.
    fn slots(&self) -> usize {
        self.config().top_k
    }

    /// Chooses the experts of every row of `logits`, `[tokens, num_experts]` f32, best first, and writes
    /// their ids and weights to `out`, [`Router::slots`] wide. Ties go to the lower id.
    ///
    /// # Errors
    /// [`crate::ErrorKind::BadInput`] with [`crate::Fault::NonFiniteLogit`] for a NaN logit (−inf is
    /// allowed), [`crate::ErrorKind::Contract`] for a misfit tensor and for a router that needs
    /// [`Router::route_all`].
    fn route(&self, cx: &mut ExecCx<'_>, logits: TensorView<'_>, out: TopKMut<'_>) -> Result<()>;

    /// [`Router::route`] with the token ids that a hash table needs and the identity weights of zero-experts.
    ///
    /// Provided for routers that have neither.
    ///
    /// # Errors
    /// As [`Router::route`]; [`crate::ErrorKind::Contract`] for identity weights asked of a router without
    /// zero-experts, or missing for one with them, and for token ids missing for a hash table.
    fn route_all(&self, cx: &mut ExecCx<'_>, input: RouterInput<'_>, out: RouterOutput<'_>) -> Result<()> {
        if out.identity.is_some() {
            let why = "identity weights are asked of a router without zero-experts";
            return Err(Error::contract(Stage::Router, self.name(), why));
        }
        self.route(cx, input.logits, out.topk)
    }
}
