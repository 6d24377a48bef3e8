//! What a dispatch and a combine move, link by link, before anything is built: the input of a cost model.

use crate::config::MoeConfig;
use crate::placement::Rank;
use crate::provider::WireBytes;

/// A quantity that leaves a rank for every token of its own, bytes or copies of a row, by the link that carries it.
/// Every rank is taken to bring as many tokens, so as much arrives at it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PerLink {
    /// To other ranks on its node: shared memory, XGMI, NVLink.
    pub scale_up: f64,
    /// To ranks on other nodes.
    pub network: f64,
}

impl PerLink {
    /// Over all links.
    pub fn total(self) -> f64 {
        self.scale_up + self.network
    }
}

/// Copies times the bytes of one.
impl std::ops::Mul<usize> for PerLink {
    type Output = Self;

    fn mul(self, bytes: usize) -> Self {
        Self { scale_up: self.scale_up * bytes as f64, network: self.network * bytes as f64 }
    }
}

/// How rows travel. A machine's constants (what a call costs before its first byte, the bandwidth it reaches) are by
/// protocol, so a backend names the one that it is closest to, or one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Protocol(pub &'static str);

impl Protocol {
    /// Every rank writes into, or reads from, the memory of every other: MoRI's IntraNode.
    pub const ONE_HOP: Self = Self("one_hop");
    /// One copy per node over the network, forwarded inside it: MoRI's InterNodeV1, DeepEP's normal mode.
    pub const TWO_HOP: Self = Self("two_hop");
    /// As [`Protocol::TWO_HOP`], in whole windows of tokens that wait for no count: MoRI's InterNodeV1LL.
    pub const TWO_HOP_LOW_LATENCY: Self = Self("two_hop_low_latency");
    /// One copy per expert, straight to its rank: DeepEP's low-latency mode.
    pub const PER_EXPERT: Self = Self("per_expert");
    /// Collectives over all ranks: all-gather, reduce-scatter, all-reduce.
    pub const COLLECTIVE: Self = Self("collective");
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// What a backend expects to move under a configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CommTraffic {
    /// How.
    pub protocol: Protocol,
    /// Bytes from a token's rank to its experts: payload, scales, and everything that travels with them.
    pub dispatch: PerLink,
    /// Bytes until its output is back.
    pub combine: PerLink,
}

impl From<CommTraffic> for WireBytes {
    fn from(traffic: CommTraffic) -> Self {
        Self { dispatch: traffic.dispatch.total(), combine: traffic.combine.total() }
    }
}

/// Where the `top_k` experts of a token are expected to be, its own rank being any of the N alike.
///
/// Experts are drawn uniformly without replacement; under a group-limited routing ([`crate::ExpertGroups`]) from
/// `topk_group` groups that are drawn so themselves. With `redundant_experts` the groups of the slots are not known, and
/// all are alike. Nodes hold `ranks_per_node` ranks each; a last one with fewer is counted as an average rank sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpectedSpread {
    /// Distinct ranks.
    pub ranks: f64,
    /// Of these, ranks other than its own on its node.
    pub node_peers: f64,
    /// Of these, ranks on other nodes.
    pub remote_ranks: f64,
    /// Distinct nodes other than its own.
    pub remote_nodes: f64,
    /// Ranks on other nodes that are not at its own position inside their node, to which a two-hop protocol forwards.
    pub forwarded: f64,
}

impl ExpectedSpread {
    /// The spread under `config`'s placement, routing and nodes.
    pub fn new(config: &MoeConfig) -> Self {
        let (world, per_node) = (config.ep_size(), config.ranks_per_node.max(1));
        let chance = Chance::new(config);
        let held = |ranks: std::ops::Range<usize>| {
            let of_rank = |rank| config.placement.experts_of(Rank(rank as u32));
            chance.hit(ranks.flat_map(of_rank).map(|id| id.0 as usize))
        };
        let mut spread =
            Self { ranks: 0.0, node_peers: 0.0, remote_ranks: 0.0, remote_nodes: 0.0, forwarded: 0.0 };
        for start in (0..world).step_by(per_node) {
            let node = start..world.min(start + per_node);
            let size = node.len() as f64;
            let inside = size / world as f64;
            let ranks: f64 = node.clone().map(|rank| held(rank..rank + 1)).sum();
            spread.ranks += ranks;
            spread.node_peers += ranks * (inside - 1.0 / world as f64);
            spread.remote_ranks += ranks * (1.0 - inside);
            spread.remote_nodes += if inside < 1.0 { held(node) * (1.0 - inside) } else { 0.0 };
            spread.forwarded += ranks * (1.0 - inside) * (1.0 - 1.0 / size);
        }
        spread
    }

    /// One copy per (token, rank).
    pub fn per_rank(&self) -> PerLink {
        PerLink { scale_up: self.node_peers, network: self.remote_ranks }
    }

    /// One copy per (token, node), forwarded to the ranks inside.
    pub fn per_node(&self) -> PerLink {
        PerLink { scale_up: self.node_peers + self.forwarded, network: self.remote_nodes }
    }
}

/// One copy per slot of a token, straight to the slot's rank, which is any of the N alike.
pub fn copies_per_slot(config: &MoeConfig) -> PerLink {
    let (world, per_node) = (config.ep_size() as f64, node_size(config) as f64);
    let slots = config.top_k as f64;
    PerLink { scale_up: slots * (per_node - 1.0) / world, network: slots * (world - per_node) / world }
}

/// One copy to every other rank, over rails: to the rank at its own position on every other node, and from there to
/// that node's others.
pub fn copies_to_all(config: &MoeConfig) -> PerLink {
    let (world, per_node) = (config.ep_size(), node_size(config));
    let other_nodes = world.div_ceil(per_node) - 1;
    PerLink { scale_up: (world - 1 - other_nodes) as f64, network: other_nodes as f64 }
}

/// Ranks of a node that is full.
fn node_size(config: &MoeConfig) -> usize {
    config.ranks_per_node.clamp(1, config.ep_size())
}

/// Ranks other than its own that a token is expected to go to: see [`ExpectedSpread`].
pub fn expected_remote_ranks(config: &MoeConfig) -> f64 {
    let spread = ExpectedSpread::new(config);
    spread.node_peers + spread.remote_ranks
}

/// The chance that a token has an expert in a set.
struct Chance {
    top_k: usize,
    experts: usize,
    /// Groups, and how many of them a token's experts come from; one of one where routing knows no groups.
    groups: (usize, usize),
}

impl Chance {
    fn new(config: &MoeConfig) -> Self {
        let experts = config.num_experts();
        let groups = config.routing.as_ref().and_then(|routing| routing.groups);
        let groups = groups.map(|g| (g.n_group, g.topk_group)).filter(|&(all, kept)| {
            config.redundant_experts == 0 && kept > 0 && kept <= all && experts.is_multiple_of(all)
        });
        Self { top_k: config.top_k, experts, groups: groups.unwrap_or((1, 1)) }
    }

    fn hit(&self, set: impl Iterator<Item = usize>) -> f64 {
        let (all, kept) = self.groups;
        let per_group = self.experts / all;
        let mut held = vec![0; all];
        set.for_each(|expert| held[expert / per_group] += 1);
        // Of the ways to keep `g` groups, how many (as a share of all ways) have `s` experts of the set in them.
        let total: usize = held.iter().sum();
        let mut ways = vec![vec![0.0; total + 1]; kept + 1];
        ways[0][0] = 1.0;
        for (seen, held) in held.into_iter().enumerate() {
            for g in (1..=kept.min(seen + 1)).rev() {
                for s in (held..=total).rev() {
                    ways[g][s] += ways[g - 1][s - held];
                }
            }
        }
        let all_ways: f64 = ways[kept].iter().sum();
        let missed = ways[kept]
            .iter()
            .enumerate()
            .filter(|(_, ways)| **ways > 0.0)
            .map(|(s, ways)| ways / all_ways * self.missed(kept * per_group, s));
        1.0 - missed.sum::<f64>()
    }

    /// `C(experts − held, k) / C(experts, k)` as a product, which neither overflows nor cancels.
    fn missed(&self, experts: usize, held: usize) -> f64 {
        let drawn = 0..self.top_k.min(experts);
        drawn.map(|i| (experts - held).saturating_sub(i) as f64 / (experts - i) as f64).product()
    }
}
