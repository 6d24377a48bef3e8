//! How evenly a load lies on the ranks.

use fused_moe_core::ExpertPlacement;

use super::table::ReplicaTable;

/// The load of every rank, in (token, expert) pairs per whatever was recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    per_rank: Vec<f64>,
}

impl Balance {
    /// What the slots of every rank have counted, `[physical]`. Slots outside `placement` do not count.
    pub fn measured(load: &[u64], placement: &ExpertPlacement) -> Self {
        Self::sum(load.iter().map(|&load| load as f64), placement)
    }

    /// What the ranks would have to do if `load`, `[logical]`, came again and every replica of an expert took
    /// the same share of it. An expert without an entry has no load.
    pub fn predicted(load: &[u64], table: &ReplicaTable, placement: &ExpertPlacement) -> Self {
        let share = |&expert: &u32| {
            let expert = expert as usize;
            load.get(expert).map_or(0.0, |&load| load as f64) / table.replicas_of(expert).len() as f64
        };
        Self::sum(table.physical_to_logical().iter().map(share), placement)
    }

    fn sum(load: impl Iterator<Item = f64>, placement: &ExpertPlacement) -> Self {
        let mut per_rank = vec![0.0; placement.ep_size()];
        placement.owners().iter().zip(load).for_each(|(rank, load)| per_rank[rank.index()] += load);
        Self { per_rank }
    }

    /// `[ranks]`.
    pub fn per_rank(&self) -> &[f64] {
        &self.per_rank
    }

    /// The largest load of a rank.
    pub fn max(&self) -> f64 {
        self.per_rank.iter().copied().fold(0.0, f64::max)
    }

    /// The load of a rank if all had the same.
    pub fn mean(&self) -> f64 {
        self.per_rank.iter().sum::<f64>() / self.per_rank.len().max(1) as f64
    }

    /// The largest load over the mean: how much longer the slowest rank takes than it would in perfect balance.
    /// 1 where nothing was counted.
    pub fn max_over_mean(&self) -> f64 {
        let mean = self.mean();
        if mean > 0.0 { self.max() / mean } else { 1.0 }
    }
}
