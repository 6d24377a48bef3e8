//! Random tokens and their routing.

use fused_moe_core::{ExpertPlacement, NO_EXPERT, Rank};
use half::bf16;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_pcg::Pcg64Mcg;

use super::{Case, RoutingPattern};
use crate::oracle::RankTokens;
use crate::seed::normal;

/// What one rank brings to one round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankInput {
    /// Number of tokens.
    pub num_tokens: usize,
    /// `[num_tokens, hidden]`.
    pub hidden: Vec<bf16>,
    /// `[num_tokens, top_k]` global expert ids, -1 for no expert.
    pub ids: Vec<i32>,
    /// `[num_tokens, top_k]`; slots without an expert have a weight, too, which nobody may use.
    pub weights: Vec<f32>,
    /// `[num_tokens, num_experts]` for monolithic layers.
    pub logits: Vec<f32>,
}

impl RankInput {
    /// Random tokens of `rank` under `case`.
    pub(super) fn random(case: &Case, placement: &ExpertPlacement, rank: Rank, rng: &mut Pcg64Mcg) -> Self {
        let num_tokens = case.tokens[rank.index()];
        let mut input = Self { num_tokens, ..Self::default() };
        // Channels that are far larger than the others are what makes activations hard to quantise.
        let outlier = rng.random_range(0..case.hidden);
        let rank_scale = [1.0, 4.0, 0.25][rank.index() % 3];
        let same_for_all = distinct(case.num_experts, case.top_k, rng);
        for _ in 0..num_tokens {
            let token_scale = rank_scale * 2f32.powf(rng.random_range(-1.0..1.0));
            let row = (0..case.hidden).map(|channel| {
                let factor = if channel % 61 == outlier % 61 { 12.0 } else { 1.0 };
                bf16::from_f32(factor * token_scale * normal(rng))
            });
            input.hidden.extend(row);
            let padding = input.hidden.len() - case.padding.hidden..;
            input.hidden[padding].fill(bf16::ZERO);
            input.ids.extend(case.routing.ids(case, placement, rank, &same_for_all, rng));
            let weights: Vec<f32> = (0..case.top_k).map(|_| rng.random_range(0.05f32..1.0)).collect();
            let sum: f32 = weights.iter().sum();
            input.weights.extend(weights.iter().map(|w| w / sum * 1.3));
            input.logits.extend(logits(case, &same_for_all, rng));
        }
        input
    }

    /// As the oracle takes it.
    pub fn tokens(&self) -> RankTokens<'_> {
        RankTokens { hidden: &self.hidden, ids: &self.ids, weights: &self.weights }
    }
}

fn distinct(num_experts: usize, count: usize, rng: &mut Pcg64Mcg) -> Vec<i32> {
    let mut ids: Vec<i32> = (0..num_experts as i32).collect();
    ids.shuffle(rng);
    ids.truncate(count);
    ids
}

fn logits(case: &Case, same_for_all: &[i32], rng: &mut Pcg64Mcg) -> Vec<f32> {
    let mut logits: Vec<f32> = (0..case.num_experts).map(|_| normal(rng)).collect();
    match case.routing {
        RoutingPattern::SameExperts => same_for_all.iter().for_each(|&id| logits[id as usize] += 20.0),
        RoutingPattern::Skewed => {
            logits.iter_mut().enumerate().for_each(|(id, logit)| *logit -= 0.4 * id as f32);
        }
        _ => {}
    }
    logits
}

impl RoutingPattern {
    /// The experts of one token of `rank`.
    fn ids(
        self,
        case: &Case,
        placement: &ExpertPlacement,
        rank: Rank,
        same_for_all: &[i32],
        rng: &mut Pcg64Mcg,
    ) -> Vec<i32> {
        let mut ids = match self {
            RoutingPattern::Uniform => distinct(case.num_experts, case.top_k, rng),
            RoutingPattern::SameExperts => same_for_all.to_vec(),
            RoutingPattern::Skewed => {
                // Keys u^(n), larger for low ids: most tokens want the first experts.
                let mut keyed: Vec<(f32, i32)> =
                    (0..case.num_experts as i32).map(|id| (rng.random::<f32>().powi(1 + id), id)).collect();
                keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
                keyed.iter().take(case.top_k).map(|&(_, id)| id).collect()
            }
            RoutingPattern::RemoteOnly | RoutingPattern::LocalOnly => {
                let wants_local = self == RoutingPattern::LocalOnly;
                let mut ids = distinct(case.num_experts, case.num_experts, rng);
                ids.retain(|&id| (placement.rank_of_slot(id) == Some(rank)) == wants_local);
                ids
            }
            RoutingPattern::Padded => {
                let all = rng.random_bool(0.2);
                let mut ids = distinct(case.num_experts, case.top_k, rng);
                ids.iter_mut().for_each(|id| {
                    if all || rng.random_bool(0.3) {
                        *id = NO_EXPERT;
                    }
                });
                ids
            }
        };
        ids.resize(case.top_k, NO_EXPERT);
        ids.shuffle(rng);
        ids
    }
}
