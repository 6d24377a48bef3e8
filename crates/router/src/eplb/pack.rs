//! The steps of a proposal: replicas, packing, and the slots inside a rank.

use super::table::ReplicaTable;

/// The experts of every node: whole groups, packed by the load of the group. `groups` divides the experts, `nodes`
/// the groups.
pub fn onto_nodes(load: &[u64], groups: usize, nodes: usize) -> Vec<Vec<u32>> {
    let per_group = load.len() / groups;
    let of_group = |group: usize| group * per_group..(group + 1) * per_group;
    let items = (0..groups).map(|group| Item {
        load: load[of_group(group)].iter().map(|&load| load as f64).sum(),
        key: group as u32,
    });
    let packed = pack(items.collect(), nodes, groups / nodes);
    let experts = |mut node: Vec<u32>| {
        node.sort_unstable();
        node.iter().flat_map(|&group| of_group(group as usize)).map(|expert| expert as u32).collect()
    };
    packed.into_iter().map(experts).collect()
}

/// Ranks that share some experts.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// How many ranks.
    pub ranks: usize,
    /// Slots of each.
    pub slots_per_rank: usize,
}

impl Cluster {
    /// The experts of every rank when all slots are filled with replicas of `experts`, which are no more than the
    /// slots. `load` is that of all experts.
    pub fn fill(self, load: &[u64], experts: &[u32]) -> Vec<Vec<u32>> {
        let counts = replicas(load, experts, self);
        let items = experts.iter().zip(&counts).flat_map(|(&key, &count)| {
            let share = load[key as usize] as f64 / count as f64;
            std::iter::repeat_n(Item { load: share, key }, count)
        });
        pack(items.collect(), self.ranks, self.slots_per_rank)
    }
}

/// Replicas of each of `experts`: every slot that is left goes to the expert with the most load per replica.
///
/// An expert has no more replicas than there are ranks, since two on one rank share no work; only where all experts
/// have so many do the slots that are left go to the heaviest again.
fn replicas(load: &[u64], experts: &[u32], cluster: Cluster) -> Vec<usize> {
    let Cluster { ranks, slots_per_rank } = cluster;
    let mut counts = vec![1usize; experts.len()];
    for _ in experts.len()..ranks * slots_per_rank {
        let before = |a: usize, b: usize| {
            let load = |at: usize| u128::from(load[experts[at] as usize]);
            let everywhere = |at: usize| counts[at] >= ranks;
            // Falling load / count, compared without rounding; where that is equal, the one with fewer replicas.
            let heavier = (load(b) * counts[a] as u128).cmp(&(load(a) * counts[b] as u128));
            everywhere(a).cmp(&everywhere(b)).then(heavier).then(counts[a].cmp(&counts[b]))
        };
        if let Some(heaviest) = (0..experts.len()).min_by(|&a, &b| before(a, b)) {
            counts[heaviest] += 1;
        }
    }
    counts
}

/// Something that is packed.
#[derive(Clone, Copy, Debug)]
struct Item {
    load: f64,
    /// Items with the same key are replicas of each other.
    key: u32,
}

/// The keys in every bin when each of `bins` bins takes `per_bin` of the items: the heaviest first, each into the
/// lightest bin with room. Among equal bins, one without a replica of the item comes first, then the lower number.
fn pack(mut items: Vec<Item>, bins: usize, per_bin: usize) -> Vec<Vec<u32>> {
    items.sort_by(|a, b| b.load.total_cmp(&a.load).then(a.key.cmp(&b.key)));
    let mut packed = vec![Vec::with_capacity(per_bin); bins];
    let mut loads = vec![0.0f64; bins];
    for item in items {
        let with_room = (0..bins).filter(|&bin| packed[bin].len() < per_bin);
        let lightest = with_room.min_by(|&a, &b| {
            let holds = |bin: usize| packed[bin].contains(&item.key);
            loads[a].total_cmp(&loads[b]).then(holds(a).cmp(&holds(b)))
        });
        if let Some(bin) = lightest {
            packed[bin].push(item.key);
            loads[bin] += item.load;
        }
    }
    packed
}

/// The slots of all ranks for the experts that each is to hold: an expert stays in the slot of its rank that has it in
/// `current`, the others fill the gaps in ascending order.
pub fn keep_slots(current: &ReplicaTable, on_ranks: Vec<Vec<u32>>) -> Vec<u32> {
    let mut slots = Vec::with_capacity(current.num_physical());
    for mut experts in on_ranks {
        experts.sort_unstable();
        let mine = &current.physical_to_logical()[slots.len()..][..experts.len()];
        let kept: Vec<Option<u32>> = mine
            .iter()
            .map(|expert| experts.iter().position(|e| e == expert).map(|at| experts.remove(at)))
            .collect();
        let mut moved = experts.into_iter();
        slots.extend(kept.into_iter().filter_map(|expert| expert.or_else(|| moved.next())));
    }
    slots
}
