//! A run against the f64 oracle.

use anyhow::{Context, bail};
use fused_moe::{
    Activation, CombineWire, DType, Padding, PartialSums, TensorView, TensorViewMut,
    router::eplb::ReplicaTable, router::shared_expert_gate,
};
use fused_moe::{ExpertMatrices, ExpertPlacement, NO_EXPERT, Plan, QuantScheme, Rank, RouterWeight};
use moe_checkpoint::{ExpertTensors, MoeLayer};
use moe_conformance::oracle::{InputScales, Layer, RankTokens, Shape};
use moe_conformance::{Expected, Rounding};
use rayon::prelude::*;
use serde::Serialize;

use crate::args::Quant;
use crate::ep::{LayerRun, share};
use crate::eplb::Replicas;
use crate::layer;
use crate::tokens::HiddenStates;
use crate::weights::LoadedExpert;

/// How far a run is from the oracle, which quantises where the layer does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Verdict {
    /// Relative L2 error of the routed experts' output.
    pub routed: f64,
    /// Relative L2 error of the whole output.
    pub output: f64,
    /// The largest relative L2 error of the whole output that can pass.
    pub tolerance: f64,
    /// Of all elements of both, the largest error in units of the element's own bound; 1 at most if the run is right.
    pub bound_ratio: f64,
    /// Whether every element is within its bound.
    pub passes: bool,
}

/// What a run was of.
#[derive(Debug)]
pub struct Subject<'l> {
    /// The layer in the checkpoint.
    pub stored: &'l MoeLayer<'l>,
    /// The routed experts and their replicas.
    pub replicas: &'l Replicas,
    /// The pair that ran.
    pub plan: &'l Plan,
    /// What was asked for, which decides the scheme of the shared experts too.
    pub quant: Quant,
}

/// Computes the layer with the oracle, for the routing that the run chose, and compares.
pub fn verify(subject: &Subject<'_>, hidden: &HiddenStates, run: &LayerRun) -> anyhow::Result<Verdict> {
    let Subject { stored, replicas: Replicas { table, config }, plan, quant } = *subject;
    let all = (0..table.num_logical()).map(|e| stored.expert(e)).collect::<Result<Vec<_>, _>>()?;
    let experts = loaded(&all, config.quant)?;
    let parts: Vec<_> =
        (0..config.ep_size() as u32).map(|r| share(hidden.tokens, config.ep_size(), Rank(r))).collect();
    let tokens: Vec<RankTokens<'_>> = parts
        .iter()
        .map(|part| RankTokens {
            hidden: &hidden.values[part.start * config.hidden..part.end * config.hidden],
            ids: &run.slots[part.start * config.top_k..part.end * config.top_k],
            weights: &run.output.topk_weights[part.start * config.top_k..part.end * config.top_k],
        })
        .collect();
    let logical = views(&experts)?;
    // A slot that holds what the router chose is as good as any other, but it says whose partial sum a token is in.
    check_slots(table, &run.output.topk_ids, &run.slots)?;
    let views: Vec<_> = table.physical_to_logical().iter().map(|&expert| logical[expert as usize]).collect();
    // Where experts quantise per tensor, which rows share a scale depends on what the backend sent them.
    let rounding = Rounding::of_plan(plan, DType::F32);
    let mut best: Option<(f64, Expected)> = None;
    for &input_scales in InputScales::of_plan(config.quant, plan) {
        let routed = Layer {
            shape: Shape { hidden: config.hidden, intermediate: config.intermediate, top_k: config.top_k },
            quant: config.quant,
            activation: config.activation,
            padding: config.padding,
            router_weight: RouterWeight::OnOutput,
            input_scales,
            experts: &views,
            placement: &config.placement,
            ranks: &tokens,
        }
        .expected(rounding)?;
        let ratio = routed.compare(&run.output.routed).bound_ratio;
        if best.as_ref().is_none_or(|(least, _)| ratio < *least) {
            best = Some((ratio, routed));
        }
    }
    let (_, mut expected) = best.context("the oracle has no answer for this plan")?;

    let routed = expected.compare(&run.output.routed);
    if let Some(shared) = stored.shared_experts()? {
        let mlp = [shared.mlp];
        let scheme = layer::shared_scheme(quant, mlp[0].gate.scheme());
        let expert = loaded(&mlp, scheme)?;
        let views = self::views(&expert)?;
        let ids = vec![0; hidden.tokens];
        let mut weights = vec![1.0; hidden.tokens];
        if let Some(gate) = &shared.sigmoid_gate {
            let x = TensorView::from_slice(&hidden.values, DType::Bf16, &[hidden.tokens, config.hidden])?;
            let out = TensorViewMut::from_slice(&mut weights, DType::F32, &[hidden.tokens, 1])?;
            shared_expert_gate(x, gate.view(), out)?;
        }
        // Every rank runs the shared experts on its own tokens, so per-tensor scales are per rank here too: one
        // layer per rank.
        let intermediate = mlp[0].gate.rows();
        let mut of_all = Expected::default();
        for part in &parts {
            let mine = Layer {
                shape: Shape { hidden: config.hidden, intermediate, top_k: 1 },
                quant: scheme,
                activation: Activation::Silu,
                padding: Padding::default(),
                router_weight: RouterWeight::OnOutput,
                input_scales: InputScales::OfSource,
                experts: &views,
                placement: &ExpertPlacement::linear(1, 1)?,
                ranks: &[RankTokens {
                    hidden: &hidden.values[part.start * config.hidden..part.end * config.hidden],
                    ids: &ids[part.clone()],
                    weights: &weights[part.clone()],
                }],
            }
            .expected(Rounding {
                partial_sums: PartialSums::None,
                combine_wire: CombineWire::InDtype,
                routes: false,
                ..rounding
            })?;
            of_all.append(mine);
        }
        expected.add(&of_all);
    }
    let output = expected.compare(&run.output.output);
    Ok(Verdict {
        routed: routed.relative_l2,
        output: output.relative_l2,
        tolerance: output.tolerance,
        bound_ratio: routed.bound_ratio.max(output.bound_ratio),
        passes: routed.passes() && output.passes(),
    })
}

/// Fails if a token went to a slot that does not hold the expert that the router chose for it.
fn check_slots(table: &ReplicaTable, chosen: &[i32], slots: &[i32]) -> anyhow::Result<()> {
    let held = |slot: i32| usize::try_from(slot).ok().and_then(|slot| table.physical_to_logical().get(slot));
    let wrong = chosen.iter().zip(slots).position(|(&id, &slot)| match held(slot) {
        Some(&expert) => i64::from(expert) != i64::from(id),
        None => id != NO_EXPERT || slot != NO_EXPERT,
    });
    match wrong {
        None => Ok(()),
        Some(at) => bail!("position {at} of the top-k ids is {}, but went to slot {}", chosen[at], slots[at]),
    }
}

fn loaded<'c>(stored: &'c [ExpertTensors<'_>], scheme: QuantScheme) -> anyhow::Result<Vec<LoadedExpert<'c>>> {
    stored.par_iter().map(|tensors| LoadedExpert::new(tensors, scheme)).collect()
}

fn views<'v>(experts: &'v [LoadedExpert<'_>]) -> anyhow::Result<Vec<ExpertMatrices<'v>>> {
    Ok(experts.iter().map(LoadedExpert::view).collect::<Result<_, _>>()?)
}
