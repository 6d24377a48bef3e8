//! One layer of a checkpoint, and what a run makes of it.

use anyhow::{Context, anyhow};
use fused_moe::{
    BackendOptions, CombineWire, DType, DeviceKind, ExpertMatrices, ExpertPlacement, ExpertWeights,
    Fp8Format, KernelKind, MoeConfig, Plan, QuantScheme, Rank, Registry, RoutingConfig, RoutingMethod,
    Selection, Survey,
};
use grouped_gemm::Executor;
use moe_checkpoint::{Checkpoint, ExpertTensors, MoeLayer};
use rayon::prelude::*;

use crate::args::{CombineQuant, LayerArgs, OnDevice, Quant};
use crate::eplb::Replicas;
use crate::exit::{Failure, OrFailure, refused};
use crate::weights::LoadedExpert;

/// Ranks are threads here; many more of them than this run out of memory for their stacks.
const MAX_RANKS: usize = 1024;

/// The scheme that `quant` means for weights stored as `stored`.
pub fn scheme(quant: Quant, stored: QuantScheme) -> QuantScheme {
    match quant {
        Quant::Auto => stored,
        Quant::None => QuantScheme::Unquantized,
        Quant::Fp8PerTensor => QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
        Quant::Fp8Ptpc => QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn),
        Quant::Fp8Block => QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
        Quant::Fp8PerTensorStatic => QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn),
        Quant::Mxfp4 => QuantScheme::Mxfp4,
        Quant::Nvfp4 => QuantScheme::Nvfp4,
    }
}

/// The same for the shared experts, which a calibration may have left as they were.
pub fn shared_scheme(quant: Quant, stored: QuantScheme) -> QuantScheme {
    match quant {
        Quant::Fp8PerTensorStatic | Quant::Mxfp4 | Quant::Nvfp4 => stored,
        _ => scheme(quant, stored),
    }
}

/// Refuses what no loading can do: only bf16 is quantised here, and not to schemes that need a calibration or a format
/// of their own.
pub fn check_conversion(stored: QuantScheme, wanted: QuantScheme) -> Result<(), Failure> {
    let quantises =
        matches!(wanted, QuantScheme::Fp8PerTensor(_) | QuantScheme::Fp8Ptpc(_) | QuantScheme::Fp8Block(_));
    if wanted == stored
        || wanted == QuantScheme::Unquantized
        || stored == QuantScheme::Unquantized && quantises
    {
        return Ok(());
    }
    let why = if stored == QuantScheme::Unquantized { ", only run as a checkpoint stores it" } else { "" };
    refused(format!("--quant: the experts' weights are {stored}, which cannot be turned into {wanted}{why}"))
}

/// The layer that the arguments name.
pub fn open<'c>(checkpoint: &'c Checkpoint, layer: Option<usize>) -> Result<MoeLayer<'c>, Failure> {
    let first = checkpoint.model().moe_layers().next();
    let index = layer.or(first).ok_or_else(|| anyhow!("the model has no MoE layer")).or_refused()?;
    checkpoint.layer(index).or_refused()
}

/// Configuration of a layer over `args.ep_size` ranks, each bringing at most `max_tokens` tokens.
pub fn config(layer: &MoeLayer<'_>, args: &LayerArgs, max_tokens: usize) -> Result<MoeConfig, Failure> {
    let ranks_per_node = args.gpus_per_node.unwrap_or(args.ep_size);
    if args.ep_size > MAX_RANKS {
        return refused(format!("--ep-size {}: at most {MAX_RANKS} ranks in one process", args.ep_size));
    }
    if args.ep_size == 0 {
        return refused("--ep-size 0: at least one rank is needed");
    }
    if ranks_per_node == 0 || !args.ep_size.is_multiple_of(ranks_per_node) {
        let (ranks, node) = (args.ep_size, ranks_per_node);
        return refused(format!("--gpus-per-node {node} does not divide --ep-size {ranks}"));
    }
    let model = layer.model();
    let quant = scheme(args.quant, layer.scheme());
    check_conversion(layer.scheme(), quant)?;
    Ok(MoeConfig {
        hidden: model.hidden,
        intermediate: model.intermediate,
        top_k: model.top_k(),
        max_tokens_per_rank: max_tokens.max(1),
        in_dtype: DType::Bf16,
        quant,
        activation: model.activation,
        apply_router_weight_on_input: false,
        expert_bias: model.bias,
        padding: Default::default(),
        redundant_experts: 0,
        max_received_rows: None,
        combine_wire: combine_wire(args.combine_quant),
        routing: Some(layer.routing()),
        placement: ExpertPlacement::linear(model.num_experts(), args.ep_size).or_refused()?,
        ranks_per_node,
        device: args.device.device().kind,
    })
}

/// What the combine carries for `quant`.
pub fn combine_wire(quant: CombineQuant) -> CombineWire {
    match quant {
        CombineQuant::None => CombineWire::InDtype,
        CombineQuant::Fp8Block => CombineWire::Fp8Block(Fp8Format::E4M3Fn),
    }
}

/// All backends, as the arguments set them.
pub fn backends(args: &LayerArgs) -> Registry {
    tuned_backends(args, None)
}

/// The same, multiplying with `executor` if there is one and the layer runs on the host.
pub fn tuned_backends(args: &LayerArgs, executor: Option<Executor>) -> Registry {
    let device = args.device.device();
    if device.kind != DeviceKind::Host {
        return fused_moe::backends_on(device);
    }
    let mut options = BackendOptions::default();
    options.sort_policy = args.sort_policy;
    options.executor = executor;
    fused_moe::backends(options)
}

/// The backends that the arguments name.
pub fn selection(args: &LayerArgs) -> Selection<'_> {
    let usual = if args.device == OnDevice::Host { "mori_high_throughput" } else { "local" };
    let comm = args.all2all.as_deref().unwrap_or(usual);
    Selection { comm: Some(comm), experts: (args.experts != "auto").then_some(&args.experts) }
}

/// The pair that would run, and the verdict on all others.
#[derive(Debug)]
pub struct Choice {
    /// The pair that runs.
    pub plan: Plan,
    /// Every pair of the registry, whether it was asked for or not.
    pub survey: Survey,
}

/// Asks all backends about `config` and picks the pair that the arguments name.
pub fn choose(registry: &Registry, config: &MoeConfig, selection: Selection<'_>) -> Result<Choice, Failure> {
    let asked = registry.survey(config, selection).or_refused()?;
    let survey = registry.survey(config, Selection::default()).or_refused()?;
    match asked.fitting.into_iter().next() {
        Some(plan) => Ok(Choice { plan, survey }),
        None => Err(Failure::Refused(fused_moe::MakeError::NoneFits(asked.refused).into())),
    }
}

/// Loads and packs the experts of every rank's slots; each rank's come from its own part of the checkpoint alone.
///
/// All ranks are loaded before any starts, so that a bad file is a refusal and not a failure of the group.
pub fn load(
    registry: &Registry,
    layer: &MoeLayer<'_>,
    replicas: &Replicas,
    plan: &Plan,
    loaded: impl Fn() + Sync,
) -> Result<Vec<ExpertWeights>, Failure> {
    let ranks = (0..replicas.config.ep_size() as u32).map(Rank);
    ranks.map(|rank| load_rank(registry, layer, (replicas, plan), rank, &loaded)).collect()
}

/// Loads and packs the experts of the slots of `rank`, from its own part of the checkpoint alone.
pub fn load_rank(
    registry: &Registry,
    layer: &MoeLayer<'_>,
    (replicas, plan): (&Replicas, &Plan),
    rank: Rank,
    loaded: impl Fn() + Sync,
) -> Result<ExpertWeights, Failure> {
    let Replicas { table, config } = replicas;
    let provider = registry.experts(plan.experts()).or_refused()?;
    let slots: Vec<_> = config.placement.experts_of(rank).map(|slot| slot.0 as usize).collect();
    // In parallel, as reading transposes where a family stores the transpose.
    let stored = slots.par_iter().map(|&slot| layer.expert(table.physical_to_logical()[slot] as usize));
    let stored: Vec<ExpertTensors<'_>> = stored.collect::<Result<_, _>>().or_refused()?;
    let experts: Vec<LoadedExpert<'_>> = stored
        .par_iter()
        .map(|tensors| {
            let expert = LoadedExpert::new(tensors, config.quant);
            loaded();
            expert
        })
        .collect::<anyhow::Result<_>>()
        .or_refused()?;
    pack(&**provider, config, rank, &experts)
}

fn pack(
    provider: &dyn fused_moe::ExpertsProvider,
    config: &MoeConfig,
    rank: Rank,
    experts: &[LoadedExpert<'_>],
) -> Result<ExpertWeights, Failure> {
    let views: Vec<ExpertMatrices<'_>> =
        experts.iter().map(LoadedExpert::view).collect::<Result<_, _>>().or_failed()?;
    provider.pack(config, rank, &views).context("packing the experts").or_failed()
}

/// The shared experts as a layer of one expert that every token goes to, on the token's own rank.
#[derive(Debug)]
pub struct SharedLayer {
    /// Its configuration.
    pub config: MoeConfig,
    /// Its weights, shared by all ranks.
    pub weights: ExpertWeights,
    /// `[1, hidden]`: the weight whose sigmoid multiplies the output, if there is one.
    pub sigmoid_gate: Option<Vec<f32>>,
}

/// Configuration of the shared experts of `layer`.
pub fn shared_config(
    layer: &MoeConfig,
    intermediate: usize,
    quant: QuantScheme,
) -> Result<MoeConfig, Failure> {
    let routing = RoutingConfig {
        method: RoutingMethod::Default,
        num_experts: 1,
        top_k: 1,
        groups: None,
        renormalize: false,
        routed_scaling_factor: 1.0,
        correction_bias: None,
    };
    Ok(MoeConfig {
        intermediate,
        top_k: 1,
        quant,
        routing: Some(routing),
        placement: ExpertPlacement::linear(1, 1).or_refused()?,
        redundant_experts: 0,
        max_received_rows: None,
        combine_wire: Default::default(),
        ranks_per_node: 1,
        ..layer.clone()
    })
}

/// The experts backend that runs the shared experts: the one that runs the routed experts where it can, or the first
/// that can. Their single expert is known without a router, so it takes modular ones.
fn shared_experts_backend(
    registry: &Registry,
    config: &MoeConfig,
    routed: &str,
) -> Result<&'static str, Failure> {
    for experts in [Some(routed), None] {
        let survey = registry.survey(config, Selection { comm: None, experts }).or_refused()?;
        let modular = survey.fitting.iter().find(|plan| plan.kind() == KernelKind::Modular);
        if let Some(plan) = modular {
            return Ok(plan.experts());
        }
    }
    refused(format!("no experts backend runs the shared experts ({})", config.quant))
}

/// Loads and packs the shared experts of `layer`, if there are any, for the backend of the routed `experts` or one
/// that can stand in for it.
pub fn load_shared(
    registry: &Registry,
    layer: &MoeLayer<'_>,
    config: &MoeConfig,
    experts: &str,
    quant: Quant,
) -> Result<Option<SharedLayer>, Failure> {
    let Some(shared) = layer.shared_experts().or_refused()? else { return Ok(None) };
    let scheme = shared_scheme(quant, shared.mlp.scheme());
    let config = shared_config(config, shared.mlp.gate.rows(), scheme)?;
    let experts = shared_experts_backend(registry, &config, experts)?;
    let provider = registry.experts(experts).or_refused()?;
    let expert = LoadedExpert::new(&shared.mlp, scheme).or_refused()?;
    let weights = pack(&**provider, &config, Rank(0), &[expert])?;
    let sigmoid_gate = shared.sigmoid_gate.as_ref().map(to_f32).transpose().or_refused()?;
    Ok(Some(SharedLayer { config, weights, sigmoid_gate }))
}

/// All elements of a bf16 or f32 matrix.
fn to_f32(matrix: &moe_checkpoint::Matrix<'_>) -> anyhow::Result<Vec<f32>> {
    if matrix.dtype() == DType::F32 {
        return Ok(matrix.view().as_slice::<f32>()?.to_vec());
    }
    let rounded = matrix.to_bf16().with_context(|| format!("a gate of {}", matrix.dtype()))?;
    Ok(rounded.iter().map(|x| x.to_f32()).collect())
}

/// Refuses names that no backend has.
pub fn check_names(registry: &Registry, selection: Selection<'_>) -> Result<(), Failure> {
    if let Some(name) = selection.comm {
        registry.comm(name).or_refused()?;
    }
    if let Some(name) = selection.experts {
        registry.experts(name).or_refused()?;
    }
    Ok(())
}
