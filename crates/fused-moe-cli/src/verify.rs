//! A run against the f64 oracle.

use anyhow::{Context, bail};
use fused_moe::{
    Activation, DType, Padding, TensorView, TensorViewMut, router::eplb::ReplicaTable,
    router::shared_expert_gate,
};
use fused_moe::{ExpertMatrices, ExpertPlacement, NO_EXPERT, Plan, QuantScheme, Rank, RouterWeight};
use moe_checkpoint::{ExpertTensors, MoeLayer};
use moe_conformance::oracle::{InputScales, Layer, RankTokens, Shape};
use moe_conformance::{compare, relative_l2, tolerance};
use rayon::prelude::*;
use serde::Serialize;

use crate::args::Quant;
use crate::ep::{LayerRun, share};
use crate::eplb::Replicas;
use crate::layer;
use crate::tokens::HiddenStates;
use crate::weights::LoadedExpert;

/// Relative L2 errors against the oracle, which quantises where the layer does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Verdict {
    /// Of the routed experts' output.
    pub routed: f64,
    /// Of the whole output.
    pub output: f64,
    /// The largest error that passes; see [`moe_conformance::compare`] for a single row that is further off.
    pub tolerance: f64,
    /// Whether both are within it.
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
    let mut best: Option<(f64, Vec<f64>)> = None;
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
        .run()?
        .concat();
        let error = relative_l2(&run.output.routed, &routed);
        if best.as_ref().is_none_or(|(least, _)| error < *least) {
            best = Some((error, routed));
        }
    }
    let (routed_error, routed) = best.context("the oracle has no answer for this plan")?;

    let mut output = routed.clone();
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
        let mut at = 0;
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
            .run()?
            .concat();
            output[at..at + mine.len()].iter_mut().zip(&mine).for_each(|(sum, shared)| *sum += shared);
            at += mine.len();
        }
    }
    let tolerance = tolerance(config.quant);
    let agrees = |got: &[f32], want: &[f64]| compare(got, want, config.hidden, config.quant).is_ok();
    Ok(Verdict {
        routed: routed_error,
        output: relative_l2(&run.output.output, &output),
        tolerance,
        passes: agrees(&run.output.routed, &routed) && agrees(&run.output.output, &output),
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
