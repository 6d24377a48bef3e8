//! What the routing methods consist of.

use fused_moe_core::{RoutingConfig, RoutingMethod};

use crate::config::{RoutingError, check};

/// Added to the sum that weights are divided by where the models do so.
const EPSILON: f32 = 1e-20;

/// The weight of an expert before any division, as a function of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the chosen experts.
    SoftmaxOfChosen,
    /// 1 / (1 + e⁻ˡ).
    Sigmoid,
    /// √ln(1 + eˡ).
    SqrtSoftplus,
    /// The logit itself.
    Logit,
}

/// How a group of experts is ranked among the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grouping {
    /// The method has no groups.
    None,
    /// By its best member, by the sum of its best two where a bias chooses; the groups must be given.
    Max,
    /// By the sum of its best two members; one group where none are given.
    BestTwo,
}

/// Whether weights are divided by their sum plus an epsilon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Division {
    /// They are not.
    Never,
    /// If [`RoutingConfig::renormalize`] says so.
    IfAsked(f32),
    /// They are.
    Always(f32),
}

/// A routing method as the steps that it shares with others: what a router on a device is told.
///
/// See [`HostRouter`](crate::HostRouter) for the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recipe {
    /// What an expert weighs.
    pub score: Score,
    /// How groups are ranked.
    pub grouping: Grouping,
    /// Whether a correction bias may be given.
    pub biased: bool,
    /// What becomes of the weights.
    pub division: Division,
}

impl Recipe {
    /// The steps of the method of `config`, which is checked as [`HostRouter::new`](crate::HostRouter::new) checks it.
    ///
    /// # Errors
    /// [`RoutingError`].
    pub fn new(config: &RoutingConfig) -> Result<Self, RoutingError> {
        check(config)
    }

    /// Whether scores plus a bias choose, and groups count as the sum of their best two; otherwise logits choose, and groups
    /// count as their best.
    pub fn chooses_by_score(&self, has_bias: bool) -> bool {
        has_bias || self.grouping == Grouping::BestTwo
    }

    /// The steps of `method`; `None` for one that this router does not have.
    pub(crate) fn of(method: RoutingMethod) -> Option<Self> {
        use Division::{Always, IfAsked, Never};
        use RoutingMethod as M;
        let (score, grouping, biased, division) = match method {
            M::Default => (Score::Softmax, Grouping::None, false, Never),
            M::Renormalize => (Score::SoftmaxOfChosen, Grouping::None, false, Never),
            M::RenormalizeNaive => (Score::Softmax, Grouping::None, false, Always(0.0)),
            M::GroupLimitedSoftmax => (Score::Softmax, Grouping::Max, true, IfAsked(EPSILON)),
            M::GroupLimitedSigmoid => (Score::Sigmoid, Grouping::Max, false, IfAsked(EPSILON)),
            M::DeepSeekV3 => (Score::Sigmoid, Grouping::BestTwo, true, IfAsked(EPSILON)),
            M::Llama4 | M::Sigmoid | M::TopKSigmoid => (Score::Sigmoid, Grouping::None, false, Never),
            M::TopK => (Score::Logit, Grouping::None, false, Never),
            M::SigmoidRenorm => (Score::Sigmoid, Grouping::None, false, Always(EPSILON)),
            M::MiniMax2 => (Score::Sigmoid, Grouping::None, true, Always(EPSILON)),
            M::BiasedSoftmax => (Score::Softmax, Grouping::None, true, IfAsked(0.0)),
            M::SqrtSoftplus => (Score::SqrtSoftplus, Grouping::None, true, IfAsked(0.0)),
            _ => return None,
        };
        Some(Self { score, grouping, biased, division })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_steps() {
        assert!(RoutingMethod::ALL.into_iter().all(|method| Recipe::of(method).is_some()));
    }
}
