//! Monolithic experts: route with the host router, run the experts of this rank, sum.

use fused_moe_core::{
    Arena, Axis, DType, DispatchedMonolithic, Error, ExecCx, ExpertMatrices, ExpertWeights, Experts,
    ExpertsCaps, ExpertsMonolithic, ExpertsProvider, KernelKind, MoeConfig, Plan, Rank, Result, Router,
    Source, Stage, Stream, Support, TensorView, TensorViewMut, TopKMut, Unsupported,
};
use router::HostRouter;

use super::compute::{Compute, Pair};
use super::experts::{LocalTable, local_table, refusals, wires};
use super::weights::{Format, PackedExperts};

const NAME: &str = "reference_monolithic";

/// Makes monolithic host experts, named `reference_monolithic`: every routing method of crate `router`, every
/// scheme, quantised or bf16 rows.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonolithicExperts;

impl ExpertsProvider for MonolithicExperts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, config: &MoeConfig) -> Support<ExpertsCaps> {
        let mut caps = ExpertsCaps::host(NAME, wires(config));
        caps.kind = KernelKind::Monolithic;
        let mut why = refusals(config);
        match config.routing.clone().map(HostRouter::new) {
            Some(Ok(_)) => {}
            Some(Err(e)) => why.push(Unsupported::new(Axis::Routing, e.to_string(), "the host router")),
            None => why.push(Unsupported::new(Axis::Routing, "routing outside of the experts", "inside")),
        }
        Support::unless(why, caps)
    }

    fn workspace_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        Compute::new(config, plan.max_rows(), plan.max_rows() * config.top_k).workspace_bytes()
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, rank: Rank) -> Result<Experts> {
        let contract = |why: Source| Error::contract(Stage::Router, NAME, why);
        let routing = config.routing.clone().ok_or_else(|| contract("no routing configured".into()))?;
        let mut caps = ExpertsCaps::host(NAME, vec![plan.wire()]);
        caps.kind = KernelKind::Monolithic;
        Ok(Experts::Monolithic(Box::new(MonolithicKernel {
            caps,
            router: HostRouter::new(routing).map_err(|e| contract(e.into()))?,
            compute: Compute::new(config, plan.max_rows(), plan.max_rows() * config.top_k),
            table: local_table(config, rank),
        })))
    }

    fn pack(&self, config: &MoeConfig, rank: Rank, experts: &[ExpertMatrices<'_>]) -> Result<ExpertWeights> {
        PackedExperts::pack(NAME, config, rank, experts, Format::Stored)
    }
}

struct MonolithicKernel {
    caps: ExpertsCaps,
    router: HostRouter,
    compute: Compute,
    table: LocalTable,
}

impl MonolithicKernel {
    fn run(
        &self,
        cx: &mut ExecCx<'_>,
        packed: &PackedExperts,
        input: &DispatchedMonolithic<'_>,
        out: &mut TensorViewMut<'_>,
    ) -> Result<(), Source> {
        let count = input.rows.on_host()?;
        let (ids, weights) = route(&self.router, input.logits, count)?;
        let top_k = self.router.config().top_k;
        let valid: Vec<usize> = (0..count).collect();
        let mut arena = cx.workspace.reborrow();
        let scales = match input.scale {
            Some(view) => Some(view.as_slice::<f32>()?),
            None => None,
        };
        let x = self.compute.rows((input.hidden, scales, packed.input_scales[0]), &valid, &mut arena)?;
        let slots = ids.iter().zip(&weights).enumerate();
        let local = slots.filter_map(|(position, (&id, &weight))| {
            let expert = usize::try_from(id).ok().and_then(|id| *self.table.get(id)?)?;
            Some((Pair { row: position / top_k, expert, early: 1.0 }, weight))
        });
        let (pairs, late): (Vec<Pair>, Vec<f32>) = local.unzip();
        let outputs = self.compute.run(packed, x, &pairs, &mut arena)?;
        self.compute.write_sums((outputs, &pairs, &late), count, out)?;
        Ok(())
    }
}

/// Ids and weights of the first `count` rows of `logits`, `[count, top_k]` each.
fn route(router: &HostRouter, logits: TensorView<'_>, count: usize) -> Result<(Vec<i32>, Vec<f32>), Source> {
    let (top_k, experts) = (router.config().top_k, router.config().num_experts);
    let mut rows = Vec::with_capacity(count * experts);
    for row in 0..count {
        rows.extend_from_slice(logits.row::<f32>(row)?);
    }
    let (mut ids, mut weights) = (vec![0; count * top_k], vec![0.0; count * top_k]);
    let out = TopKMut {
        ids: TensorViewMut::from_slice(&mut ids, DType::I32, &[count, top_k])?,
        weights: TensorViewMut::from_slice(&mut weights, DType::F32, &[count, top_k])?,
    };
    let workspace = Arena::new(TensorViewMut::from_slice::<u8>(&mut [], DType::U8, &[0])?);
    let mut cx = ExecCx { stream: Stream::Host, workspace };
    router.route(&mut cx, TensorView::from_slice(&rows, DType::F32, &[count, experts])?, out)?;
    Ok((ids, weights))
}

impl ExpertsMonolithic for MonolithicKernel {
    fn caps(&self) -> &ExpertsCaps {
        &self.caps
    }

    fn workspace_bytes(&self) -> usize {
        self.compute.workspace_bytes()
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &DispatchedMonolithic<'_>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let packed = PackedExperts::of(weights, NAME)?;
        self.run(cx, packed, input, &mut out).map_err(|why| Error::contract(Stage::Experts, NAME, why))
    }
}
