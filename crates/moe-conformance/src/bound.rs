//! How far a right layer may be from the oracle, element by element.
//!
//! A layer that quantises and rounds where the oracle does is not off by a little everywhere. It has the oracle's
//! bits almost everywhere, and is a whole step off where an f32 and an f64 sum fall on different sides of a rounding
//! boundary. The oracle therefore carries an error along with every value, finds the values whose error reaches a
//! boundary, and says what crossing it does to the output. An element with no boundary within reach has to agree to
//! f32 accuracy; no row of a batch is excused. The bound is made of these steps, with `u = 2⁻²⁴`, the unit roundoff
//! of f32, and `v = 2⁻⁸`, that of bf16.
//!
//! # 1. Sums of products
//!
//! gemm1 sums `K = hidden` products, gemm2 `K = intermediate`. Products of bf16, FP8 and FP4 values are exact in
//! f32 (8 + 8 bits at most). What rounds is the addition, and up to three times per product the scales: `code ·
//! scale` for either factor, and the product of those. A backend may scale blocks of the sum instead, which rounds
//! less often. In any order and any number of parts,
//!
//! ```text
//! worst case         |ŝ − s| ≤ (K + 3)·u · Σ|xw|                   + K · 2⁻¹²⁵
//! used here          |ŝ − s| ≤ 3·u · √((K + 3) · (s² + Σ(xw)²))    + K · 2⁻¹²⁵
//! ```
//!
//! The last term is for instructions that flush subnormal products. The second form takes roundings for independent
//! with mean zero: after `m` of `K` terms in random order the partial sum has the mean square `(m/K)²·s² +
//! (m/K)(1 − m/K)·Σ(xw)²`, every addition rounds it by `u` at most and 0.42·u in the mean square, and so the error
//! of the plainest order, one term after the other, has the standard deviation `0.42·u · √(K·(s²/3 + Σ(xw)²/6))`.
//! The factor 3 is more than 12 of these; sums in lanes, blocks or trees are nearer still. Unit tests with channels
//! 30 times larger than others use up to 0.4 of it. The worst case would be safe without any assumption, but is of
//! no use: with terms of both signs `Σ|xw| ≈ 0.64·√K · √Σ(xw)²`, so that it is wider by `0.15·K`, 1000 times for
//! `K = 7168`. Every activation would then be within reach of a rounding boundary, and nothing certain; with the
//! second form it is about one in fifty.
//!
//! A routing weight on the input and a bias add one rounding each, of the value that they make.
//!
//! Tensor cores add FP8 products up in less than f32 ([`fused_moe_core::Accumulation::Aligned`]). Hopper's take 32 consecutive ones and the
//! sum so far at once, align them to the largest, and cut each to 13 bits behind the first one of that; after 128 products the
//! sum goes to one in f32 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2, found "around 14 bits"). With `g ≤ 2⁻¹³ · max` the unit of a step,
//! each of its 33 addends loses between 0 and `g`, towards zero:
//!
//! ```text
//! besides            3·√(Σ 33/3 · g²) + |Σ g/2 · (positive addends − negative ones)|     over steps
//! ```
//!
//! That makes the error of a sum some 10⁻³ of it, so that an activation near the middle of two codes is uncertain far more often, and with
//! it the scale of its group. Every element still has its own bound, but it is wide where `K` is large; that of the whole is therefore
//! narrower there, a relative L2 error of 1/8 instead of a quarter: that is a step of E4M3, and what an output is off by that hangs on one
//! activation which took the next code. Most hang on many. One whose sum is off by `e` takes the next code, `δ` further, with a
//! probability of `e/δ`, so that the error in the mean square is `√(e·δ)`, near one percent with `e` ≈ 10⁻³ and `δ` ≈ 1/12; 0.2 to 1
//! percent is what layers on an H200 are off by.
//!
//! # 2. The activation function
//!
//! All activations are `A(gate) · B(up)`, with `B` linear or clamped:
//!
//! ```text
//! e_h = E_A·|B| + |A|·E_B + E_A·E_B + 2u·|A·B|
//! silu, swiglu-oai (t = α·gate)   E_A = (|A′| + α·e)·e + (8 + 2·|t|·(1 − σ(t)))·u·|A|
//! gelu, gelu-tanh                 E_A = 1.13·e + 8u·|gate|
//! up                              E_B = e, and u·|up + 1| more for swiglu-oai
//! ```
//!
//! where `e` is the error of gate or up, zero where a limit cuts it off for certain. `8u` is for an exponential
//! within 2 ulp, a sum, a quotient and products; `2·|t|` for its argument, which is scaled by log₂e and rounded;
//! 1.13 is the largest slope of GELU, and its `8u` is one of `|gate|` because `1 + erf` and `1 + tanh` cancel. A
//! device that approximates functions to 11 or 16 bits is outside of this, as it should be.
//!
//! # 3. Rounding to bf16 and the second quantisation
//!
//! The activation lies in `[h − e_h, h + e_h]` and its bf16 between those of the ends. If these are equal, it is
//! certain. If not, it is one of two, rarely more, `≤ 2v·|h|` apart. Then, by scheme:
//!
//! ```text
//! none, mxfp4                     the difference itself
//! static per-tensor FP8           the difference of its values under the scale: 0, or a step of the codes
//! dynamic FP8, NVFP4              the same under the scale of the group and every other that it may have
//! ```
//!
//! A dynamic scale depends on the group's largest magnitude. If that is uncertain, every scale that it can lead to is
//! tried, and the whole group, 128 columns, a row, all rows of the rank, or 16 columns, is quantised under it. That
//! moves values together, by `2v` and here and there by a code (E4M3: ≤ 1/8, E2M1: ≤ 1/2 of the value), and the
//! effect on gemm2 is their sum with its signs:
//!
//! ```text
//! e_y = e(gemm2)  +  min(Σ δ·|w|, 3·√Σ(δ·w)²) over uncertain elements
//!                 +  Σ over uncertain groups max over scales |Σ δ·w|
//! ```
//!
//! Up to nine uncertain elements may all move the way that is worst. More of them do not: each moves because of roundings of
//! its own, by δ or not at all, so that their sum has the standard deviation `√Σ(δ·w)²/2` at most, and 3 of the root are six of these.
//!
//! The first quantisation is of the tokens themselves, which are exact: no code and no scale of it is uncertain.
//!
//! # 4. Weights, partial sums, ranks
//!
//! ```text
//! partial sum of a rank, m slots  e_p = Σ |w|·(e_y + (m + 1)·u·|y|)        (+ 32u·|w·y| if experts route)
//! rounded to bf16                 0 if no boundary lies in [p − e_p, p + e_p], else the step across it
//! over R ranks with the token     + (R − 1)·u·Σ|p|
//! rounded to bf16 per node        again 0 or the step, and + (nodes − 1)·u·Σ|sums of nodes|
//! output in bf16                  again 0 or the step
//! ```
//!
//! The sums of nodes are rounded only by a combine that says so ([`fused_moe_core::PartialSums`]); then the ranks are those of
//! one node. A combine in FP8 ([`fused_moe_core::CombineWire`]) quantises what was rounded, as in step 3, every time that
//! something is rounded on its way back. If experts return unweighted rows, each of these is rounded to bf16 instead of the partial sum, and weights and
//! `k` slots take the place of ranks. Routing weights are inputs; only monolithic experts compute them, from the
//! logits, and which experts those choose is decided by the host router.
//!
//! # What it amounts to
//!
//! Relative L2 norms for random tokens and weights, `K` = hidden and intermediate, over one rank. The roundings
//! behind gemm2 are part of the oracle's answer and a right layer shares them; `bound` comes on top; their sum is the
//! largest error of the whole against the unrounded layer that can pass (`tolerance`).
//!
//! ```text
//!                   K = 7168 / 2048, top-8         K = 2048 / 768, top-8
//! scheme            roundings  bound    sum        roundings  bound    sum
//! none              1.7e-3     6.9e-3   8.3e-3     1.6e-3     4.1e-3   5.5e-3
//! FP8 1x128         1.7e-3     5.9e-3   7.3e-3     1.7e-3     4.8e-3   6.0e-3
//! FP8 PTPC          1.7e-3     7.0e-3   8.4e-3     1.7e-3     6.1e-3   7.3e-3
//! FP8 per tensor    1.7e-3     6.5e-3   7.9e-3     1.7e-3     2.1e-3   3.2e-3
//! FP8 static        1.7e-3     7.1e-3   8.5e-3     1.7e-3     3.0e-3   4.1e-3
//! MXFP4             1.7e-3     6.5e-3   7.9e-3     1.6e-3     3.7e-3   5.1e-3
//! NVFP4             1.6e-3     6.4e-3   7.5e-3     1.7e-3     6.1e-3   7.2e-3
//! ```
//!
//! Where tensor cores cut sums off, scales of groups and many codes are uncertain, and bounds are of another size: `bound` is 0.33 and
//! 0.26 for FP8 1x128 and PTPC on the left, 0.31 and 0.28 on the right. Elements of a wrong layer are further off than that, or the
//! whole is by more than 1/8.
//!
//! It grows with both `K` and `k`, because a partial sum of `k · intermediate` uncertain terms lies near a boundary of
//! bf16 the more often the more terms there are. At the sizes of the suite, `K` ≤ 384, it is 2e-5 to 1e-3 in the
//! median over cases, 83 to 99 of a hundred elements must agree to 10⁻⁵, and right backends have the oracle's own
//! value in nearly all of them: over 10⁷ elements the error is 0 to 1e-7 in the median over cases and 3e-3 at most.
//! Where a boundary was crossed, the error is the step, and `bound_ratio` close to 1.

mod activation;
mod combine;
mod requantize;
mod rounding;
mod sums;

pub(crate) use activation::activated;
pub(crate) use combine::{Combine, PairOutputs};
pub use combine::{Returned, Rounding};
pub(crate) use requantize::{Requantized, requantized, travelled};
pub(crate) use rounding::nearest;
pub(crate) use sums::{Bounded, Products, U};

use crate::metrics::{calc_diff, relative_l2};

/// Relative L2 error above which a layer is wrong whatever its bound: where f32 sums resolve nothing, nothing is
/// verified.
const MOST_ERROR: f64 = 0.25;
/// The same for sums that tensor cores cut off: what an output is off by that hangs on one activation which took the next code.
const MOST_ERROR_CUT_OFF: f64 = 0.125;

/// What the oracle expects of a layer, `[tokens, hidden]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// The layer in f64, without the roundings behind gemm2.
    pub exact: Vec<f64>,
    /// The same, rounded where the layer rounds.
    pub want: Vec<f64>,
    /// How far from `want` a right layer may be.
    pub bound: Vec<f64>,
    /// Relative L2 error above which a layer is wrong whatever its bounds.
    pub most_error: f64,
}

impl Default for Expected {
    /// No rows.
    fn default() -> Self {
        Self { exact: Vec::new(), want: Vec::new(), bound: Vec::new(), most_error: MOST_ERROR }
    }
}

/// How an output compares with what was expected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// The largest of `|got − want| / bound`; a right layer is at most at 1.
    pub bound_ratio: f64,
    /// `‖got − exact‖ / ‖exact‖`.
    pub relative_l2: f64,
    /// The largest relative L2 error that can pass: that of an output which is off by its bound everywhere, and at
    /// most [`Expected::most_error`].
    pub tolerance: f64,
    /// Of the oracle's answer.
    most_error: f64,
}

impl Agreement {
    /// Whether the output is right.
    pub fn passes(&self) -> bool {
        self.bound_ratio <= 1.0 && self.relative_l2 <= self.most_error
    }
}

/// An output that is too far from the oracle's.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "relative L2 error {relative_l2:.3e} (calc_diff {calc_diff:.3e}); furthest is row {row}, column {column}: {got:e} \
     instead of {want:e}, {ratio:.3} times its bound of {bound:.3e}"
)]
pub struct TooFar {
    /// [`relative_l2`] of the whole.
    pub relative_l2: f64,
    /// [`calc_diff`] of the whole.
    pub calc_diff: f64,
    /// Row of the element that is furthest off in units of its bound.
    pub row: usize,
    /// Its column.
    pub column: usize,
    /// How many times its bound it is off.
    pub ratio: f64,
    /// Its bound.
    pub bound: f64,
    /// Its value.
    pub got: f32,
    /// What it should be.
    pub want: f64,
}

impl Expected {
    /// Appends what is expected of further rows.
    pub fn append(&mut self, rows: Self) {
        self.exact.extend(rows.exact);
        self.want.extend(rows.want);
        self.bound.extend(rows.bound);
        self.most_error = self.most_error.min(rows.most_error);
    }

    /// Adds another layer on the same rows, as an f32 sum of both outputs does.
    pub fn add(&mut self, other: &Self) {
        self.exact.iter_mut().zip(&other.exact).for_each(|(sum, x)| *sum += x);
        for ((want, bound), (x, error)) in
            self.want.iter_mut().zip(&mut self.bound).zip(other.want.iter().zip(&other.bound))
        {
            *bound += error + sums::U * (want.abs() + x.abs() + *bound + error);
            *want += x;
        }
    }

    /// Compares an output, in any state, without judging it.
    pub fn compare(&self, got: &[f32]) -> Agreement {
        let (_, bound_ratio) = self.furthest(got);
        let norm = |xs: &mut dyn Iterator<Item = f64>| xs.map(|x| x * x).sum::<f64>().sqrt();
        let reach = self.exact.iter().zip(&self.want).zip(&self.bound).map(|((e, w), b)| (w - e).abs() + b);
        let (reach, size) = (norm(&mut reach.into_iter()), norm(&mut self.exact.iter().copied()));
        let tolerance = if reach == 0.0 { 0.0 } else { (reach / size).min(self.most_error) };
        let most_error = self.most_error;
        Agreement { bound_ratio, relative_l2: relative_l2(got, &self.exact), tolerance, most_error }
    }

    /// Checks an output, whose rows are `hidden` wide: every element within its bound.
    ///
    /// # Errors
    /// [`TooFar`], with the element that is furthest off.
    pub fn check(&self, got: &[f32], hidden: usize) -> Result<Agreement, Box<TooFar>> {
        let agreement = self.compare(got);
        if agreement.passes() {
            return Ok(agreement);
        }
        let (at, ratio) = self.furthest(got);
        Err(Box::new(TooFar {
            relative_l2: agreement.relative_l2,
            calc_diff: calc_diff(got, &self.exact),
            row: at / hidden.max(1),
            column: at % hidden.max(1),
            ratio,
            bound: self.bound.get(at).copied().unwrap_or(f64::NAN),
            got: got.get(at).copied().unwrap_or(f32::NAN),
            want: self.want.get(at).copied().unwrap_or(f64::NAN),
        }))
    }

    /// Where the output is furthest off in units of the bound, and how far. What is not there or no number is
    /// infinitely far.
    fn furthest(&self, got: &[f32]) -> (usize, f64) {
        if got.len() != self.want.len() {
            return (got.len().min(self.want.len()), f64::INFINITY);
        }
        let ratios = got.iter().zip(&self.want).zip(&self.bound).map(|((&got, want), bound)| {
            let error = (f64::from(got) - want).abs();
            let ratio = if error == 0.0 { 0.0 } else { error / bound };
            if ratio.is_nan() { f64::INFINITY } else { ratio }
        });
        ratios.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected() -> Expected {
        Expected {
            exact: vec![0.0, 1.001, -2.0, 4.0],
            want: vec![0.0, 1.0, -2.0, 4.0],
            bound: vec![0.0, 1e-3, 1e-3, 1e-3],
            ..Expected::default()
        }
    }

    #[test]
    fn every_element_has_its_own_bound() {
        let right = expected().check(&[0.0, 1.0005, -2.0, 4.0], 2).expect("within the bound");
        assert!((right.bound_ratio - 0.5).abs() < 1e-3, "{right:?}");
        assert!(right.relative_l2 <= right.tolerance, "{right:?}");
        let far = expected().check(&[0.0, 1.0, -2.002, 4.0], 2).expect_err("twice the bound");
        assert_eq!((far.row, far.column), (1, 0));
        assert!((far.ratio - 2.0).abs() < 1e-3 && far.relative_l2 < 1e-3, "{far}");
        let nonzero = expected().check(&[1e-30, 1.0, -2.0, 4.0], 2).expect_err("a row without experts");
        assert_eq!((nonzero.column, nonzero.ratio), (0, f64::INFINITY));
    }

    #[test]
    fn nothing_and_noise_are_no_answer() {
        assert!(expected().check(&[0.0, 1.0, f32::NAN, 4.0], 2).is_err());
        assert!(expected().check(&[0.0, 1.0], 2).is_err());
        assert!(Expected::default().check(&[], 2).is_ok());
        let (exact, want, bound) = (vec![1.0; 8], vec![1.0; 8], vec![100.0; 8]);
        let noise = Expected { exact, want, bound, ..Expected::default() };
        let far = noise.check(&[2.0; 8], 8).expect_err("where nothing is resolved, nothing is right");
        assert!(far.ratio < 1.0 && far.relative_l2 == 1.0, "{far}");
    }

    #[test]
    fn a_second_layer_widens_the_bound() {
        let mut sum = expected();
        sum.add(&expected());
        assert_eq!(sum.want, [0.0, 2.0, -4.0, 8.0]);
        assert!(
            sum.check(&[0.0, 2.0019, -4.0, 8.0], 2).is_ok()
                && sum.check(&[0.0, 2.0021, -4.0, 8.0], 2).is_err()
        );
        sum.append(expected());
        assert_eq!((sum.exact.len(), sum.want.len(), sum.bound.len()), (8, 8, 8));
    }
}
