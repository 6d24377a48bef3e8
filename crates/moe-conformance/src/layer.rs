//! A whole layer: comm and experts out of a registry, over ranks that are threads, against the oracle.

mod on_device;

use ep_transport::Endpoint;
use fused_moe_core::{
    Arena, Call, DType, ExecCx, FusedMoEKernel, Logits, MakeError, Overlap, Plan, ProcessGroup, Registry,
    Router, Selection, Stream, TensorView, TensorViewMut, TopK, TopKMut, Unsupported,
};
use half::bf16;
use router::HostRouter;

use crate::bound::Rounding;
use crate::case::{Case, LayerWeights, RankInput};
use crate::oracle::{InputScales, Layer};
use crate::outcome::{Check, Outcome, Settings, chain, fail, has_ranks, on_ranks, supervised};

/// The round whose outputs are bf16; those of the others are f32.
const IN_BF16: usize = 1;

/// Runs `case` with the backends of `registry` that `selection` allows and compares every output with the oracle.
///
/// Three rounds on one handle: the case, other tokens through a second layer's weights (so that a stale buffer
/// shows), and the first again, which must give the same bits. Outputs are filled with NaN before each round, the
/// caller's tensors must be the same afterwards, overlapped work must run once per half, and the kernel must
/// hold exactly the bytes that the registry announced.
///
/// A pair that does not fit is [`Outcome::Refused`], provided that building it is refused as well.
///
/// ```
/// use fused_moe_core::{QuantScheme, Registry, Selection};
/// use moe_conformance::{Case, Outcome, Seed, Settings, layer, reference};
///
/// let registry =
///     Registry::new().with_comm(reference::ReferenceComm).with_experts(reference::ReferenceExperts);
/// let case = Case::small(QuantScheme::Unquantized, 2, Seed::fresh());
/// assert_eq!(layer::run(&registry, &case, Selection::default(), Settings::default()), Outcome::Pass);
/// ```
pub fn run(registry: &Registry, case: &Case, selection: Selection<'_>, settings: Settings) -> Outcome {
    let (registry, case) = (registry.clone(), case.clone());
    let names = (selection.comm.map(str::to_owned), selection.experts.map(str::to_owned));
    let context = case.to_string();
    let checked = move || {
        let selection = Selection { comm: names.0.as_deref(), experts: names.1.as_deref() };
        check(&registry, &case, selection, settings)
    };
    supervised(settings, checked).within(context)
}

/// As [`run`], on the calling thread.
pub(crate) fn check(registry: &Registry, case: &Case, selection: Selection<'_>, settings: Settings) -> Check {
    has_ranks(case, settings)?;
    let config = case.config();
    let survey = match registry.survey(&config, selection) {
        Ok(survey) => survey,
        Err(error) => return fail(error),
    };
    let Some(plan) = survey.fitting.first() else {
        let reasons: Vec<Unsupported> = survey.refused.into_iter().flat_map(|pair| pair.reasons).collect();
        refused_by_build(registry, case, selection, settings)?;
        return Err(Outcome::Refused(reasons));
    };
    let rounds = [case.inputs(0), case.inputs(1)];
    let weights = case.weights();
    let layers = [weights.clone(), weights.rotated()];
    let outputs = on_ranks(case, settings, |group| {
        Rank { registry, case, selection, settings, rounds: &rounds, layers: &layers, group: &group }
            .run(plan)
    })?;
    if !settings.launcher.is_judge() {
        return Ok(());
    }
    for (round, (inputs, weights)) in rounds.iter().zip(&layers).enumerate() {
        let got: Vec<&[f32]> = outputs.iter().map(|rounds| rounds[round].as_slice()).collect();
        let output = if round == IN_BF16 { DType::Bf16 } else { DType::F32 };
        let rounding = Rounding::of_plan(plan, output);
        agrees(case, (plan, rounding), (inputs, weights), &got)
            .map_err(|e| e.within(format!("round {round}")))?;
    }
    Ok(())
}

/// Checks that nothing can be built for a case that is refused.
pub(crate) fn refused_by_build(
    registry: &Registry,
    case: &Case,
    selection: Selection<'_>,
    settings: Settings,
) -> Check {
    let config = case.config();
    let built = on_ranks(case, settings, |group| match registry.build(&config, selection, &group) {
        Err(MakeError::NoneFits(pairs)) if pairs.iter().all(|p| !p.reasons.is_empty()) => Ok(()),
        Err(error) => fail(format!("refused, but building it fails with: {error}")),
        Ok(_) => fail("refused, but it can be built"),
    });
    built.map(drop)
}

/// Checks the outputs of all ranks against the oracle for `plan`.
fn agrees(
    case: &Case,
    (plan, rounding): (&Plan, Rounding),
    (inputs, weights): (&[RankInput], &LayerWeights),
    got: &[&[f32]],
) -> Check {
    let monolithic = plan.kind() == fused_moe_core::KernelKind::Monolithic;
    let inputs: Vec<RankInput> = match monolithic {
        true => inputs.iter().map(|input| routed(case, input)).collect::<Check<_>>()?,
        false => inputs.to_vec(),
    };
    let tokens: Vec<_> = inputs.iter().map(RankInput::tokens).collect();
    let matrices = weights.matrices();
    let mut verdict = fail("no candidate");
    for &input_scales in InputScales::of_plan(case.quant, plan) {
        let layer = Layer {
            shape: case.shape(),
            quant: case.quant,
            activation: case.activation,
            padding: case.padding,
            router_weight: plan.router_weight(),
            input_scales,
            experts: &matrices,
            placement: &case.placement,
            ranks: &tokens,
        };
        let expected = layer.expected(rounding).or_else(|e| fail(format!("the oracle fails: {e}")))?;
        match expected.check(&got.concat(), case.hidden) {
            Ok(_) => return Ok(()),
            Err(far) => verdict = fail(far),
        }
    }
    verdict
}

/// The input with the experts that the host router chooses by its logits.
pub(crate) fn routed(case: &Case, input: &RankInput) -> Check<RankInput> {
    let mut input = input.clone();
    let routing = case.config().routing.map(HostRouter::new);
    let Some(Ok(router)) = routing else { return fail("the case has no routing") };
    let (tokens, dims) = (input.num_tokens, [input.num_tokens, case.top_k]);
    let mut route = || -> Result<(), Box<dyn std::error::Error>> {
        let logits = TensorView::from_slice(&input.logits, DType::F32, &[tokens, case.num_experts])?;
        let out = TopKMut {
            ids: TensorViewMut::from_slice(&mut input.ids, DType::I32, &dims)?,
            weights: TensorViewMut::from_slice(&mut input.weights, DType::F32, &dims)?,
        };
        let workspace = Arena::new(TensorViewMut::from_slice::<u8>(&mut [], DType::U8, &[0])?);
        router.route(&mut ExecCx { stream: Stream::Host, workspace }, logits, out)?;
        Ok(())
    };
    route().or_else(|e| fail(format!("the host router fails: {e}")))?;
    Ok(input)
}

/// One rank of a run.
struct Rank<'a> {
    registry: &'a Registry,
    case: &'a Case,
    selection: Selection<'a>,
    settings: Settings,
    rounds: &'a [Vec<RankInput>; 2],
    layers: &'a [LayerWeights; 2],
    group: &'a Endpoint,
}

impl Rank<'_> {
    /// Runs all rounds and returns the outputs of the first two.
    fn run(&self, plan: &Plan) -> Check<Vec<Vec<f32>>> {
        let (config, rank) = (self.case.config(), self.group.rank());
        let built = self.registry.build(&config, self.selection, self.group);
        let mut kernel = built.or_else(|e| fail(format!("building fails: {}", chain(&e))))?;
        let announced = self.registry.required_bytes(&config, plan, rank).or_else(fail)?;
        let provider = self.registry.experts(plan.experts()).or_else(fail)?;
        let mut packed = Vec::new();
        for weights in self.layers {
            let all = weights.matrices();
            let local: Vec<_> = config.placement.experts_of(rank).map(|id| all[id.0 as usize]).collect();
            let weights = provider.pack(&config, rank, &local);
            let weights = weights.or_else(|e| fail(format!("packing fails: {}", chain(&e))))?;
            // A rank without experts dispatches by the scale of the layer, too.
            let of_layer = all.iter().flat_map(|e| [e.gate.input_scale, e.up.input_scale]).flatten();
            packed.push(match (weights.input_scale(), of_layer.reduce(f32::max)) {
                (None, Some(scale)) if local.is_empty() => weights.with_input_scale(Some(scale)),
                (mine, wanted) if mine != wanted => {
                    return fail(format!("packed weights have the input scale {mine:?}, not {wanted:?}"));
                }
                _ => weights,
            });
        }
        let mut outputs = Vec::new();
        for (round, which) in [0, 1, 0].into_iter().enumerate() {
            let input = &self.rounds[which][rank.index()];
            let before = input.clone();
            let output = self.round(&mut kernel, &packed[which], input, which == IN_BF16);
            outputs.push(output.map_err(|e| e.within(format!("round {round}")))?);
            if *input != before {
                return fail(format!("round {round} changed the caller's tensors"));
            }
            if kernel.bytes() != announced {
                let held = kernel.bytes();
                return fail(format!("round {round}: holds {held:?}, required_bytes said {announced:?}"));
            }
        }
        if outputs.pop().as_ref().map(|again| bits(again)) != outputs.first().map(|first| bits(first)) {
            return fail("the same round gave other bits the second time");
        }
        Ok(outputs)
    }

    fn round(
        &self,
        kernel: &mut FusedMoEKernel,
        weights: &fused_moe_core::ExpertWeights,
        input: &RankInput,
        in_bf16: bool,
    ) -> Check<Vec<f32>> {
        if let Some(device) = self.settings.device {
            return on_device::round(device, self.case, kernel, weights, (input, in_bf16));
        }
        let Case { hidden, top_k, num_experts, .. } = *self.case;
        let tokens = input.num_tokens;
        let mut wide = vec![f32::NAN; if in_bf16 { 0 } else { tokens * hidden }];
        let mut narrow = vec![bf16::NAN; if in_bf16 { tokens * hidden } else { 0 }];
        let (mut in_dispatch, mut in_combine) = (0, 0);
        let mut call = || -> Result<(), Box<dyn std::error::Error>> {
            let out = match in_bf16 {
                true => TensorViewMut::from_slice(&mut narrow, DType::Bf16, &[tokens, hidden])?,
                false => TensorViewMut::from_slice(&mut wide, DType::F32, &[tokens, hidden])?,
            };
            let states = TensorView::from_slice(&input.hidden, DType::Bf16, &[tokens, hidden])?;
            let mut count_dispatch = |_| {
                in_dispatch += 1;
                Ok(())
            };
            let mut count_combine = |_| {
                in_combine += 1;
                Ok(())
            };
            let overlap = Overlap { dispatch: Some(&mut count_dispatch), combine: Some(&mut count_combine) };
            let stream = Stream::Host;
            match kernel {
                FusedMoEKernel::Modular(kernel) => {
                    let routing = TopK {
                        ids: TensorView::from_slice(&input.ids, DType::I32, &[tokens, top_k])?,
                        weights: TensorView::from_slice(&input.weights, DType::F32, &[tokens, top_k])?,
                    };
                    kernel.apply(Call { stream, weights, hidden: states, routing, overlap, out })?;
                }
                FusedMoEKernel::Monolithic(kernel) => {
                    let logits = TensorView::from_slice(&input.logits, DType::F32, &[tokens, num_experts])?;
                    let routing = Logits(logits);
                    kernel.apply(Call { stream, weights, hidden: states, routing, overlap, out })?;
                }
            }
            Ok(())
        };
        if let Err(error) = call() {
            return fail(chain(&*error));
        }
        if (in_dispatch, in_combine) != (1, 1) {
            return fail(format!("overlapped work ran {in_dispatch} and {in_combine} times, not once each"));
        }
        wide.extend(narrow.iter().map(|x| x.to_f32()));
        Ok(wide)
    }
}

/// The bits of `values`, so that NaN equals NaN and −0 differs from 0.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
