//! Who is where: ranks on nodes, and the experts' ranks that a token goes to.

use fused_moe_core::{ExpertPlacement, MoeConfig, Rank};

/// The nodes of a group as one rank sees them. Ranks are numbered node by node, all nodes are of one size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Nodes {
    rank: Rank,
    ranks_per_node: usize,
    count: usize,
}

impl Nodes {
    pub fn new(config: &MoeConfig, rank: Rank) -> Self {
        let ranks_per_node = config.ranks_per_node.clamp(1, config.ep_size());
        Self { rank, ranks_per_node, count: config.ep_size() / ranks_per_node }
    }

    /// Nodes in the group.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Ranks on each node.
    pub fn ranks_per_node(&self) -> usize {
        self.ranks_per_node
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// This rank's node.
    pub fn mine(&self) -> usize {
        self.node_of(self.rank)
    }

    pub fn node_of(&self, rank: Rank) -> usize {
        rank.index() / self.ranks_per_node
    }

    /// The place of this rank on its node.
    pub fn place(&self) -> usize {
        self.rank.index() % self.ranks_per_node
    }

    /// The ranks of this node by their places, this one among them.
    pub fn peers(&self) -> impl Iterator<Item = Rank> + use<> {
        let first = self.mine() * self.ranks_per_node;
        (first..first + self.ranks_per_node).map(|rank| Rank(rank as u32))
    }

    /// The other nodes, the next one first: not all ranks start with the same.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (mine, count) = (self.mine(), self.count);
        (1..count).map(move |distance| (mine + distance) % count)
    }

    /// The rank of `node` that stands for this one there: the one in its place.
    pub fn proxy(&self, node: usize) -> Rank {
        Rank((node * self.ranks_per_node + self.place()) as u32)
    }

    /// Which of the `count − 1` windows that a rank of node `at` keeps for the other nodes belongs to node `of`.
    pub fn window(at: usize, of: usize) -> usize {
        of - usize::from(of > at)
    }
}

/// From the ids of a token to the ranks and nodes that it goes to. An id of −1 goes nowhere.
#[derive(Clone, Debug)]
pub(crate) struct Destinations {
    nodes: Nodes,
    placement: ExpertPlacement,
}

impl Destinations {
    pub fn new(config: &MoeConfig, nodes: Nodes) -> Self {
        Self { nodes, placement: config.placement.clone() }
    }

    /// The place on this node of the rank that `slot` names, if no earlier slot names the same: a rank gets one
    /// copy of a token, however many of its experts the token goes to.
    pub fn local(&self, ids: &[i32], slot: usize) -> Option<usize> {
        let rank = self.placement.rank_of_slot(ids[slot])?;
        if self.nodes.node_of(rank) != self.nodes.mine() {
            return None;
        }
        // k is small, so looking back is cheap.
        let named = ids[..slot].iter().any(|&id| self.placement.rank_of_slot(id) == Some(rank));
        (!named).then_some(rank.index() % self.nodes.ranks_per_node())
    }

    /// Whether any slot names a rank of `node`.
    pub fn visits(&self, ids: &[i32], node: usize) -> bool {
        let nodes = ids.iter().filter_map(|&id| self.placement.rank_of_slot(id));
        nodes.into_iter().any(|rank| self.nodes.node_of(rank) == node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(rank: u32) -> Nodes {
        let placement = ExpertPlacement::linear(12, 6).unwrap();
        Nodes::new(&MoeConfig { ranks_per_node: 2, ..MoeConfig::new(placement) }, Rank(rank))
    }

    #[test]
    fn a_rank_and_its_proxies_are_on_one_rail() {
        let nodes = nodes(3);
        assert_eq!((nodes.count(), nodes.mine(), nodes.place()), (3, 1, 1));
        assert_eq!(nodes.peers().collect::<Vec<_>>(), [Rank(2), Rank(3)]);
        assert_eq!(nodes.others().collect::<Vec<_>>(), [2, 0]);
        assert_eq!((nodes.proxy(0), nodes.proxy(2)), (Rank(1), Rank(5)));
    }

    #[test]
    fn every_other_node_has_a_window_of_its_own() {
        for at in 0..4 {
            let windows = (0..4).filter(|&of| of != at).map(|of| Nodes::window(at, of));
            assert_eq!(windows.collect::<Vec<_>>(), [0, 1, 2]);
        }
    }

    #[test]
    fn a_token_goes_once_to_each_rank_and_never_for_padding() {
        let destinations = Destinations::new(
            &MoeConfig { ranks_per_node: 2, ..MoeConfig::new(ExpertPlacement::linear(12, 6).unwrap()) },
            nodes(3),
        );
        // Experts 4 and 5 are on rank 2, expert 7 on rank 3, expert 11 on rank 5.
        let ids = [-1, 5, 11, 4, 7];
        let local: Vec<_> = (0..5).map(|slot| destinations.local(&ids, slot)).collect();
        assert_eq!(local, [None, Some(0), None, None, Some(1)]);
        assert_eq!([0, 1, 2].map(|node| destinations.visits(&ids, node)), [false, true, true]);
        assert!(!destinations.visits(&[-1, -1], 0));
    }
}
