//! Capabilities as data, and the pure function that decides whether two backends fit.

use crate::config::MoeConfig;
use crate::dtype::{DType, DeviceKind};
use crate::quantization::{Accumulation, CombineWire, WireFormat};
use crate::reduce::TopKWeightAndReduce;

/// What a refusal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Axis {
    /// Where tensors live.
    Device,
    /// A library or driver that is not there.
    Library,
    /// Modular against monolithic.
    KernelKind,
    /// Standard against batched activations.
    Format,
    /// Quantisation scheme, FP8 format, wire format.
    Quant,
    /// Element type of hidden states or ids.
    DType,
    /// Sizes.
    Shape,
    /// Size or topology of the expert-parallel group, placement.
    Parallel,
    /// Routing method.
    Routing,
    /// Who weights and reduces.
    Reduction,
    /// Where the routing weight is applied.
    RouterWeight,
    /// Activation function.
    Activation,
    /// What the experts' weights consist of.
    Weights,
    /// Graph capture.
    Capture,
}

impl Axis {
    /// Lower-case name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Axis::Device => "device",
            Axis::Library => "library",
            Axis::KernelKind => "kernel kind",
            Axis::Format => "activation format",
            Axis::Quant => "quantisation",
            Axis::DType => "element type",
            Axis::Shape => "shape",
            Axis::Parallel => "parallelism",
            Axis::Routing => "routing",
            Axis::Reduction => "reduction",
            Axis::RouterWeight => "router weight",
            Axis::Activation => "activation",
            Axis::Weights => "weights",
            Axis::Capture => "graph capture",
        }
    }
}

/// One reason why something cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unsupported {
    /// What it is about.
    pub axis: Axis,
    /// What is needed.
    pub wanted: String,
    /// What there is.
    pub offered: String,
}

impl Unsupported {
    /// A reason, with what is needed and what there is.
    pub fn new(axis: Axis, wanted: impl Into<String>, offered: impl Into<String>) -> Self {
        Self { axis, wanted: wanted.into(), offered: offered.into() }
    }
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: needs {}, found {}", self.axis.name(), self.wanted, self.offered)
    }
}

/// Layout of the activations between dispatch and experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivationFormat {
    /// `[tokens, hidden]`, one row per received token.
    Standard,
    /// `[local_experts, max_tokens, hidden]`, one row per (token, expert).
    BatchedExperts,
}

impl ActivationFormat {
    /// Name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            ActivationFormat::Standard => "standard",
            ActivationFormat::BatchedExperts => "batched",
        }
    }
}

/// The two shapes of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KernelKind {
    /// The router runs before dispatch; experts get ids and weights.
    Modular,
    /// Experts route by themselves; they get logits.
    Monolithic,
}

impl KernelKind {
    /// Name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            KernelKind::Modular => "modular",
            KernelKind::Monolithic => "monolithic",
        }
    }
}

/// What a combine does with the rows that experts hand it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CombineKind {
    /// Sums rows that are already weighted and reduced over the experts of a rank.
    Sum,
    /// Applies the routing weights and reduces by itself.
    WeightAndReduce,
}

/// Which sums a combine rounds on the way from the experts' ranks to the token's. Sums are f32 otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PartialSums {
    /// None: what ranks (or experts) return is added up once.
    None,
    /// Those over the ranks of each node, the token's own among them, to the configuration's element type. They are
    /// added up in the order of nodes.
    OfNodes {
        /// Ranks on each node.
        ranks_per_node: usize,
    },
}

impl std::fmt::Display for PartialSums {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PartialSums::None => f.write_str("none"),
            PartialSums::OfNodes { ranks_per_node } => write!(f, "of nodes of {ranks_per_node}"),
        }
    }
}

/// What a prepare/finalize backend offers for one configuration.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PrepareCaps {
    /// Registered name.
    pub name: &'static str,
    /// Shape of the pipeline it serves.
    pub kind: KernelKind,
    /// Layout it hands to the experts.
    pub format: ActivationFormat,
    /// Wire formats it can carry.
    pub wires: Vec<WireFormat>,
    /// Element type of the top-k ids it takes.
    pub topk_id: DType,
    /// What its combine does.
    pub combine: CombineKind,
    /// What its combine rounds on the way.
    pub partial_sums: PartialSums,
    /// What its combine carries.
    pub combine_wire: CombineWire,
    /// Whether it can multiply the routing weight into the rows it sends.
    pub weight_on_input: bool,
    /// Whether anything happens between a send and its receive.
    pub overlaps: bool,
    /// Whether it offers its own buffer for the experts' output.
    pub in_place_output: bool,
    /// Whether its calls can be captured in a graph.
    pub capturable: bool,
    /// Rows of the received tensor: tokens for [`ActivationFormat::Standard`], tokens per expert for
    /// [`ActivationFormat::BatchedExperts`].
    pub max_rows: usize,
    /// Devices on which it runs.
    pub devices: Vec<DeviceKind>,
}

impl PrepareCaps {
    /// Host capabilities: standard format, i32 ids, a combine that sums, no overlap, no capture.
    pub fn host(name: &'static str, kind: KernelKind, wires: Vec<WireFormat>, max_rows: usize) -> Self {
        Self {
            name,
            kind,
            format: ActivationFormat::Standard,
            wires,
            topk_id: DType::I32,
            combine: CombineKind::Sum,
            partial_sums: PartialSums::None,
            combine_wire: CombineWire::InDtype,
            weight_on_input: false,
            overlaps: false,
            in_place_output: false,
            capturable: false,
            max_rows,
            devices: vec![DeviceKind::Host],
        }
    }
}

/// What an experts backend offers for one configuration.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExpertsCaps {
    /// Registered name.
    pub name: &'static str,
    /// Modular or monolithic.
    pub kind: KernelKind,
    /// Layout it reads.
    pub format: ActivationFormat,
    /// Wire formats it reads, best first.
    pub accepts: Vec<WireFormat>,
    /// Element type of the top-k ids it reads.
    pub topk_id: DType,
    /// How its output becomes `[tokens, hidden]`.
    pub weight_and_reduce: TopKWeightAndReduce,
    /// Whether it can multiply the routing weight in before the activation.
    pub weight_on_input: bool,
    /// In what its GEMMs add up.
    pub accumulation: Accumulation,
    /// Whether its calls can be captured in a graph.
    pub capturable: bool,
    /// Devices on which it runs.
    pub devices: Vec<DeviceKind>,
}

impl ExpertsCaps {
    /// Host capabilities: modular, standard format, i32 ids, output weighted and reduced.
    pub fn host(name: &'static str, accepts: Vec<WireFormat>) -> Self {
        Self {
            name,
            kind: KernelKind::Modular,
            format: ActivationFormat::Standard,
            accepts,
            topk_id: DType::I32,
            weight_and_reduce: TopKWeightAndReduce::no_op(),
            weight_on_input: false,
            accumulation: Accumulation::F32,
            capturable: false,
            devices: vec![DeviceKind::Host],
        }
    }
}

/// A provider's answer for one configuration.
#[must_use]
#[derive(Clone, Debug)]
pub enum Support<C> {
    /// It can, with these capabilities.
    Supported(C),
    /// It cannot, for all of these reasons.
    Unsupported(Vec<Unsupported>),
}

impl<C> Support<C> {
    /// `Supported` if there is no reason against it.
    pub fn unless(reasons: Vec<Unsupported>, caps: C) -> Self {
        if reasons.is_empty() { Support::Supported(caps) } else { Support::Unsupported(reasons) }
    }
}

/// Where the routing weight is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouterWeight {
    /// To the outputs of the experts: the usual order.
    OnOutput,
    /// To the rows that dispatch sends; the weights that arrive with them are 1.
    OnInputByPrepare,
    /// Inside the experts, before the activation.
    OnInputByExperts,
}

/// Proof that a prepare/finalize and an experts backend fit. It can be read:
///
/// ```
/// # use fused_moe_core::*;
/// fn read(real: Plan) -> &'static str {
///     real.comm()
/// }
/// ```
///
/// but only [`negotiate`] makes one:
///
/// ```compile_fail,E0451
/// # use fused_moe_core::*;
/// fn forge(real: Plan) -> Plan {
///     Plan { comm: "mine", ..real }
/// }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    comm: &'static str,
    experts: &'static str,
    kind: KernelKind,
    format: ActivationFormat,
    wire: WireFormat,
    weight_and_reduce: TopKWeightAndReduce,
    router_weight: RouterWeight,
    partial_sums: PartialSums,
    combine_wire: CombineWire,
    accumulation: Accumulation,
    in_place_output: bool,
    max_rows: usize,
}

impl Plan {
    /// Name of the prepare/finalize backend.
    pub fn comm(&self) -> &'static str {
        self.comm
    }

    /// Name of the experts backend.
    pub fn experts(&self) -> &'static str {
        self.experts
    }

    /// Modular or monolithic.
    pub fn kind(&self) -> KernelKind {
        self.kind
    }

    /// Layout between dispatch and experts.
    pub fn format(&self) -> ActivationFormat {
        self.format
    }

    /// What travels in dispatch.
    pub fn wire(&self) -> WireFormat {
        self.wire
    }

    /// How expert outputs become `[tokens, hidden]`.
    pub fn weight_and_reduce(&self) -> TopKWeightAndReduce {
        self.weight_and_reduce
    }

    /// Where the routing weight is applied.
    pub fn router_weight(&self) -> RouterWeight {
        self.router_weight
    }

    /// What the combine rounds on the way.
    pub fn partial_sums(&self) -> PartialSums {
        self.partial_sums
    }

    /// What the combine carries.
    pub fn combine_wire(&self) -> CombineWire {
        self.combine_wire
    }

    /// In what the experts' GEMMs add up.
    pub fn accumulation(&self) -> Accumulation {
        self.accumulation
    }

    /// Whether experts write into the backend's own combine buffer.
    pub fn in_place_output(&self) -> bool {
        self.in_place_output
    }

    /// Rows of the received tensor (see [`PrepareCaps::max_rows`]).
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }
}

/// Decides whether `prepare` and `experts` fit under `config`, and how.
///
/// The wire format is the first in the experts' order of preference that the other side can carry, so whether
/// dispatch quantises is an outcome, not a flag.
///
/// # Errors
/// All reasons why they do not fit.
pub fn negotiate(
    config: &MoeConfig,
    prepare: &PrepareCaps,
    experts: &ExpertsCaps,
) -> Result<Plan, Vec<Unsupported>> {
    let mut why = Vec::new();
    let mut no = |axis, wanted: String, offered: String| why.push(Unsupported { axis, wanted, offered });

    if prepare.kind != experts.kind {
        no(Axis::KernelKind, experts.kind.name().into(), prepare.kind.name().into());
    }
    if config.redundant_experts > 0 && experts.kind == KernelKind::Monolithic {
        // They would choose a logical expert, and nobody between choice and weights could name a replica of it.
        let wanted =
            format!("{} for {} redundant experts", KernelKind::Modular.name(), config.redundant_experts);
        no(Axis::KernelKind, wanted, experts.kind.name().into());
    }
    if prepare.format != experts.format {
        no(Axis::Format, experts.format.name().into(), prepare.format.name().into());
    }
    if prepare.topk_id != experts.topk_id {
        no(Axis::DType, format!("{} top-k ids", experts.topk_id), prepare.topk_id.to_string());
    }
    for (name, devices) in [(prepare.name, &prepare.devices), (experts.name, &experts.devices)] {
        if !devices.contains(&config.device) {
            no(Axis::Device, format!("{:?}", config.device), format!("{name} on {devices:?}"));
        }
    }
    if prepare.combine_wire != config.combine_wire {
        let named = |wire: CombineWire| format!("combine quantised: {wire}");
        no(Axis::Quant, named(config.combine_wire), named(prepare.combine_wire));
    }
    if let Some(most) = config.max_received_rows.filter(|&most| most < prepare.max_rows) {
        no(Axis::Shape, format!("at most {most} received rows"), prepare.max_rows.to_string());
    }
    let delegates = experts.weight_and_reduce.is_delegate();
    match (prepare.combine, delegates) {
        (CombineKind::Sum, true) => {
            no(Axis::Reduction, "a combine that weights and reduces".into(), "a combine that sums".into());
        }
        (CombineKind::WeightAndReduce, false) => no(
            Axis::Reduction,
            "experts that delegate weight and reduce".into(),
            experts.weight_and_reduce.name().into(),
        ),
        _ => {}
    }
    let reduction = (experts.kind, experts.format, experts.weight_and_reduce);
    let reducible = match reduction {
        (KernelKind::Monolithic, _, TopKWeightAndReduce::NoOp(_)) => true,
        (KernelKind::Monolithic, ..) => false,
        // Between experts and combine the kernel reduces rows of a token only.
        (
            _,
            ActivationFormat::Standard,
            TopKWeightAndReduce::NoOp(_) | TopKWeightAndReduce::Contiguous(_),
        ) => true,
        (_, ActivationFormat::BatchedExperts, TopKWeightAndReduce::Delegate(_)) => true,
        _ => false,
    };
    if !reducible {
        let wanted = match reduction {
            (KernelKind::Modular, ActivationFormat::Standard, _) => {
                "no-op or contiguous in the standard format"
            }
            (KernelKind::Modular, ..) => "delegate in the batched format",
            (KernelKind::Monolithic, ..) => "no-op of monolithic experts",
        };
        no(Axis::Reduction, wanted.into(), experts.weight_and_reduce.name().into());
    }
    let router_weight = match (config.apply_router_weight_on_input, prepare.weight_on_input) {
        (false, _) => RouterWeight::OnOutput,
        (true, true) => RouterWeight::OnInputByPrepare,
        (true, false) if experts.weight_on_input => RouterWeight::OnInputByExperts,
        (true, false) => {
            no(Axis::RouterWeight, "weight on input".into(), "neither side applies it".into());
            RouterWeight::OnOutput
        }
    };
    let wire = experts.accepts.iter().copied().find(|w| prepare.wires.contains(w));
    let list = |wires: &[WireFormat]| {
        let names: Vec<String> = wires.iter().map(ToString::to_string).collect();
        if names.is_empty() { "nothing".into() } else { names.join(" | ") }
    };
    if wire.is_none() {
        no(Axis::Quant, format!("wire {}", list(&experts.accepts)), list(&prepare.wires));
    }
    match wire {
        Some(wire) if why.is_empty() => Ok(Plan {
            comm: prepare.name,
            experts: experts.name,
            kind: prepare.kind,
            format: prepare.format,
            wire,
            weight_and_reduce: experts.weight_and_reduce,
            router_weight,
            partial_sums: prepare.partial_sums,
            combine_wire: prepare.combine_wire,
            accumulation: experts.accumulation,
            // The backend's own buffer has the shape of reduced rows.
            in_place_output: prepare.in_place_output && experts.weight_and_reduce.is_no_op(),
            max_rows: prepare.max_rows,
        }),
        _ => Err(why),
    }
}
