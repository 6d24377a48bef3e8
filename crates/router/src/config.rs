//! Which routing configurations make sense.

use fused_moe_core::{RoutingConfig, RoutingMethod};

use crate::recipe::{Grouping, Recipe};

/// Why a [`RoutingConfig`] is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RoutingError {
    /// A method that this router does not have.
    #[error("routing method {method} is not supported by the host router")]
    UnsupportedMethod {
        /// The method.
        method: RoutingMethod,
    },
    /// No experts to choose from, or more than an i32 id can name.
    #[error("num_experts {num_experts} is not in 1..={}", i32::MAX)]
    NumExperts {
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// A token cannot have so many experts.
    #[error("top_k {top_k} is not in 1..={num_experts} (num_experts)")]
    TopK {
        /// Experts per token.
        top_k: usize,
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// A group-limited method without groups.
    #[error("routing method {method} needs n_group and topk_group")]
    MissingGroups {
        /// The method.
        method: RoutingMethod,
    },
    /// Groups given to a method that has none.
    #[error("routing method {method} has no expert groups, n_group is {n_group}")]
    UnusedGroups {
        /// The method.
        method: RoutingMethod,
        /// Number of groups.
        n_group: usize,
    },
    /// The experts do not divide into the groups.
    #[error("num_experts {num_experts} does not divide into n_group {n_group} groups")]
    UnevenGroups {
        /// Experts over all ranks.
        num_experts: usize,
        /// Number of groups.
        n_group: usize,
    },
    /// More groups to keep than there are.
    #[error("topk_group {topk_group} is not in 1..={n_group} (n_group)")]
    TopkGroup {
        /// Groups that may be chosen from.
        topk_group: usize,
        /// Number of groups.
        n_group: usize,
    },
    /// The groups that are kept hold fewer experts than a token needs.
    #[error(
        "top_k {top_k} exceeds the {available} experts of topk_group {topk_group} groups of {group_size}",
        available = topk_group * group_size
    )]
    TopKExceedsGroups {
        /// Experts per token.
        top_k: usize,
        /// Groups that may be chosen from.
        topk_group: usize,
        /// Experts per group.
        group_size: usize,
    },
    /// A correction bias given to a method that has none.
    #[error("routing method {method} has no correction bias")]
    UnusedBias {
        /// The method.
        method: RoutingMethod,
    },
    /// A correction bias of the wrong length.
    #[error("correction bias has {len} elements, wanted {num_experts} (num_experts)")]
    BiasLength {
        /// Elements of the bias.
        len: usize,
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// A correction bias that is NaN or infinite.
    #[error("correction bias of expert {expert} is {value}")]
    NonFiniteBias {
        /// The expert.
        expert: usize,
        /// Its bias.
        value: f32,
    },
    /// A method that chooses one expert asked for more.
    #[error("routing method {method} chooses one expert, top_k is {top_k}")]
    NotTop1 {
        /// The method.
        method: RoutingMethod,
        /// Experts per token.
        top_k: usize,
    },
    /// A hash table of no rows, or whose last row is not whole.
    #[error("hash table has {len} ids, wanted rows of {top_k}")]
    HashTableLength {
        /// Ids of the table.
        len: usize,
        /// Ids of a row.
        top_k: usize,
    },
    /// A hash table for another number of experts per token.
    #[error("hash table has rows of {table} ids, wanted top_k {top_k}")]
    HashTableTopK {
        /// Ids of a row of the table.
        table: usize,
        /// Experts per token.
        top_k: usize,
    },
    /// A row of a hash table that names an expert twice or one that does not exist.
    #[error("row {row} of the hash table has id {id}, wanted distinct ids in 0..{num_experts}")]
    HashTableRow {
        /// The row, which is the id of the token.
        row: usize,
        /// The first id that does not fit.
        id: i32,
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// Groups or a bias beside a hash table.
    #[error("routing method {method} has groups or a correction bias to choose by, and a hash table")]
    HashTableChooses {
        /// The method.
        method: RoutingMethod,
    },
    /// A weight of shared slots that is NaN or infinite.
    #[error("weight of the shared slots is {weight}")]
    NonFiniteSharedWeight {
        /// The weight.
        weight: f32,
    },
    /// More zero-experts than leave an expert.
    #[error("{count} zero-experts of num_experts {num_experts} leave no expert")]
    ZeroExperts {
        /// Zero-experts.
        count: usize,
        /// All experts with a logit.
        num_experts: usize,
    },
    /// A scaling factor that is NaN or infinite.
    #[error("routed_scaling_factor is {factor}")]
    NonFiniteFactor {
        /// The factor.
        factor: f32,
    },
}

/// Checks `config`, all of which a [`HostRouter`](crate::HostRouter) relies on, and looks up its method.
pub(crate) fn check(config: &RoutingConfig) -> Result<Recipe, RoutingError> {
    let &RoutingConfig { method, num_experts, top_k, .. } = config;
    if num_experts == 0 || i32::try_from(num_experts).is_err() {
        return Err(RoutingError::NumExperts { num_experts });
    }
    if top_k == 0 || top_k > num_experts {
        return Err(RoutingError::TopK { top_k, num_experts });
    }
    if method == RoutingMethod::Llama4 && top_k != 1 {
        return Err(RoutingError::NotTop1 { method, top_k });
    }
    let recipe = Recipe::of(method).ok_or(RoutingError::UnsupportedMethod { method })?;
    match config.groups {
        None if recipe.grouping == Grouping::Max => return Err(RoutingError::MissingGroups { method }),
        None => {}
        Some(groups) if recipe.grouping == Grouping::None => {
            return Err(RoutingError::UnusedGroups { method, n_group: groups.n_group });
        }
        Some(groups) => {
            let (n_group, topk_group) = (groups.n_group, groups.topk_group);
            if n_group == 0 || num_experts % n_group != 0 {
                return Err(RoutingError::UnevenGroups { num_experts, n_group });
            }
            if topk_group == 0 || topk_group > n_group {
                return Err(RoutingError::TopkGroup { topk_group, n_group });
            }
            let group_size = num_experts / n_group;
            if top_k > topk_group * group_size {
                return Err(RoutingError::TopKExceedsGroups { top_k, topk_group, group_size });
            }
        }
    }
    if let Some(bias) = &config.correction_bias {
        if !recipe.biased {
            return Err(RoutingError::UnusedBias { method });
        }
        if bias.len() != num_experts {
            return Err(RoutingError::BiasLength { len: bias.len(), num_experts });
        }
        if let Some(expert) = bias.iter().position(|b| !b.is_finite()) {
            return Err(RoutingError::NonFiniteBias { expert, value: bias[expert] });
        }
    }
    if !config.routed_scaling_factor.is_finite() {
        return Err(RoutingError::NonFiniteFactor { factor: config.routed_scaling_factor });
    }
    Ok(recipe)
}

#[cfg(test)]
mod tests {
    use fused_moe_core::ExpertGroups;
    use rstest::rstest;

    use super::*;

    fn config(method: RoutingMethod) -> RoutingConfig {
        RoutingConfig {
            method,
            num_experts: 8,
            top_k: 2,
            groups: None,
            renormalize: false,
            routed_scaling_factor: 1.0,
            correction_bias: None,
        }
    }

    fn grouped(n_group: usize, topk_group: usize) -> RoutingConfig {
        let groups = Some(ExpertGroups { n_group, topk_group });
        RoutingConfig { groups, ..config(RoutingMethod::GroupLimitedSoftmax) }
    }

    fn biased(bias: Vec<f32>) -> RoutingConfig {
        RoutingConfig { correction_bias: Some(bias), ..config(RoutingMethod::DeepSeekV3) }
    }

    #[rstest]
    #[case(config(RoutingMethod::Default))]
    #[case(config(RoutingMethod::DeepSeekV3))]
    #[case(RoutingConfig { top_k: 8, ..config(RoutingMethod::Renormalize) })]
    #[case(RoutingConfig { top_k: 1, ..config(RoutingMethod::Llama4) })]
    #[case(RoutingConfig { method: RoutingMethod::SqrtSoftplus, ..biased(vec![-1.0; 8]) })]
    #[case(RoutingConfig { correction_bias: Some(vec![-1.0; 8]), ..grouped(4, 1) })]
    #[case(grouped(4, 1))]
    #[case(grouped(8, 8))]
    #[case(biased(vec![-1.0; 8]))]
    fn accepted(#[case] config: RoutingConfig) {
        assert_eq!(check(&config).err(), None);
    }

    #[rstest]
    #[case(RoutingConfig { num_experts: 0, ..config(RoutingMethod::Default) }, "num_experts 0 is not in 1..=2147483647")]
    #[case(RoutingConfig { top_k: 0, ..config(RoutingMethod::Default) }, "top_k 0 is not in 1..=8 (num_experts)")]
    #[case(RoutingConfig { top_k: 9, ..config(RoutingMethod::Default) }, "top_k 9 is not in 1..=8 (num_experts)")]
    #[case(
        config(RoutingMethod::GroupLimitedSoftmax),
        "routing method group-limited-softmax needs n_group and topk_group"
    )]
    #[case(
        RoutingConfig { method: RoutingMethod::Default, ..grouped(4, 2) },
        "routing method softmax has no expert groups, n_group is 4"
    )]
    #[case(config(RoutingMethod::Llama4), "routing method llama4 chooses one expert, top_k is 2")]
    #[case(
        RoutingConfig { method: RoutingMethod::GroupLimitedSigmoid, ..biased(vec![0.0; 8]) },
        "routing method group-limited-sigmoid needs n_group and topk_group"
    )]
    #[case(grouped(3, 1), "num_experts 8 does not divide into n_group 3 groups")]
    #[case(grouped(0, 1), "num_experts 8 does not divide into n_group 0 groups")]
    #[case(grouped(4, 0), "topk_group 0 is not in 1..=4 (n_group)")]
    #[case(grouped(4, 5), "topk_group 5 is not in 1..=4 (n_group)")]
    #[case(grouped(8, 1), "top_k 2 exceeds the 1 experts of topk_group 1 groups of 1")]
    #[case(
        RoutingConfig { method: RoutingMethod::Default, ..biased(vec![0.0; 8]) },
        "routing method softmax has no correction bias"
    )]
    #[case(biased(vec![0.0; 7]), "correction bias has 7 elements, wanted 8 (num_experts)")]
    #[case(biased([[0.0; 7].as_slice(), &[f32::INFINITY]].concat()), "correction bias of expert 7 is inf")]
    #[case(
        RoutingConfig { routed_scaling_factor: f32::NAN, ..config(RoutingMethod::Default) },
        "routed_scaling_factor is NaN"
    )]
    fn refused(#[case] config: RoutingConfig, #[case] message: &str) {
        assert_eq!(check(&config).map_err(|e| e.to_string()).err(), Some(message.to_owned()));
    }
}
