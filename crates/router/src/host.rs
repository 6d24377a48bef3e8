//! All routing methods on the host.

use fused_moe_core::{
    Error, ErrorKind, ExecCx, ExpertGroups, Fault, Result, Router, RoutingConfig, RoutingMethod, Stage,
    TensorView, TopKMut,
};
use smallvec::{SmallVec, smallvec};

use crate::best::Best;
use crate::config::{RoutingError, check};

/// Experts, and groups of experts, up to which a call keeps its temporaries on the stack.
const INLINE: usize = 1024;

/// Added to the sum that DeepSeek's weights are divided by, as their models do.
const DEEPSEEK_EPSILON: f32 = 1e-20;

/// Stage 1 on the host for every [`RoutingMethod`].
///
/// Arithmetic is f32. Softmax methods choose by the logits themselves, which order as the probabilities do but
/// do not underflow; ties go to the lower id. A row whose logits are all −inf gets the lowest admissible ids with
/// weight 0. One call works on one thread and allocates nothing for up to 1024 experts.
#[derive(Clone, Debug)]
pub struct HostRouter {
    config: RoutingConfig,
}

impl HostRouter {
    /// A router for `config`.
    ///
    /// `groups` may be `None` for [`RoutingMethod::DeepSeekV3`] (one group) and must be for the methods without
    /// groups; a missing `correction_bias` is zero. `renormalize` acts on the two DeepSeek methods only.
    ///
    /// # Errors
    /// [`RoutingError`] for sizes that contradict each other and for values that are not finite.
    pub fn new(config: RoutingConfig) -> Result<Self, RoutingError> {
        check(&config)?;
        Ok(Self { config })
    }

    fn groups(&self) -> ExpertGroups {
        self.config.groups.unwrap_or(ExpertGroups { n_group: 1, topk_group: 1 })
    }

    /// Writes the experts of one row of logits, none of which is NaN or +inf.
    fn route_row(&self, logits: &[f32], ids: &mut [i32], weights: &mut [f32]) {
        match self.config.method {
            RoutingMethod::GroupLimitedSoftmax => {
                best_in_groups(logits, self.groups(), max_score, Best::new(ids, weights));
                softmax_at(logits, ids, weights);
                if self.config.renormalize {
                    divide_by_sum(weights, DEEPSEEK_EPSILON);
                }
            }
            RoutingMethod::DeepSeekV3 => {
                let mut choice: SmallVec<[f32; INLINE]> = logits.iter().copied().map(sigmoid).collect();
                if let Some(bias) = &self.config.correction_bias {
                    choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
                }
                best_in_groups(&choice, self.groups(), best_two_score, Best::new(ids, weights));
                // The bias only chooses: the weights are the scores without it.
                for (weight, &id) in weights.iter_mut().zip(ids.iter()) {
                    *weight = sigmoid(logits[id as usize]);
                }
                if self.config.renormalize {
                    divide_by_sum(weights, DEEPSEEK_EPSILON);
                }
            }
            // `check` lets no other method through than the three softmax ones that are left.
            method => {
                let mut best = Best::new(ids, weights);
                for (id, &logit) in logits.iter().enumerate() {
                    best.offer(id, logit);
                }
                if method == RoutingMethod::Renormalize {
                    softmax(weights);
                } else {
                    softmax_at(logits, ids, weights);
                }
                if method == RoutingMethod::RenormalizeNaive {
                    divide_by_sum(weights, 0.0);
                }
            }
        }
        let factor = self.config.routed_scaling_factor;
        if factor != 1.0 {
            weights.iter_mut().for_each(|w| *w *= factor);
        }
    }

    fn contract(&self, why: String) -> Error {
        Error::contract(Stage::Router, self.name(), why)
    }
}

impl Router for HostRouter {
    fn name(&self) -> &'static str {
        "host"
    }

    fn config(&self) -> &RoutingConfig {
        &self.config
    }

    /// As the trait says; `logits` are on the host, their rows contiguous. +inf is refused like NaN, since it has
    /// no softmax. All logits are checked before anything is written, so `out` is untouched after an error.
    fn route(&self, _cx: &mut ExecCx<'_>, logits: TensorView<'_>, mut out: TopKMut<'_>) -> Result<()> {
        let view = |e| Error::contract(Stage::Router, self.name(), e);
        let &[tokens, experts] = logits.dims() else {
            return Err(self.contract(format!("logits {:?} are not [tokens, num_experts]", logits.dims())));
        };
        if experts != self.config.num_experts {
            let wanted = self.config.num_experts;
            return Err(self.contract(format!("logits are of {experts} experts, the router of {wanted}")));
        }
        for (what, dims) in [("ids", out.ids.dims()), ("weights", out.weights.dims())] {
            if dims != [tokens, self.config.top_k] {
                let wanted = [tokens, self.config.top_k];
                return Err(self.contract(format!("top-k {what} are {dims:?}, wanted {wanted:?}")));
            }
        }
        for token in 0..tokens {
            let row = logits.row::<f32>(token).map_err(view)?;
            if let Some(expert) = row.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
                let fault = Fault::NonFiniteLogit { token: token as u32, expert: expert as u32 };
                let why = format!("logit of token {token} for expert {expert} is {}", row[expert]);
                return Err(Error::new(ErrorKind::BadInput(fault), Stage::Router, self.name()).caused_by(why));
            }
            if token == 0 {
                // The output views are asked once before the first row is written.
                out.ids.row_mut::<i32>(0).map_err(view)?;
                out.weights.row_mut::<f32>(0).map_err(view)?;
            }
        }
        for token in 0..tokens {
            let row = logits.row::<f32>(token).map_err(view)?;
            let ids = out.ids.row_mut::<i32>(token).map_err(view)?;
            let weights = out.weights.row_mut::<f32>(token).map_err(view)?;
            self.route_row(row, ids, weights);
        }
        Ok(())
    }
}

/// 1 / (1 + e⁻ˣ), which is 0 for −inf.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Offers `best` the experts of the `topk_group` best groups. The experts of the others are out, whatever their
/// scores: masking with 0 instead would let them win over negative biased scores.
fn best_in_groups(
    scores: &[f32],
    groups: ExpertGroups,
    group_score: impl Fn(&[f32]) -> f32,
    mut best: Best<'_>,
) {
    let size = scores.len() / groups.n_group;
    let mut kept: SmallVec<[i32; INLINE]> = smallvec![0; groups.topk_group];
    let mut kept_scores: SmallVec<[f32; INLINE]> = smallvec![0.0; groups.topk_group];
    let mut best_groups = Best::new(&mut kept, &mut kept_scores);
    for (group, members) in scores.chunks_exact(size).enumerate() {
        best_groups.offer(group, group_score(members));
    }
    kept.sort_unstable();
    for &group in &kept {
        let first = group as usize * size;
        for (offset, &score) in scores[first..first + size].iter().enumerate() {
            best.offer(first + offset, score);
        }
    }
}

/// Score of a group in DeepSeek-V2: its best member.
fn max_score(members: &[f32]) -> f32 {
    members.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Score of a group in DeepSeek-V3: the sum of its best two members (of its only one in groups of one).
fn best_two_score(members: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &score in members {
        if score > first {
            (first, second) = (score, first);
        } else if score > second {
            second = score;
        }
    }
    if members.len() == 1 { first } else { first + second }
}

/// Writes the softmax of `logits` at `ids` to `weights`.
fn softmax_at(logits: &[f32], ids: &[i32], weights: &mut [f32]) {
    let max = max_score(logits);
    let sum: f32 = if max.is_finite() { logits.iter().map(|l| (l - max).exp()).sum() } else { 0.0 };
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = if sum > 0.0 { (logits[id as usize] - max).exp() / sum } else { 0.0 };
    }
}

/// Softmax of `weights` in place.
fn softmax(weights: &mut [f32]) {
    let max = max_score(weights);
    if max.is_finite() {
        weights.iter_mut().for_each(|w| *w = (*w - max).exp());
        divide_by_sum(weights, 0.0);
    } else {
        weights.fill(0.0);
    }
}

/// Divides `weights` by their sum + `epsilon`; a sum of zero leaves them zero.
fn divide_by_sum(weights: &mut [f32], epsilon: f32) {
    let sum = weights.iter().sum::<f32>() + epsilon;
    if sum > 0.0 {
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}
