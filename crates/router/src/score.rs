//! Scores of experts and groups.

use crate::elementary::{exp, ln_1p};
use crate::recipe::{Division, Score};

/// Terms of a softmax are counted in units of 2⁻⁴⁰ of the largest, as an integer: a sum that no order of terms changes,
/// so that lanes of a device may add them up in theirs. 2²³ experts fit.
const UNITS: f32 = (1u64 << 40) as f32;

/// 1 / (1 + e⁻ˣ), which is 0 for −inf. What is divided by is between 1 and 2, where devices divide fast.
pub(crate) fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let larger = 1.0 / (1.0 + e);
    if x < 0.0 { e * larger } else { larger }
}

/// √ln(1 + eˣ), which is 0 for −inf.
fn sqrt_softplus(x: f32) -> f32 {
    if x < -20.0 {
        // ln(1 + eˣ) is eˣ to 1e-9 there, and its root is normal long after eˣ has underflowed.
        exp(0.5 * x)
    } else {
        (x.max(0.0) + ln_1p(exp(-x.abs()))).sqrt()
    }
}

/// Writes the score of every expert of a row to `scores`, which has the length of `logits`.
pub(crate) fn score_all(score: Score, logits: &[f32], scores: &mut [f32]) {
    let each = |scores: &mut [f32], f: fn(f32) -> f32| {
        scores.iter_mut().zip(logits).for_each(|(s, &l)| *s = f(l));
    };
    match score {
        Score::Sigmoid => each(scores, sigmoid),
        Score::SqrtSoftplus => each(scores, sqrt_softplus),
        Score::Logit => each(scores, |l| l),
        Score::Softmax | Score::SoftmaxOfChosen => {
            scores.copy_from_slice(logits);
            softmax_over(logits, scores);
        }
    }
}

/// Writes the scores of the experts `ids` to `weights`, divided by their sum as `division` says.
pub(crate) fn weigh(
    (score, division): (Score, Division),
    renormalize: bool,
    logits: &[f32],
    (ids, weights): (&[i32], &mut [f32]),
) {
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = logits[id as usize];
    }
    match score {
        Score::Softmax => softmax_over(logits, weights),
        Score::SoftmaxOfChosen => softmax(weights),
        Score::Sigmoid => weights.iter_mut().for_each(|w| *w = sigmoid(*w)),
        Score::SqrtSoftplus => weights.iter_mut().for_each(|w| *w = sqrt_softplus(*w)),
        // An expert that may not be chosen and is, for want of others, must not make the output infinite.
        Score::Logit => weights.iter_mut().for_each(|w| *w = if w.is_finite() { *w } else { 0.0 }),
    }
    match division {
        Division::Always(epsilon) => divide_by_sum(weights, epsilon),
        Division::IfAsked(epsilon) if renormalize => divide_by_sum(weights, epsilon),
        Division::IfAsked(_) | Division::Never => {}
    }
}

/// The best member.
pub(crate) fn max_score(members: &[f32]) -> f32 {
    members.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The sum of the best two members, or the only member.
pub(crate) fn best_two_score(members: &[f32]) -> f32 {
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

/// Replaces the logits `chosen` by their part in the softmax of `logits`.
fn softmax_over(logits: &[f32], chosen: &mut [f32]) {
    let max = max_score(logits);
    let units: u64 =
        if max.is_finite() { logits.iter().map(|l| (exp(l - max) * UNITS) as u64).sum() } else { 0 };
    let inverse = if units > 0 { 1.0 / (units as f32 / UNITS) } else { 0.0 };
    for c in chosen {
        *c = if units > 0 { exp(*c - max) * inverse } else { 0.0 };
    }
}

/// Softmax of `logits` in place, all zero if all are −inf.
fn softmax(logits: &mut [f32]) {
    let max = max_score(logits);
    if max.is_finite() {
        logits.iter_mut().for_each(|l| *l = exp(*l - max));
        divide_by_sum(logits, 0.0);
    } else {
        logits.fill(0.0);
    }
}

/// Divides `weights` by their sum + `epsilon`; a sum of zero leaves them zero.
fn divide_by_sum(weights: &mut [f32], epsilon: f32) {
    let sum = weights.iter().sum::<f32>() + epsilon;
    if sum > 0.0 {
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqrt_softplus_is_exact_to_rounding_far_and_near() {
        let mut x = -170.0f32;
        while x < 200.0 {
            let wide = f64::from(x);
            let want = (wide.max(0.0) + (-wide.abs()).exp().ln_1p()).sqrt();
            let got = f64::from(sqrt_softplus(x));
            // Half of x is exact; eʸ multiplies the half ulp of its own rounding only.
            assert!((got - want).abs() <= 4e-7 * want, "{x}: {got} is not {want}");
            x += 0.37;
        }
        assert_eq!(sqrt_softplus(f32::NEG_INFINITY), 0.0);
    }
}
