//! The monolithic form: logits in, reduced rows out.

use fused_moe_core::{
    DType, DispatchedMonolithic, Error, ExecCx, ExpertWeights, ExpertsCaps, ExpertsMonolithic, Layout,
    MoeConfig, Plan, Rank, Result, Router, Stage, TensorView, TensorViewMut, TopK, TopKMut,
};
use grouped_gemm::Executor;
use grouped_gemm::experts::{Pitched, Received};
use router::HostRouter;

use crate::compute::{Compute, Form};
use crate::{NAME, TrtllmError};

/// Experts of one rank that route by themselves.
#[derive(Debug)]
pub(crate) struct MonolithicKernel {
    caps: ExpertsCaps,
    router: HostRouter,
    compute: Compute,
}

impl MonolithicKernel {
    pub(crate) fn new(
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
        executor: Executor,
    ) -> std::result::Result<Self, TrtllmError> {
        let supported = Form::Monolithic.supported(config)?;
        let caps = Form::Monolithic.caps(config);
        let routing = config.routing.clone().ok_or(TrtllmError::NoRouting)?;
        let router = HostRouter::new(routing)?;
        let compute = Compute::new(config, (plan, &caps), rank, (Form::Monolithic, supported), executor)?;
        Ok(Self { caps, router, compute })
    }
}

impl MonolithicKernel {
    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &DispatchedMonolithic<'_>,
        out: TensorViewMut<'_>,
    ) -> std::result::Result<(), Failure> {
        let received = Received::new(input.hidden, input.scale, input.rows, self.compute.sizes().rows);
        let received = received.map_err(TrtllmError::from)?;
        let mut workspace = cx.workspace.reborrow();
        let pieces = self.compute.sizes().carve(&mut workspace).map_err(TrtllmError::from)?;
        let rows = received.rows;
        let slots = rows * self.router.config().top_k;
        let chosen = Chosen { ids: &mut pieces.ids[..slots], weights: &mut pieces.weights[..slots] };
        let topk = self.route(&mut ExecCx { stream: cx.stream, workspace }, (input.logits, rows), chosen)?;
        Ok(self.compute.run(weights, (received, topk), pieces.work, out)?)
    }

    /// Chooses the experts of the first `rows` rows of `logits`.
    fn route<'a>(
        &self,
        cx: &mut ExecCx<'_>,
        (logits, rows): (TensorView<'_>, usize),
        chosen: Chosen<'a>,
    ) -> std::result::Result<TopK<'a>, Failure> {
        let config = self.router.config();
        let (num_experts, dims) = (config.num_experts, [rows, config.top_k]);
        let logits = Pitched::<f32>::new("the received logits", logits, [rows, num_experts]);
        let logits = logits.map_err(TrtllmError::from)?;
        let layout = Layout::contiguous(&[rows, num_experts]).strided(&[logits.pitch, 1], 0);
        let logits = TensorView::from_slice_with(logits.values, DType::F32, layout);
        let out = TopKMut {
            ids: TensorViewMut::from_slice(chosen.ids, DType::I32, &dims).map_err(TrtllmError::from)?,
            weights: TensorViewMut::from_slice(chosen.weights, DType::F32, &dims)
                .map_err(TrtllmError::from)?,
        };
        self.router.route(cx, logits.map_err(TrtllmError::from)?, out)?;
        Ok(TopK {
            ids: TensorView::from_slice(chosen.ids, DType::I32, &dims).map_err(TrtllmError::from)?,
            weights: TensorView::from_slice(chosen.weights, DType::F32, &dims).map_err(TrtllmError::from)?,
        })
    }
}

/// Where the router writes.
struct Chosen<'a> {
    ids: &'a mut [i32],
    weights: &'a mut [f32],
}

/// The error of a call: this backend's, or the router's, which says what is wrong with the logits.
struct Failure(Error);

impl From<TrtllmError> for Failure {
    fn from(error: TrtllmError) -> Self {
        Self(Error::contract(Stage::Experts, NAME, error))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl ExpertsMonolithic for MonolithicKernel {
    fn caps(&self) -> &ExpertsCaps {
        &self.caps
    }

    fn workspace_bytes(&self) -> usize {
        self.compute.sizes().bytes()
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &DispatchedMonolithic<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.run(cx, weights, input, out).map_err(|Failure(error)| error)
    }
}
