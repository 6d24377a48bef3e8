//! What the routing methods mean, in f64; shares nothing with the router but the configuration.

use fused_moe_core::{RoutingConfig, RoutingMethod};

/// Added to the sums that weights are divided by, where the formula says so.
const EPSILON: f64 = 1e-20;

/// One row of logits, none of which is NaN or +inf.
pub struct Reference<'a> {
    config: &'a RoutingConfig,
    logits: &'a [f32],
    scores: Vec<f64>,
}

fn sigmoid(l: f64) -> f64 {
    1.0 / (1.0 + (-l).exp())
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return vec![0.0; logits.len()];
    }
    let total: f64 = logits.iter().map(|l| (l - max).exp()).sum();
    logits.iter().map(|l| (l - max).exp() / total).collect()
}

/// Best first, ties to the lower id.
fn order(scores: &[f64]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    ids.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).expect("no score is NaN").then(a.cmp(&b)));
    ids
}

fn scores(method: RoutingMethod, logits: &[f64]) -> Vec<f64> {
    let each = |f: fn(f64) -> f64| logits.iter().map(|&l| f(l)).collect();
    match method {
        RoutingMethod::Default
        | RoutingMethod::RenormalizeNaive
        | RoutingMethod::GroupLimitedSoftmax
        | RoutingMethod::BiasedSoftmax => softmax(logits),
        RoutingMethod::Renormalize => logits.to_vec(),
        RoutingMethod::TopK => each(|l| if l.is_finite() { l } else { 0.0 }),
        // The maximum keeps ln(1 + eˡ) of large l from overflowing and is exact.
        RoutingMethod::SqrtSoftplus => each(|l| (l.max(0.0) + (-l.abs()).exp().ln_1p()).sqrt()),
        _ => each(sigmoid),
    }
}

impl<'a> Reference<'a> {
    pub fn new(config: &'a RoutingConfig, logits: &'a [f32]) -> Self {
        let wide: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        Self { config, logits, scores: scores(config.method, &wide) }
    }

    /// The groups that are kept, by `group_score` of their members.
    fn kept_groups(&self, choice: &[f64], members: usize) -> Vec<bool> {
        let groups = self.config.groups.map_or((1, 1), |g| (g.n_group, g.topk_group));
        let sum = |group: &[f64]| order(group).into_iter().take(members).map(|at| group[at]).sum();
        let scores: Vec<f64> = choice.chunks(choice.len() / groups.0).map(sum).collect();
        let mut kept = vec![false; groups.0];
        order(&scores)[..groups.1].iter().for_each(|&group| kept[group] = true);
        kept
    }

    /// The experts where they follow from comparing logits, which any arithmetic does alike; `None` where scores
    /// are added up or a bias is.
    pub fn exact_choice(&self) -> Option<Vec<i32>> {
        let config = self.config;
        if config.correction_bias.is_some() || config.method == RoutingMethod::DeepSeekV3 {
            return None;
        }
        let logits: Vec<f64> = self.logits.iter().map(|&l| f64::from(l)).collect();
        let kept = self.kept_groups(&logits, 1);
        let size = logits.len() / kept.len();
        let admissible = order(&logits).into_iter().filter(|id| kept[id / size]);
        Some(admissible.take(config.top_k).map(|id| id as i32).collect())
    }

    /// Panics if `chosen` are not the best experts, best first, up to what f32 cannot tell apart.
    pub fn check_choice(&self, chosen: &[i32]) {
        if let Some(exact) = self.exact_choice() {
            return assert_eq!(chosen, exact);
        }
        let bias = self.config.correction_bias.as_deref();
        let biased = |id: usize| self.scores[id] + bias.map_or(0.0, |bias| f64::from(bias[id]));
        let choice: Vec<f64> = (0..self.scores.len()).map(biased).collect();
        // The sum of two scores of a group may leave f32; then groups tie that do not in f64.
        let largest = choice.iter().fold(1.0, |max: f64, c| max.max(c.abs()));
        if largest > 1e38 {
            return;
        }
        let slack = 1e-5 * largest;
        let kept = self.kept_groups(&choice, 2);
        let size = choice.len() / kept.len();
        if kept.iter().any(|kept| !kept) && !self.groups_are_clear(&choice, size, slack) {
            return;
        }
        let score = |id: i32| choice[id as usize];
        assert!(chosen.windows(2).all(|w| score(w[0]) >= score(w[1]) - slack), "not best first: {chosen:?}");
        assert!(chosen.iter().all(|&id| kept[id as usize / size]), "{chosen:?} with groups {kept:?}");
        let worst = chosen.iter().map(|&id| score(id)).fold(f64::INFINITY, f64::min);
        for (id, &c) in choice.iter().enumerate().filter(|(id, _)| kept[id / size]) {
            assert!(chosen.contains(&(id as i32)) || worst >= c - slack, "{id} was passed over: {chosen:?}");
        }
    }

    /// Whether every kept group is better than every other by more than `slack`.
    fn groups_are_clear(&self, choice: &[f64], size: usize, slack: f64) -> bool {
        let sum = |group: &[f64]| order(group).into_iter().take(2).map(|at| group[at]).sum::<f64>();
        let mut scores: Vec<f64> = choice.chunks(size).map(sum).collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        let last = self.config.groups.map_or(1, |g| g.topk_group);
        scores[last - 1] - scores[last] > 2.0 * slack
    }

    /// The weights of `ids`; `None` where f32 underflows in a sum that is divided by.
    pub fn weights(&self, ids: &[i32]) -> Option<Vec<f64>> {
        let chosen: Vec<f64> = ids.iter().map(|&id| self.scores[id as usize]).collect();
        let sum: f64 = chosen.iter().sum();
        let asked = self.config.renormalize;
        let divisor = match self.config.method {
            RoutingMethod::RenormalizeNaive => sum,
            RoutingMethod::SigmoidRenorm | RoutingMethod::MiniMax2 => sum + EPSILON,
            RoutingMethod::BiasedSoftmax | RoutingMethod::SqrtSoftplus if asked => sum,
            RoutingMethod::GroupLimitedSoftmax
            | RoutingMethod::GroupLimitedSigmoid
            | RoutingMethod::DeepSeekV3
                if asked =>
            {
                sum + EPSILON
            }
            _ => 1.0,
        };
        let weights = match self.config.method {
            RoutingMethod::Renormalize => softmax(&chosen),
            _ => chosen,
        };
        let factor = f64::from(self.config.routed_scaling_factor);
        // What f32 has rounded to few bits, or to zero, a division or a factor may lift to where it shows.
        let tiny = weights.iter().any(|w| *w != 0.0 && w.abs() < 1e-30);
        if tiny && (divisor < 1.0 || factor.abs() > 1.0) {
            return None;
        }
        let divided = weights.iter().map(|w| if divisor == 0.0 { 0.0 } else { w / divisor });
        Some(divided.map(|w| w * factor).collect())
    }
}

/// Whether `got` is `want` up to the rounding of f32, which may be an overflow.
pub fn is_close(got: f32, want: f64) -> bool {
    if want.abs() * 1.0001 > f64::from(f32::MAX) {
        return !got.is_nan();
    }
    got.is_finite() && (f64::from(got) - want).abs() <= 1e-4 * want.abs() + 1e-30
}
