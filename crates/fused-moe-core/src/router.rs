//! Stage 1: router logits to the top-k experts of every token.

use crate::error::Result;
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

/// Stage 1 of the pipeline.
pub trait Router: Send + Sync {
    /// Name of the backend.
    fn name(&self) -> &'static str;

    /// The method and its parameters.
    fn config(&self) -> &RoutingConfig;

    /// Chooses the experts of every row of `logits`, `[tokens, num_experts]` f32, best first, and writes their
    /// ids and weights to `out`. Ties go to the lower id.
    ///
    /// # Errors
    /// [`crate::ErrorKind::BadInput`] with [`crate::Fault::NonFiniteLogit`] for a NaN logit (−inf is
    /// allowed), [`crate::ErrorKind::Contract`] for a misfit tensor.
    fn route(&self, cx: &mut ExecCx<'_>, logits: TensorView<'_>, out: TopKMut<'_>) -> Result<()>;
}
