//! Stage 3: the experts, and their weights.

use std::any::Any;

use crate::error::Result;
use crate::exec::ExecCx;
use crate::negotiate::ExpertsCaps;
use crate::prepare_finalize::{Dispatched, DispatchedMonolithic};
use crate::tensor::{TensorView, TensorViewMut};

/// Scales of a weight matrix; `weight ≈ code · scale`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum WeightScale<'a> {
    /// One scale for the matrix.
    Tensor(f32),
    /// `[rows]` f32, one scale per output channel.
    Channel(TensorView<'a>),
    /// `[ceil(rows / 128), ceil(cols / 128)]` f32, one scale per 128x128 block.
    Block128(TensorView<'a>),
    /// `[rows, cols / 32]` E8M0, one power of two per 32 columns (MXFP4).
    Mx32(TensorView<'a>),
    /// Two levels (NVFP4): `weight ≈ code · block · global`.
    Nv16 {
        /// `[rows, cols / 16]` FP8 E4M3 (OCP), one per 16 columns.
        blocks: TensorView<'a>,
        /// For the whole matrix.
        global: f32,
    },
}

/// One weight matrix as a checkpoint stores it: `[rows, cols]`, row = output channel.
#[derive(Clone, Copy, Debug)]
pub struct WeightMatrix<'a> {
    /// The values, or FP8 codes, or FP4 codes in pairs: `[rows, cols / 2]`.
    pub values: TensorView<'a>,
    /// Scales of the codes; `None` for unquantized values.
    pub scale: Option<WeightScale<'a>>,
    /// `[rows]` bf16 or f32, added to the product; exactly where [`crate::MoeConfig::expert_bias`] says so.
    pub bias: Option<TensorView<'a>>,
    /// What the activations that this matrix meets are divided by: the static scale of
    /// [`crate::QuantScheme::Fp8PerTensorStatic`], the global scale of [`crate::QuantScheme::Nvfp4`]. Experts of a
    /// layer share their activations, so a backend takes the largest; whoever loads them gives every rank the
    /// largest of all experts of the layer.
    pub input_scale: Option<f32>,
}

impl<'a> WeightMatrix<'a> {
    /// Values without a scale.
    pub fn unquantized(values: TensorView<'a>) -> Self {
        Self { values, scale: None, bias: None, input_scale: None }
    }

    /// Codes with their scale.
    pub fn quantized(values: TensorView<'a>, scale: WeightScale<'a>) -> Self {
        Self { scale: Some(scale), ..Self::unquantized(values) }
    }
}

/// The three matrices of one expert.
#[derive(Clone, Copy, Debug)]
pub struct ExpertMatrices<'a> {
    /// `[intermediate, hidden]`, into the activation.
    pub gate: WeightMatrix<'a>,
    /// `[intermediate, hidden]`, times the activation.
    pub up: WeightMatrix<'a>,
    /// `[hidden, intermediate]`.
    pub down: WeightMatrix<'a>,
}

/// Weights of one layer on one rank, packed by an experts backend in its own form.
///
/// Packed once at load; shared by every handle that runs the layer.
pub struct ExpertWeights {
    backend: &'static str,
    packed: Box<dyn Any + Send + Sync>,
    bytes: usize,
    input_scale: Option<f32>,
}

impl std::fmt::Debug for ExpertWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExpertWeights").field("backend", &self.backend).field("bytes", &self.bytes).finish()
    }
}

impl ExpertWeights {
    /// Wraps what `backend` packed; `bytes` is the memory it occupies.
    pub fn new<T: Any + Send + Sync>(backend: &'static str, packed: T, bytes: usize) -> Self {
        Self { backend, packed: Box::new(packed), bytes, input_scale: None }
    }

    /// The same with the static scale of what gemm1 reads, by which a dispatch quantises. Backends call it when they
    /// pack; whoever loads the weights of a rank without experts does, since that rank sends tokens, too.
    #[must_use]
    pub fn with_input_scale(mut self, scale: Option<f32>) -> Self {
        self.input_scale = scale;
        self
    }

    /// The static scale of what gemm1 reads, for schemes that have one.
    pub fn input_scale(&self) -> Option<f32> {
        self.input_scale
    }

    /// Name of the backend that packed them.
    pub fn backend(&self) -> &'static str {
        self.backend
    }

    /// Bytes of memory that they occupy.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The packed form, if it is a `T`; another backend's weights are not.
    pub fn packed<T: Any>(&self) -> Option<&T> {
        self.packed.downcast_ref()
    }
}

/// Stage 3 of a modular layer: gemm1, activation, gemm2 on tokens that sit with their experts.
pub trait ExpertsModular: Send + Sync {
    /// What it was built to do.
    fn caps(&self) -> &ExpertsCaps;

    /// Bytes of workspace that [`ExpertsModular::apply`] needs for every batch the configuration allows.
    fn workspace_bytes(&self) -> usize;

    /// Runs the experts of this rank on `input` and writes `out`.
    ///
    /// By the reduction of [`ExpertsCaps::weight_and_reduce`], `out` is `[max_rows, hidden]` (no-op: weighted and
    /// summed over the local experts of each row, zero if there are none), `[max_rows, top_k, hidden]`
    /// (contiguous, unweighted), or `[local_experts, max_rows, hidden]` (naive-batched and batched delegate,
    /// unweighted). Rows that are not valid on input may be left as they are.
    ///
    /// # Errors
    /// `Contract` for weights of another backend or misfit tensors, `Other` with the backend's own error.
    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()>;
}

/// Stages 1 and 3 in one: takes logits, routes, runs the experts of this rank, reduces.
pub trait ExpertsMonolithic: Send + Sync {
    /// What it was built to do.
    fn caps(&self) -> &ExpertsCaps;

    /// Bytes of workspace that [`ExpertsMonolithic::apply`] needs for every batch the configuration allows.
    fn workspace_bytes(&self) -> usize;

    /// Routes every row by its global logits, runs those of its experts that this rank holds, and writes their
    /// weighted sum to `out`, `[max_rows, hidden]`: under expert parallelism a partial sum.
    ///
    /// # Errors
    /// As [`ExpertsModular::apply`].
    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &DispatchedMonolithic<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()>;
}

macro_rules! forward {
    ($name:ident, $dispatched:ident, $($target:tt)+) => {
        impl<T: $name + ?Sized> $name for $($target)+ {
            fn caps(&self) -> &ExpertsCaps {
                (**self).caps()
            }
            fn workspace_bytes(&self) -> usize {
                (**self).workspace_bytes()
            }
            fn apply(
                &self,
                cx: &mut ExecCx<'_>,
                weights: &ExpertWeights,
                input: &$dispatched<'_>,
                out: TensorViewMut<'_>,
            ) -> Result<()> {
                (**self).apply(cx, weights, input, out)
            }
        }
    };
}

forward!(ExpertsModular, Dispatched, Box<T>);
forward!(ExpertsModular, Dispatched, &T);
forward!(ExpertsModular, Dispatched, std::sync::Arc<T>);
forward!(ExpertsMonolithic, DispatchedMonolithic, Box<T>);
forward!(ExpertsMonolithic, DispatchedMonolithic, &T);
forward!(ExpertsMonolithic, DispatchedMonolithic, std::sync::Arc<T>);
