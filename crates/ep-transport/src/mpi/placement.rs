//! Which ranks of a job make a group, in which order.

/// The ranks of the job that make a group of `ranks` on nodes of `ranks_per_node`, in the group's order: node by node.
///
/// `hosts` has the ranks that run on each machine. A node lies within one machine, and the nodes of a group that is
/// smaller than the job are spread over as many machines as there are. `None` if there are not enough ranks together.
pub(super) fn place(hosts: &[Vec<usize>], ranks: usize, ranks_per_node: usize) -> Option<Vec<usize>> {
    if ranks == 0 || ranks_per_node == 0 || !ranks.is_multiple_of(ranks_per_node) {
        return None;
    }
    let room: Vec<usize> = hosts.iter().map(|host| host.len() / ranks_per_node).collect();
    let mut nodes = vec![0; hosts.len()];
    for _ in 0..ranks / ranks_per_node {
        let with_room = (0..hosts.len()).filter(|&host| nodes[host] < room[host]);
        let emptiest = with_room.min_by_key(|&host| nodes[host])?;
        nodes[emptiest] += 1;
    }
    let chosen = hosts.iter().zip(&nodes).flat_map(|(host, &nodes)| &host[..nodes * ranks_per_node]);
    Some(chosen.copied().collect())
}

/// Ranks on each machine, if it is the same everywhere.
pub(super) fn even(hosts: &[Vec<usize>]) -> Option<usize> {
    let first = hosts.first()?.len();
    hosts.iter().all(|host| host.len() == first).then_some(first)
}

/// The ranks on each machine, in the order of the first of them, from the machine's first rank for every rank.
pub(super) fn hosts(firsts: &[usize]) -> Vec<Vec<usize>> {
    let mut hosts: Vec<(usize, Vec<usize>)> = Vec::new();
    for (rank, &first) in firsts.iter().enumerate() {
        match hosts.iter_mut().find(|(of, _)| *of == first) {
            Some((_, ranks)) => ranks.push(rank),
            None => hosts.push((first, vec![rank])),
        }
    }
    hosts.into_iter().map(|(_, ranks)| ranks).collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::one_machine(&[0, 0, 0, 0], 4, 4, Some(vec![0, 1, 2, 3]))]
    #[case::simulated_nodes(&[0, 0, 0, 0], 4, 2, Some(vec![0, 1, 2, 3]))]
    #[case::part_of_a_machine(&[0, 0, 0, 0], 2, 1, Some(vec![0, 1]))]
    #[case::dealt_in_turn(&[0, 1, 0, 1], 4, 2, Some(vec![0, 2, 1, 3]))]
    #[case::one_node_of_two(&[0, 1, 0, 1], 2, 2, Some(vec![0, 2]))]
    #[case::spread(&[0, 0, 2, 2], 2, 1, Some(vec![0, 2]))]
    #[case::two_nodes_on_one(&[0, 0, 0, 0, 4, 4], 6, 2, Some(vec![0, 1, 2, 3, 4, 5]))]
    #[case::no_machine_has_three(&[0, 1, 0, 1], 3, 3, None)]
    #[case::too_few(&[0, 0], 3, 1, None)]
    #[case::a_remainder(&[0, 0, 0], 3, 2, None)]
    #[case::nothing(&[0], 0, 1, None)]
    fn nodes_lie_within_machines(
        #[case] firsts: &[usize],
        #[case] ranks: usize,
        #[case] ranks_per_node: usize,
        #[case] want: Option<Vec<usize>>,
    ) {
        assert_eq!(place(&hosts(firsts), ranks, ranks_per_node), want);
    }

    #[test]
    fn machines_may_differ() {
        assert_eq!(even(&hosts(&[0, 1, 0, 1])), Some(2));
        assert_eq!(even(&hosts(&[0, 1, 0])), None);
        assert_eq!(even(&[]), None);
    }
}
