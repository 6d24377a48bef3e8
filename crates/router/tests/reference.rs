//! Every routing method at random against a reference in f64 that spells the formulas out and sorts.

use fused_moe_core::{
    Arena, DType, ExecCx, ExpertGroups, Router, RoutingConfig, RoutingMethod, Stream, TensorView,
    TensorViewMut, TopKMut,
};
use proptest::prelude::*;
use router::HostRouter;

const EPSILON: f64 = 1e-20;

fn route(config: &RoutingConfig, logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let tokens = logits.len() / config.num_experts;
    let dims = [tokens, config.top_k];
    let (mut ids, mut weights) = (vec![-99; tokens * config.top_k], vec![f32::NAN; tokens * config.top_k]);
    let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0]).unwrap());
    let mut cx = ExecCx { stream: Stream::Host, workspace };
    let out = TopKMut {
        ids: TensorViewMut::from_slice(&mut ids, DType::I32, &dims).unwrap(),
        weights: TensorViewMut::from_slice(&mut weights, DType::F32, &dims).unwrap(),
    };
    let logits = TensorView::from_slice(logits, DType::F32, &[tokens, config.num_experts]).unwrap();
    HostRouter::new(config.clone()).unwrap().route(&mut cx, logits, out).unwrap();
    (ids, weights)
}

/// What the methods mean; shares nothing with the router but the configuration.
mod reference {
    use super::*;

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
    pub fn order(scores: &[f64]) -> Vec<usize> {
        let mut ids: Vec<usize> = (0..scores.len()).collect();
        ids.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap().then(a.cmp(&b)));
        ids
    }

    pub struct Routed {
        /// Scores by which experts are chosen, −inf for those of masked groups.
        pub choice: Vec<f64>,
        /// Smallest distance of a kept group's score from a masked one's.
        pub group_gap: f64,
    }

    fn scores(method: RoutingMethod, logits: &[f64]) -> Vec<f64> {
        let each = |f: fn(f64) -> f64| logits.iter().map(|&l| f(l)).collect();
        match method {
            RoutingMethod::Default
            | RoutingMethod::RenormalizeNaive
            | RoutingMethod::GroupLimitedSoftmax
            | RoutingMethod::BiasedSoftmax => softmax(logits),
            RoutingMethod::Renormalize | RoutingMethod::TopK => logits.to_vec(),
            // The maximum keeps ln(1 + eˡ) of large l from overflowing and is exact.
            RoutingMethod::SqrtSoftplus => each(|l| (l.max(0.0) + (-l.abs()).exp().ln_1p()).sqrt()),
            _ => each(sigmoid),
        }
    }

    pub fn choose(config: &RoutingConfig, logits: &[f32]) -> Routed {
        let logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        let mut choice = scores(config.method, &logits);
        for (c, b) in choice.iter_mut().zip(config.correction_bias.iter().flatten()) {
            *c += f64::from(*b);
        }
        let v3 = config.method == RoutingMethod::DeepSeekV3;
        let members = if v3 || config.correction_bias.is_some() { 2 } else { 1 };
        let mut group_gap = f64::INFINITY;
        if let Some(groups) = config.groups {
            let size = choice.len() / groups.n_group;
            let group_scores: Vec<f64> = choice
                .chunks(size)
                .map(|group| order(group).into_iter().take(members).map(|at| group[at]).sum())
                .collect();
            let ranked = order(&group_scores);
            for &masked in &ranked[groups.topk_group..] {
                let gap = group_scores[ranked[groups.topk_group - 1]] - group_scores[masked];
                group_gap = group_gap.min(gap);
                choice[masked * size..(masked + 1) * size].fill(f64::NEG_INFINITY);
            }
        }
        Routed { choice, group_gap }
    }

    /// The weights of `ids`, which the router under test has chosen.
    pub fn weights(config: &RoutingConfig, logits: &[f32], ids: &[i32]) -> Vec<f64> {
        let logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        let score = scores(config.method, &logits);
        let chosen: Vec<f64> = ids.iter().map(|&id| score[id as usize]).collect();
        let sum: f64 = chosen.iter().sum();
        let asked = config.renormalize;
        let divisor = match config.method {
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
        let weights = if config.method == RoutingMethod::Renormalize { softmax(&chosen) } else { chosen };
        let factor = f64::from(config.routed_scaling_factor);
        let finite = |w: f64| if w.is_finite() { w } else { 0.0 };
        weights.into_iter().map(|w| finite(w / divisor) * factor).collect()
    }
}

/// Whether a method takes groups and a bias.
fn takes(method: RoutingMethod) -> (bool, bool) {
    match method {
        RoutingMethod::GroupLimitedSigmoid => (true, false),
        RoutingMethod::GroupLimitedSoftmax | RoutingMethod::DeepSeekV3 => (true, true),
        RoutingMethod::MiniMax2 | RoutingMethod::BiasedSoftmax | RoutingMethod::SqrtSoftplus => (false, true),
        _ => (false, false),
    }
}

fn any_config() -> impl Strategy<Value = RoutingConfig> {
    let method = prop::sample::select(RoutingMethod::ALL.to_vec());
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (method, 1usize..6, 1usize..24, 0usize..100, 0usize..100, flags).prop_flat_map(
        |(method, n_group, size, keep, k, (renormalize, scale, with_bias))| {
            let (grouped, biased) = takes(method);
            let num_experts = n_group * size;
            let topk_group = keep % n_group + 1;
            let available = if grouped { topk_group * size } else { num_experts };
            let config = RoutingConfig {
                method,
                num_experts,
                // Every third k is all that there are.
                top_k: match (method, k % 3) {
                    (RoutingMethod::Llama4, _) => 1,
                    (_, 0) => available,
                    _ => k % available + 1,
                },
                groups: grouped.then_some(ExpertGroups { n_group, topk_group }),
                renormalize,
                routed_scaling_factor: if scale { 2.5 } else { 1.0 },
                correction_bias: None,
            };
            prop::collection::vec(-2.0f32..1.0, num_experts).prop_map(move |bias| RoutingConfig {
                correction_bias: (biased && with_bias).then_some(bias),
                ..config.clone()
            })
        },
    )
}

/// Three rows: one of common logits, one of few values (many ties), one that is all negative with holes.
fn any_logits(experts: usize) -> impl Strategy<Value = Vec<f32>> {
    let common = prop::collection::vec(-8.0f32..8.0, experts);
    let ties = prop::collection::vec((-2i8..3).prop_map(f32::from), experts);
    let holes =
        prop::collection::vec(prop_oneof![3 => -30.0f32..-20.0, 1 => Just(f32::NEG_INFINITY)], experts);
    (common, ties, holes).prop_map(|(common, ties, holes)| [common, ties, holes].concat())
}

fn check(config: &RoutingConfig, row: &[f32], ids: &[i32], weights: &[f32]) -> Result<(), TestCaseError> {
    let want = reference::choose(config, row);
    let mut distinct = ids.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    prop_assert_eq!(distinct.len(), config.top_k);

    // f32 scores may swap what is closer than their rounding.
    let slack = 1e-6;
    if want.group_gap > slack {
        let chosen: Vec<f64> = ids.iter().map(|&id| want.choice[id as usize]).collect();
        let not_worse = |a: f64, b: f64| a >= b || a >= b - slack;
        prop_assert!(chosen.windows(2).all(|w| not_worse(w[0], w[1])), "not best first: {chosen:?}");
        let worst = chosen[chosen.len() - 1];
        for (id, &c) in want.choice.iter().enumerate() {
            prop_assert!(ids.contains(&(id as i32)) || not_worse(worst, c), "{id} was passed over: {ids:?}");
        }
    }
    // Equal logits without a bias are equal scores in any arithmetic: the order is exact.
    if config.correction_bias.is_none() && config.groups.is_none() {
        let logits: Vec<f64> = row.iter().map(|&l| f64::from(l)).collect();
        let exact: Vec<i32> = reference::order(&logits)[..config.top_k].iter().map(|&id| id as i32).collect();
        if config.method != RoutingMethod::DeepSeekV3 {
            prop_assert_eq!(ids, &exact[..]);
        }
    }
    for (got, want) in weights.iter().zip(reference::weights(config, row, ids)) {
        let near = (f64::from(*got) - want).abs() <= 1e-5 * want.abs();
        prop_assert!(near, "{got} is not {want} of {ids:?}, {weights:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_reference(
        (config, logits) in any_config().prop_flat_map(|config| {
            let logits = any_logits(config.num_experts);
            (Just(config), logits)
        })
    ) {
        let (ids, weights) = route(&config, &logits);
        for (token, row) in logits.chunks(config.num_experts).enumerate() {
            let span = token * config.top_k..(token + 1) * config.top_k;
            check(&config, row, &ids[span.clone()], &weights[span])?;
        }
    }
}

#[test]
fn the_check_sees_a_wrong_order_a_wrong_choice_and_a_wrong_weight() {
    let config = RoutingConfig {
        method: RoutingMethod::SqrtSoftplus,
        num_experts: 4,
        top_k: 2,
        groups: None,
        renormalize: true,
        routed_scaling_factor: 1.0,
        correction_bias: Some(vec![0.0, 0.5, 0.0, 0.0]),
    };
    let row = [1.0, 0.0, 2.0, -1.0];
    let (ids, weights) = route(&config, &row);
    assert!(check(&config, &row, &ids, &weights).is_ok());
    let swapped = [ids[1], ids[0]];
    assert!(check(&config, &row, &swapped, &[weights[1], weights[0]]).is_err());
    let wrong = reference::weights(&config, &row, &[2, 3]).iter().map(|&w| w as f32).collect::<Vec<_>>();
    assert!(check(&config, &row, &[2, 3], &wrong).is_err());
    assert!(check(&config, &row, &ids, &[weights[0], weights[1] * 1.001]).is_err());
}
