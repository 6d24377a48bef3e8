//! From a recorded load to the table that balances it.

use fused_moe_core::{ExpertPlacement, PlacementError};

use super::balance::Balance;
use super::pack::{self, Cluster};
use super::table::{ReplicaTable, TableError};

/// How experts are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Hierarchical where there are several nodes and the groups fit them, greedy elsewhere.
    #[default]
    Auto,
    /// Replicas of the heaviest experts over all ranks.
    Greedy,
    /// Groups of experts onto nodes first, then replicas inside every node: tokens of a group-limited router
    /// cross to few nodes, and replicas of an expert never span two.
    Hierarchical,
}

/// How a proposed table was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// No table is better than the one that is there.
    Kept,
    /// None is better than [`ReplicaTable::identity`], which is not in use.
    Identity,
    /// See [`Strategy::Greedy`].
    Greedy,
    /// See [`Strategy::Hierarchical`].
    Hierarchical,
}

impl Method {
    /// Name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Kept => "kept",
            Method::Identity => "identity",
            Method::Greedy => "greedy",
            Method::Hierarchical => "hierarchical",
        }
    }
}

/// Why experts could not be spread hierarchically.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fallback {
    /// A node would get parts of groups.
    #[error("{groups} expert groups do not divide over {nodes} nodes")]
    Groups {
        /// Expert groups.
        groups: usize,
        /// Nodes.
        nodes: usize,
    },
    /// The groups have different sizes.
    #[error("{experts} experts do not divide into {groups} groups")]
    Experts {
        /// Logical experts.
        experts: usize,
        /// Expert groups.
        groups: usize,
    },
    /// The nodes have different sizes.
    #[error("{ranks} ranks do not divide over {nodes} nodes")]
    Ranks {
        /// Ranks.
        ranks: usize,
        /// Nodes.
        nodes: usize,
    },
}

/// A demand that no table meets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProposalError {
    /// Nothing of something.
    #[error("{what} is 0")]
    Zero {
        /// What there is none of.
        what: &'static str,
    },
    /// Not every expert would have a slot.
    #[error("{ranks} ranks with {slots_per_rank} slots each do not hold {experts} experts")]
    TooFewSlots {
        /// Logical experts.
        experts: usize,
        /// Ranks.
        ranks: usize,
        /// Slots per rank.
        slots_per_rank: usize,
    },
    /// The table that is there is of another layer or group.
    #[error("the current table has {found:?} logical and physical experts, wanted {wanted:?}")]
    Current {
        /// Its logical and physical experts.
        found: [usize; 2],
        /// Those of the demand.
        wanted: [usize; 2],
    },
    /// More slots than can be named.
    #[error(transparent)]
    Table(#[from] TableError),
    /// No group.
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

/// What is to be balanced, and over what. Slots are in rank order, as many on every rank, ranks in node order.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// `[logical]`: the recorded load of every expert, over all ranks.
    pub load: &'a [u64],
    /// Ranks that share the experts.
    pub ranks: usize,
    /// Slots of every rank. `ranks · slots_per_rank` is at least the number of experts; what is more is replicas.
    pub slots_per_rank: usize,
    /// Nodes that the ranks are on; 1 if it does not matter.
    pub nodes: usize,
    /// Groups of the router ([`fused_moe_core::ExpertGroups::n_group`]), equal in size and contiguous; 1 for a
    /// router without groups.
    pub groups: usize,
    /// How to spread.
    pub strategy: Strategy,
    /// The table in use, [`ReplicaTable::identity`] if not given.
    pub current: Option<&'a ReplicaTable>,
}

/// A table and what it should bring.
#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    /// The table.
    pub table: ReplicaTable,
    /// How it was made.
    pub method: Method,
    /// Why it was not made hierarchically, where that was asked for.
    pub fallback: Vec<Fallback>,
    /// What the recorded load is predicted to do under the current table.
    pub before: Balance,
    /// What it is predicted to do under the proposed one: never a larger [`Balance::max`], unless the current table is
    /// not what a hierarchical strategy may keep, because replicas of a group are on several nodes.
    pub after: Balance,
}

/// A smaller gain than this is rounding, and not worth moving weights for.
const LEAST_GAIN: f64 = 1e-9;

/// Proposes a table for `demand`, in the manner of DeepSeek's published balancer (`deepseek-ai/EPLB`):
///
/// - *Replicas*: every slot beyond the number of experts goes to the expert with the largest load per replica, unless
///   it has one for every rank.
/// - *Packing*: replicas in order of falling load, each to the rank with the least load that has a slot left.
/// - *Hierarchical*: whole groups are packed onto nodes, and the two steps above are taken inside every node.
///
/// Inside a rank, experts keep the slots that they have. All ties go to the lower id, so equal demands give equal
/// tables on every rank.
///
/// ```
/// use router::eplb::{Demand, Strategy, propose};
///
/// let proposal = propose(&Demand {
///     load: &[10, 10, 10, 90],
///     ranks: 2,
///     slots_per_rank: 3,
///     nodes: 1,
///     groups: 1,
///     strategy: Strategy::Auto,
///     current: None,
/// })?;
/// // Expert 3 is on both ranks now, and one of the others is, too.
/// assert_eq!(proposal.table.physical_to_logical(), [0, 1, 3, 3, 0, 2]);
/// assert_eq!((proposal.before.max(), proposal.after.max()), (100.0, 60.0));
/// # Ok::<(), router::eplb::ProposalError>(())
/// ```
///
/// # Errors
/// [`ProposalError`].
pub fn propose(demand: &Demand<'_>) -> Result<Proposal, ProposalError> {
    let Demand { load, ranks, slots_per_rank, nodes, groups, strategy, .. } = *demand;
    let experts = load.len();
    let slots = slots(demand)?;
    let identity = ReplicaTable::identity(experts, slots - experts)?;
    let current = demand.current.unwrap_or(&identity);
    let (found, wanted) = ([current.num_logical(), current.num_physical()], [experts, slots]);
    if found != wanted {
        return Err(ProposalError::Current { found, wanted });
    }
    let placement = ExpertPlacement::linear(slots, ranks)?;

    let (by_node, fallback) = match (strategy, nodes) {
        (Strategy::Greedy, _) | (Strategy::Auto, 1) => (None, Vec::new()),
        _ => match misfits(demand) {
            fallback if fallback.is_empty() => (Some(pack::onto_nodes(load, groups, nodes)), fallback),
            fallback => (None, fallback),
        },
    };
    let method = if by_node.is_some() { Method::Hierarchical } else { Method::Greedy };
    let is_allowed = |table: &ReplicaTable| by_node.is_none() || groups_stay(table, groups, nodes);
    let everywhere = || vec![(0..experts as u32).collect::<Vec<_>>()];
    let by_node = by_node.clone().unwrap_or_else(everywhere);
    let cluster = Cluster { ranks: ranks / by_node.len(), slots_per_rank };
    let on_ranks = by_node.iter().flat_map(|experts| cluster.fill(load, experts)).collect::<Vec<_>>();
    let in_order = identity.physical_to_logical().chunks_exact(slots_per_rank).map(<[u32]>::to_vec).collect();
    let packed = ReplicaTable::new(experts, pack::keep_slots(current, on_ranks))?;
    let identity = ReplicaTable::new(experts, pack::keep_slots(current, in_order))?;

    let before = Balance::predicted(load, current, &placement);
    let mut best: Option<(Method, &ReplicaTable, Balance)> = None;
    for (method, table) in [(Method::Kept, current), (method, &packed), (Method::Identity, &identity)] {
        if !is_allowed(table) {
            continue;
        }
        let balance = Balance::predicted(load, table, &placement);
        let gains = |best: &Balance| balance.max() < best.max() * (1.0 - LEAST_GAIN);
        if best.as_ref().is_none_or(|(.., best)| gains(best)) {
            best = Some((method, table, balance));
        }
    }
    // There is always the packed table.
    let (method, table, after) = best.unwrap_or((method, &packed, before.clone()));
    Ok(Proposal { table: table.clone(), method, fallback, before, after })
}

/// Slots over all ranks, if there are enough and they can be named.
fn slots(demand: &Demand<'_>) -> Result<usize, ProposalError> {
    let &Demand { load, ranks, slots_per_rank, nodes, groups, .. } = demand;
    let experts = load.len();
    for (what, value) in [
        ("the number of experts", experts),
        ("the number of ranks", ranks),
        ("the number of slots per rank", slots_per_rank),
        ("the number of nodes", nodes),
        ("the number of groups", groups),
    ] {
        if value == 0 {
            return Err(ProposalError::Zero { what });
        }
    }
    let slots = ranks.checked_mul(slots_per_rank).filter(|&slots| i32::try_from(slots).is_ok());
    let slots = slots.ok_or(TableError::TooManySlots { slots: ranks.saturating_mul(slots_per_rank) })?;
    if slots < experts {
        return Err(ProposalError::TooFewSlots { experts, ranks, slots_per_rank });
    }
    Ok(slots)
}

/// What is in the way of a hierarchical placement.
fn misfits(demand: &Demand<'_>) -> Vec<Fallback> {
    let &Demand { load, ranks, nodes, groups, .. } = demand;
    let experts = load.len();
    let mut why = Vec::new();
    if !groups.is_multiple_of(nodes) {
        why.push(Fallback::Groups { groups, nodes });
    }
    if !experts.is_multiple_of(groups) {
        why.push(Fallback::Experts { experts, groups });
    }
    if !ranks.is_multiple_of(nodes) {
        why.push(Fallback::Ranks { ranks, nodes });
    }
    why
}

/// Whether all replicas of every group are on one node.
fn groups_stay(table: &ReplicaTable, groups: usize, nodes: usize) -> bool {
    let (per_group, per_node) = (table.num_logical() / groups, table.num_physical() / nodes);
    let mut node_of_group = vec![None; groups];
    table.physical_to_logical().iter().enumerate().all(|(slot, &expert)| {
        let node = slot / per_node;
        *node_of_group[expert as usize / per_group].get_or_insert(node) == node
    })
}
