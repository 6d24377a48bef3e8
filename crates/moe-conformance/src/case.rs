//! Layer cases: sizes, tokens, routing, scheme and placement, and the random tensors that follow from a seed.

mod input;
mod pairs;
mod weights;

use fused_moe_core::{
    Activation, CombineWire, DType, DeviceKind, ExpertPlacement, Fp8Format, MoeConfig, Padding, QuantScheme,
    Rank, RoutingConfig, RoutingMethod, ScaleSource,
};
use rand::Rng;

pub use input::RankInput;
pub use weights::LayerWeights;

use crate::oracle::{Shape, fp4};
use crate::seed::Seed;

/// Which experts tokens name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoutingPattern {
    /// Any, all as likely.
    Uniform,
    /// The same for all tokens of a rank; with `top_k` 1 that is one expert.
    SameExperts,
    /// Mostly the first ones.
    Skewed,
    /// Only those of other ranks; padded with -1 where there are not enough.
    RemoteOnly,
    /// Any, with -1 in random slots and in all slots of some tokens.
    Padded,
    /// Only those of the token's own rank; padded with -1 where there are not enough.
    LocalOnly,
}

impl RoutingPattern {
    /// All patterns.
    pub const ALL: [Self; 6] =
        [Self::Uniform, Self::SameExperts, Self::Skewed, Self::RemoteOnly, Self::Padded, Self::LocalOnly];
}

/// How many tokens the ranks bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenCounts {
    /// As many everywhere: 0, 1, 33 or 128.
    Each(usize),
    /// A different number everywhere, 1 to 40.
    Uneven,
    /// Every other rank none, the others 17.
    SomeIdle,
}

impl TokenCounts {
    /// All counts.
    pub const ALL: [Self; 6] =
        [Self::Each(0), Self::Each(1), Self::Each(33), Self::Each(128), Self::Uneven, Self::SomeIdle];

    fn per_rank(self, ep_size: usize) -> Vec<usize> {
        let count = |rank: usize| match self {
            TokenCounts::Each(tokens) => tokens,
            TokenCounts::Uneven => 1 + (rank * 29 + 11) % 40,
            TokenCounts::SomeIdle => (1 - rank % 2) * 17,
        };
        (0..ep_size).map(count).collect()
    }
}

/// Sizes of the expert-parallel group that are tested on one node.
pub const EP_SIZES: [usize; 4] = [1, 2, 3, 8];

/// Ranks, and over how many nodes of one size they are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Topology {
    /// Size of the expert-parallel group.
    pub ranks: usize,
    /// Nodes, a divisor of the ranks.
    pub nodes: usize,
}

impl Topology {
    /// What is tested over several nodes.
    pub const MULTI_NODE: [Self; 4] = [
        Self { ranks: 4, nodes: 2 },
        Self { ranks: 6, nodes: 3 },
        Self { ranks: 8, nodes: 2 },
        Self { ranks: 8, nodes: 4 },
    ];

    /// That of all ranks on one node.
    pub const fn one_node(ranks: usize) -> Self {
        Self { ranks, nodes: 1 }
    }
}

/// As names of cases end: `ep8`, or `ep8n2` over two nodes.
impl std::fmt::Display for Topology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ep{}", self.ranks)?;
        if self.nodes > 1 { write!(f, "n{}", self.nodes) } else { Ok(()) }
    }
}

/// The schemes that are tested, by the name that cases carry.
pub const SCHEMES: [(&str, QuantScheme); 10] = [
    ("none", QuantScheme::Unquantized),
    ("block", QuantScheme::Fp8Block(Fp8Format::E4M3Fn)),
    ("ptpc", QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn)),
    ("tensor", QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn)),
    ("blockfnuz", QuantScheme::Fp8Block(Fp8Format::E4M3Fnuz)),
    ("ptpcfnuz", QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fnuz)),
    ("tensorfnuz", QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fnuz)),
    ("static", QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn)),
    ("mxfp4", QuantScheme::Mxfp4),
    ("nvfp4", QuantScheme::Nvfp4),
];

/// `(hidden, intermediate)` of the cases; some are no multiples of 128 or of 64.
const SHAPES: [(usize, usize); 6] = [(128, 128), (256, 64), (384, 48), (200, 160), (96, 32), (320, 72)];

/// Multiply-adds of one round above which a case gets smaller sizes.
const MOST_WORK: usize = 12_000_000;

/// One layer, all ranks of it. Everything random in it follows from `seed`.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// What the tensors are made from.
    pub seed: Seed,
    /// Elements of a token.
    pub hidden: usize,
    /// Elements between gemm1 and gemm2.
    pub intermediate: usize,
    /// Experts over all ranks.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Tokens of each rank; as many entries as ranks.
    pub tokens: Vec<usize>,
    /// Nodes that the ranks are spread over, as many on each.
    pub nodes: usize,
    /// Which experts tokens name.
    pub routing: RoutingPattern,
    /// Scheme of weights and activations.
    pub quant: QuantScheme,
    /// Owner of each expert.
    pub placement: ExpertPlacement,
    /// Whether the routing weight multiplies the input (needs `top_k` 1).
    pub apply_router_weight_on_input: bool,
    /// What the combine carries.
    pub combine_wire: CombineWire,
    /// Between the two GEMMs.
    pub activation: Activation,
    /// Whether every matrix has a bias.
    pub expert_bias: bool,
    /// Trailing columns that hold zeros in the tokens and garbage in the weights.
    pub padding: Padding,
    /// Where tensors lie.
    pub device: DeviceKind,
}

impl Case {
    /// A small case over `ep_size` ranks: uneven tokens, top-2 of 8 experts, uniform routing, linear placement.
    pub fn small(quant: QuantScheme, ep_size: usize, seed: Seed) -> Self {
        Self {
            seed,
            hidden: 128,
            intermediate: 64,
            num_experts: 8,
            top_k: 2,
            tokens: TokenCounts::Uneven.per_rank(ep_size),
            nodes: 1,
            routing: RoutingPattern::Uniform,
            quant,
            placement: linear(8, ep_size),
            apply_router_weight_on_input: false,
            combine_wire: CombineWire::InDtype,
            activation: Activation::Silu,
            expert_bias: false,
            padding: Padding::default(),
            device: DeviceKind::Host,
        }
    }

    /// A case within the limits of most GPU kernels: sizes that are multiples of 128, as many experts on every rank
    /// and a multiple of 4 in all, linear placement; top-4 and uneven tokens.
    pub fn plain(quant: QuantScheme, ep_size: usize, seed: Seed) -> Self {
        let num_experts = 8 * ep_size;
        Self {
            hidden: 256,
            intermediate: 128,
            num_experts,
            top_k: 4,
            placement: linear(num_experts, ep_size),
            ..Self::small(quant, ep_size, seed)
        }
    }

    /// The case with padding in both sizes, as much as a third of them.
    #[must_use]
    pub fn padded(mut self) -> Self {
        let mut rng = self.seed.derive(2_000_000).rng();
        let hidden = rng.random_range(1..=self.hidden / 3);
        self.padding = Padding { hidden, intermediate: rng.random_range(1..=self.intermediate / 3) };
        self
    }

    /// Cases of `quant` over `ep_size` ranks in which every two of these meet: token counts, top-k {1, 4, 8},
    /// routing pattern, sizes, placement (linear or scattered), weight on output or (for top-1) on input.
    pub fn covering(quant: QuantScheme, ep_size: usize, seed: Seed) -> Vec<Self> {
        Self::covering_all(quant, &[Topology::one_node(ep_size)], seed)
    }

    /// As [`Case::covering`] with the ranks as another factor, [`EP_SIZES`] on one node or
    /// [`Topology::MULTI_NODE`]: fewer cases in all.
    pub fn covering_part(quant: QuantScheme, topology: Topology, seed: Seed) -> Vec<Self> {
        let dealt = match topology.nodes {
            1 => Self::covering_all(quant, &EP_SIZES.map(Topology::one_node), seed),
            _ => Self::covering_all(quant, &Topology::MULTI_NODE, seed),
        };
        dealt.into_iter().filter(|case| case.topology() == topology).collect()
    }

    fn covering_all(quant: QuantScheme, topologies: &[Topology], seed: Seed) -> Vec<Self> {
        const TOP_K: [usize; 3] = [1, 4, 8];
        const NUM_EXPERTS: [usize; 2] = [13, 16];
        let levels = [
            TokenCounts::ALL.len(),
            TOP_K.len(),
            RoutingPattern::ALL.len(),
            SHAPES.len(),
            NUM_EXPERTS.len() * 2,
            topologies.len(),
        ];
        // The rows of the covering are the same for all sizes of the group that share a seed.
        let rows = pairs::covering(&levels, seed);
        let case = |(index, row): (usize, &Vec<usize>)| {
            let seed = seed.derive(index as u64);
            let Topology { ranks: ep_size, nodes } = topologies[row[5]];
            let num_experts = NUM_EXPERTS[row[4] % 2];
            let scattered = row[4] >= NUM_EXPERTS.len();
            let top_k = TOP_K[row[1]];
            let case = Self {
                seed,
                hidden: SHAPES[row[3]].0,
                intermediate: SHAPES[row[3]].1,
                num_experts,
                top_k,
                tokens: TokenCounts::ALL[row[0]].per_rank(ep_size),
                nodes,
                routing: RoutingPattern::ALL[row[2]],
                quant,
                placement: if scattered {
                    self::scattered(num_experts, ep_size, seed)
                } else {
                    linear(num_experts, ep_size)
                },
                apply_router_weight_on_input: top_k == 1 && index % 3 == 0,
                combine_wire: CombineWire::InDtype,
                activation: Activation::Silu,
                expert_bias: false,
                padding: Padding::default(),
                device: DeviceKind::Host,
            };
            case.affordable()
        };
        rows.iter().enumerate().map(case).collect()
    }

    /// The case with sizes that a test can afford.
    fn affordable(mut self) -> Self {
        let pairs = self.tokens.iter().sum::<usize>() * self.top_k;
        if pairs * self.hidden * self.intermediate * 3 > MOST_WORK {
            (self.hidden, self.intermediate) =
                if self.hidden.is_multiple_of(128) { (128, 32) } else { (96, 32) };
        }
        // Schemes whose groups must be whole get the next size that is.
        let group = match self.quant {
            QuantScheme::Mxfp4 => fp4::MX_GROUP,
            QuantScheme::Nvfp4 => fp4::NV_GROUP,
            _ => 1,
        };
        self.hidden = self.hidden.next_multiple_of(group);
        self.intermediate = self.intermediate.next_multiple_of(group);
        self
    }

    /// The case over `nodes` nodes.
    #[must_use]
    pub fn on_nodes(self, nodes: usize) -> Self {
        Self { nodes, ..self }
    }

    /// The case on a device; but for the host with sizes that are multiples of 128, as kernels take them.
    #[must_use]
    pub fn on(mut self, device: DeviceKind) -> Self {
        self.device = device;
        if device != DeviceKind::Host {
            self.hidden = self.hidden.next_multiple_of(fused_moe_core::BLOCK);
            self.intermediate = self.intermediate.next_multiple_of(fused_moe_core::BLOCK);
        }
        self
    }

    /// The case with a combine in the scheme's FP8 format, or OCP's.
    #[must_use]
    pub fn returning_fp8(self) -> Self {
        let format = self.quant.fp8().unwrap_or(Fp8Format::E4M3Fn);
        Self { combine_wire: CombineWire::Fp8Block(format), ..self }
    }

    /// The ranks of the case, on their nodes.
    pub fn topology(&self) -> Topology {
        Topology { ranks: self.ep_size(), nodes: self.nodes }
    }

    /// Ranks in the group.
    pub fn ep_size(&self) -> usize {
        self.tokens.len()
    }

    /// Sizes as the oracle takes them.
    pub fn shape(&self) -> Shape {
        Shape { hidden: self.hidden, intermediate: self.intermediate, top_k: self.top_k }
    }

    /// The configuration of the layer: bf16, room for a few more tokens than come.
    pub fn config(&self) -> MoeConfig {
        MoeConfig {
            hidden: self.hidden,
            intermediate: self.intermediate,
            top_k: self.top_k,
            max_tokens_per_rank: self.tokens.iter().max().copied().unwrap_or(0) + 3,
            max_received_rows: None,
            in_dtype: DType::Bf16,
            quant: self.quant,
            combine_wire: self.combine_wire,
            activation: self.activation,
            apply_router_weight_on_input: self.apply_router_weight_on_input,
            expert_bias: self.expert_bias,
            padding: self.padding,
            redundant_experts: 0,
            routing: Some(RoutingConfig {
                method: RoutingMethod::RenormalizeNaive,
                num_experts: self.num_experts,
                top_k: self.top_k,
                groups: None,
                renormalize: true,
                routed_scaling_factor: 1.0,
                correction_bias: None,
            }),
            placement: self.placement.clone(),
            ranks_per_node: self.ep_size() / self.nodes,
            device: self.device,
        }
    }

    /// The static scale of what gemm1 reads, for schemes that have one.
    pub(crate) fn static_scale(&self) -> Option<f32> {
        weights::input_scales(self.quant)[0].filter(|_| self.quant.scale_source() == ScaleSource::Static)
    }

    /// What every rank brings to round `round`. Later rounds have as many tokens or fewer.
    pub fn inputs(&self, round: u64) -> Vec<RankInput> {
        let seed = self.seed.derive(round);
        let mut shrunk = self.clone();
        if round > 0 {
            shrunk.tokens.iter_mut().for_each(|tokens| *tokens -= *tokens / 3);
        }
        let input = |rank: u32| {
            let mut rng = seed.derive(u64::from(rank)).rng();
            RankInput::random(&shrunk, &self.placement, Rank(rank), &mut rng)
        };
        (0..self.ep_size() as u32).map(input).collect()
    }

    /// The weights of the layer.
    pub fn weights(&self) -> LayerWeights {
        LayerWeights::random(self)
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let owners: Vec<u32> = self.placement.owners().iter().map(|rank| rank.0).collect();
        write!(
            f,
            "hidden {} intermediate {} top-{} of {} experts on ranks {owners:?} ({}), tokens {:?}, {:?} routing, {}, combine {}, {}{}{}{}, seed {}",
            self.hidden,
            self.intermediate,
            self.top_k,
            self.num_experts,
            self.topology(),
            self.tokens,
            self.routing,
            self.quant,
            self.combine_wire,
            self.activation,
            if self.apply_router_weight_on_input { ", weight on input" } else { "" },
            if self.expert_bias { ", biases" } else { "" },
            match self.padding {
                Padding { hidden: 0, intermediate: 0 } => String::new(),
                Padding { hidden, intermediate } => format!(", padding {hidden} and {intermediate}"),
            },
            self.seed,
        )
    }
}

fn linear(num_experts: usize, ep_size: usize) -> ExpertPlacement {
    ExpertPlacement::linear(num_experts, ep_size).expect("a case has at least one rank")
}

/// Experts on random ranks, so that a rank may hold many or none.
fn scattered(num_experts: usize, ep_size: usize, seed: Seed) -> ExpertPlacement {
    let mut rng = seed.derive(u64::MAX).rng();
    let owners: Vec<usize> = (0..num_experts).map(|_| rng.random_range(0..ep_size)).collect();
    ExpertPlacement::from_owners(&owners, ep_size).expect("every owner is a rank of the case")
}
