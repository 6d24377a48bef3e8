//! The routed form: ids and weights arrive with the rows.

use fused_moe_core::{
    Dispatched, Error, ExecCx, ExpertWeights, ExpertsCaps, ExpertsModular, MoeConfig, Plan, Rank, Result,
    Stage, TensorViewMut,
};
use grouped_gemm::Executor;
use grouped_gemm::experts::Received;

use crate::compute::{Compute, Form};
use crate::{NAME_ROUTED, TrtllmError};

/// Experts of one rank that are told which of them a row goes to.
#[derive(Debug)]
pub(crate) struct RoutedKernel {
    caps: ExpertsCaps,
    compute: Compute,
}

impl RoutedKernel {
    pub(crate) fn new(
        config: &MoeConfig,
        plan: &Plan,
        rank: Rank,
        executor: Executor,
    ) -> std::result::Result<Self, TrtllmError> {
        let supported = Form::Routed.supported(config)?;
        let caps = Form::Routed.caps(config);
        let compute = Compute::new(config, (plan, &caps), rank, (Form::Routed, supported), executor)?;
        Ok(Self { caps, compute })
    }

    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> std::result::Result<(), TrtllmError> {
        let received = Received::standard(input, self.compute.sizes().rows)?;
        let pieces = self.compute.sizes().carve(&mut cx.workspace.reborrow())?;
        self.compute.run(weights, received, pieces.work, out)
    }
}

impl ExpertsModular for RoutedKernel {
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
        input: &Dispatched<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        let done = self.run(cx, weights, input, out);
        done.map_err(|error| Error::contract(Stage::Experts, NAME_ROUTED, error))
    }
}
