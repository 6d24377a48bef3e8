//! Top-k rows without a model, for benchmarks and load tests.
//!
//! ```
//! use router::simulate::{Distribution, Simulator};
//!
//! let skewed = Distribution::Zipf { exponent: 1.0 };
//! let mut simulator = Simulator::new(skewed, 64, 6, 42)?;
//! let rows = simulator.draw(100);
//! let first = rows.ids.iter().filter(|&&id| id == 0).count();
//! let last = rows.ids.iter().filter(|&&id| id == 63).count();
//! assert!(first > 5 * last);
//! # Ok::<(), router::simulate::SimulationError>(())
//! ```

use fused_moe_core::NO_EXPERT;
use smallvec::SmallVec;

use crate::best::Best;

/// Which experts the tokens of a [`Simulator`] go to.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Distribution {
    /// Every set of `top_k` experts is equally likely.
    Uniform,
    /// `topk_group` of `n_group` groups of equal size, and then `top_k` of their experts, each choice equally likely: the
    /// traffic of a balanced model with group-limited routing, such as DeepSeek-V3.
    GroupLimited {
        /// Groups; divides the number of experts.
        n_group: usize,
        /// Groups that a token's experts are in.
        topk_group: usize,
    },
    /// Experts are drawn one after the other without putting back, expert `e` with a probability in
    /// proportion to `(e + 1)^-exponent`. Expert 0 is the most popular, so that in contiguous placements rank
    /// 0 has the most work; 0 is [`Distribution::Uniform`].
    Zipf {
        /// At least 0; 1 is about what unbalanced checkpoints show.
        exponent: f64,
    },
    /// The rows `[tokens, top_k]` that a model has been seen to choose, in turn and then from the start
    /// again. [`NO_EXPERT`] is allowed.
    Recorded {
        /// Row by row.
        ids: Vec<i32>,
    },
}

/// Why a [`Simulator`] is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SimulationError {
    /// A token cannot have so many experts.
    #[error("top_k {top_k} is not in 1..={num_experts} (num_experts)")]
    TopK {
        /// Experts per token.
        top_k: usize,
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// More experts than an i32 id can name.
    #[error("num_experts {num_experts} is more than {}", i32::MAX)]
    NumExperts {
        /// Experts over all ranks.
        num_experts: usize,
    },
    /// Groups that do not divide the experts, or do not have enough of them.
    #[error(
        "{topk_group} of {n_group} groups of {num_experts} experts: groups must be equal and have at least {top_k} \
         experts"
    )]
    Groups {
        /// Groups.
        n_group: usize,
        /// Groups per token.
        topk_group: usize,
        /// Experts over all ranks.
        num_experts: usize,
        /// Experts per token.
        top_k: usize,
    },
    /// A negative, NaN or infinite exponent.
    #[error("exponent of the Zipf distribution is {exponent}")]
    Exponent {
        /// The exponent.
        exponent: f64,
    },
    /// No recorded rows, or a last row that is not whole.
    #[error("{len} ids are recorded, wanted rows of {top_k}")]
    RecordedLength {
        /// Recorded ids.
        len: usize,
        /// Experts per token.
        top_k: usize,
    },
    /// A recorded row that names an expert twice or one that does not exist.
    #[error("recorded row {row} has id {id}, wanted -1 or distinct ids in 0..{num_experts}")]
    RecordedRow {
        /// The row.
        row: usize,
        /// The first id that does not fit.
        id: i32,
        /// Experts over all ranks.
        num_experts: usize,
    },
}

/// Rows that a [`Simulator`] has drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulatedTopK {
    /// `[tokens, top_k]` distinct global expert ids, or [`NO_EXPERT`].
    pub ids: Vec<i32>,
    /// `[tokens, top_k]` weights. A row's are at least 0, descend and add up to 1, uniform among all that do;
    /// slots of [`NO_EXPERT`] have weight 0 and no part in it.
    pub weights: Vec<f32>,
}

/// A source of top-k rows. The same arguments give the same rows; on another platform a near tie may fall
/// otherwise, where its logarithm rounds differently.
#[derive(Clone, Debug)]
pub struct Simulator {
    distribution: Distribution,
    num_experts: usize,
    top_k: usize,
    /// Recorded row that comes next.
    next_row: usize,
    random: SplitMix64,
}

impl Simulator {
    /// Rows of `top_k` of `num_experts` experts.
    ///
    /// # Errors
    /// [`SimulationError`] for sizes, exponents and recorded rows that make no sense.
    pub fn new(
        distribution: Distribution,
        num_experts: usize,
        top_k: usize,
        seed: u64,
    ) -> Result<Self, SimulationError> {
        if top_k == 0 || top_k > num_experts {
            return Err(SimulationError::TopK { top_k, num_experts });
        }
        if i32::try_from(num_experts).is_err() {
            return Err(SimulationError::NumExperts { num_experts });
        }
        match &distribution {
            Distribution::Uniform => {}
            &Distribution::GroupLimited { n_group, topk_group } => {
                let equal = n_group > 0 && num_experts.is_multiple_of(n_group);
                if !equal || topk_group > n_group || topk_group * (num_experts / n_group) < top_k {
                    return Err(SimulationError::Groups { n_group, topk_group, num_experts, top_k });
                }
            }
            &Distribution::Zipf { exponent } => {
                if !exponent.is_finite() || exponent < 0.0 {
                    return Err(SimulationError::Exponent { exponent });
                }
            }
            Distribution::Recorded { ids } => check_recorded(ids, top_k, num_experts)?,
        }
        Ok(Self { distribution, num_experts, top_k, next_row: 0, random: SplitMix64(seed) })
    }

    /// The next `tokens` rows.
    pub fn draw(&mut self, tokens: usize) -> SimulatedTopK {
        let mut rows = SimulatedTopK {
            ids: vec![NO_EXPERT; tokens * self.top_k],
            weights: vec![0.0; tokens * self.top_k],
        };
        let each = rows.ids.chunks_exact_mut(self.top_k).zip(rows.weights.chunks_exact_mut(self.top_k));
        for (ids, weights) in each {
            self.draw_row(ids, weights);
        }
        rows
    }

    fn draw_row(&mut self, ids: &mut [i32], weights: &mut [f32]) {
        let mut groups: SmallVec<[bool; 32]> = SmallVec::from_elem(true, 1);
        let exponent = match &self.distribution {
            Distribution::Recorded { ids: recorded } => {
                let first = self.next_row * self.top_k;
                ids.copy_from_slice(&recorded[first..first + self.top_k]);
                self.next_row = (self.next_row + 1) % (recorded.len() / self.top_k);
                return self.draw_weights(ids, weights);
            }
            Distribution::Uniform => 0.0,
            &Distribution::GroupLimited { n_group, topk_group } => {
                groups = self.random.choose(topk_group, n_group);
                0.0
            }
            Distribution::Zipf { exponent } => *exponent,
        };
        let per_group = self.num_experts / groups.len();
        // Drawing without putting back is taking the largest ln(probability) + Gumbel noise.
        let mut best = Best::new(ids, weights);
        for id in (0..self.num_experts).filter(|id| groups[id / per_group]) {
            let popularity = -exponent * ((id + 1) as f64).ln();
            best.offer(id, (popularity - self.random.exponential().ln()) as f32);
        }
        self.draw_weights(ids, weights);
    }

    /// Weights for the slots of `ids` that have an expert.
    fn draw_weights(&mut self, ids: &[i32], weights: &mut [f32]) {
        let experts = ids.iter().filter(|&&id| id != NO_EXPERT).count();
        // Exponential variables divided by their sum are uniform on the simplex.
        let mut drawn: SmallVec<[f32; 32]> = (0..experts).map(|_| self.random.exponential() as f32).collect();
        drawn.sort_unstable_by(|a, b| b.total_cmp(a));
        let sum: f32 = drawn.iter().sum();
        weights.fill(0.0);
        let with_expert = weights.iter_mut().zip(ids).filter(|(_, id)| **id != NO_EXPERT);
        for ((weight, _), drawn) in with_expert.zip(drawn) {
            *weight = drawn / sum;
        }
    }
}

fn check_recorded(ids: &[i32], top_k: usize, num_experts: usize) -> Result<(), SimulationError> {
    if ids.is_empty() || !ids.len().is_multiple_of(top_k) {
        return Err(SimulationError::RecordedLength { len: ids.len(), top_k });
    }
    for (row, ids) in ids.chunks_exact(top_k).enumerate() {
        for (slot, &id) in ids.iter().enumerate() {
            let outside = usize::try_from(id).map_or(true, |id| id >= num_experts);
            if id != NO_EXPERT && (outside || ids[..slot].contains(&id)) {
                return Err(SimulationError::RecordedRow { row, id, num_experts });
            }
        }
    }
    Ok(())
}

/// Steele, Lea and Flood's generator ("Fast splittable pseudorandom number generators", 2014): 64 bits of
/// state, no dependency, the same everywhere.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `chosen` of `all` places, each choice equally likely.
    fn choose(&mut self, chosen: usize, all: usize) -> SmallVec<[bool; 32]> {
        let mut left = chosen;
        let place = |at: usize| {
            // Each place is one of those that are left to choose, of those that are left.
            let takes = self.uniform() * ((all - at) as f64) < left as f64;
            left -= usize::from(takes);
            takes
        };
        (0..all).map(place).collect()
    }

    /// The middle of one of 2^52 equal parts of (0, 1).
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// Exponentially distributed with mean 1, never 0.
    fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn simulator(distribution: Distribution, top_k: usize) -> Simulator {
        Simulator::new(distribution, 16, top_k, 7).unwrap()
    }

    fn loads(rows: &SimulatedTopK) -> [f64; 16] {
        let mut loads = [0.0; 16];
        rows.ids.iter().for_each(|&id| loads[id as usize] += 1.0);
        loads.map(|load| load / rows.ids.len() as f64)
    }

    #[test]
    fn the_generator_is_the_published_one() {
        let mut random = SplitMix64(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    #[rstest]
    #[case::uniform(Distribution::Uniform, 4)]
    #[case::skewed(Distribution::Zipf { exponent: 1.3 }, 16)]
    #[case::groups(Distribution::GroupLimited { n_group: 4, topk_group: 2 }, 8)]
    fn rows_are_distinct_and_weights_a_partition_of_one(
        #[case] distribution: Distribution,
        #[case] k: usize,
    ) {
        let rows = simulator(distribution, k).draw(200);
        for (ids, weights) in rows.ids.chunks(k).zip(rows.weights.chunks(k)) {
            let mut distinct = ids.to_vec();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), k, "{ids:?}");
            assert!(ids.iter().all(|id| (0..16).contains(id)), "{ids:?}");
            assert!(weights.windows(2).all(|w| w[0] >= w[1]) && weights[k - 1] >= 0.0, "{weights:?}");
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{weights:?}");
        }
    }

    #[test]
    fn loads_follow_the_distribution() {
        for exponent in [0.0, 1.0, 2.0] {
            let distribution = Distribution::Zipf { exponent };
            let got = loads(&simulator(distribution, 1).draw(20_000));
            let total: f64 = (1..=16).map(|e| f64::from(e).powf(-exponent)).sum();
            for (expert, got) in got.into_iter().enumerate() {
                let want = ((expert + 1) as f64).powf(-exponent) / total;
                // Five standard deviations of a binomial share.
                let slack = 5.0 * (want * (1.0 - want) / 20_000.0).sqrt();
                assert!(
                    (got - want).abs() < slack,
                    "expert {expert}, exponent {exponent}: {got} is not {want}"
                );
            }
        }
    }

    #[test]
    fn groups_and_experts_in_them_are_drawn_alike() {
        let rows = simulator(Distribution::GroupLimited { n_group: 8, topk_group: 3 }, 4).draw(20_000);
        let mut groups = [0.0; 8];
        for ids in rows.ids.chunks(4) {
            let mut hit: Vec<usize> = ids.iter().map(|&id| id as usize / 2).collect();
            hit.sort_unstable();
            hit.dedup();
            assert!(hit.len() <= 3, "{ids:?}");
            hit.iter().for_each(|&group| groups[group] += 1.0 / 20_000.0);
        }
        // 4 of the 6 experts of 3 groups miss a group in 1 of 15 draws.
        let want = 3.0 / 8.0 * (1.0 - 1.0 / 15.0);
        let slack = 5.0 * f64::sqrt(want * (1.0 - want) / 20_000.0);
        assert!(groups.iter().all(|got| f64::abs(got - want) < slack), "{groups:?}, want {want}");
        assert!(loads(&rows).iter().all(|load| f64::abs(load - 1.0 / 16.0) < 0.004), "{:?}", loads(&rows));
    }

    #[test]
    fn a_seed_fixes_the_stream_however_it_is_cut() {
        let mut whole = simulator(Distribution::Uniform, 3);
        let mut cut = whole.clone();
        let (first, second) = (cut.draw(4), cut.draw(6));
        let whole = whole.draw(10);
        assert_eq!(whole.ids, [first.ids, second.ids].concat());
        assert_eq!(whole.weights, [first.weights, second.weights].concat());
        let other = Simulator::new(Distribution::Uniform, 16, 3, 8).unwrap().draw(10);
        assert_ne!(whole.ids, other.ids);
    }

    #[test]
    fn recorded_rows_come_round_and_padding_has_no_weight() {
        let ids = vec![5, NO_EXPERT, 2, NO_EXPERT, NO_EXPERT, NO_EXPERT];
        let rows = simulator(Distribution::Recorded { ids: ids.clone() }, 3).draw(3);
        assert_eq!(rows.ids, [ids.as_slice(), &ids[..3]].concat());
        assert!(rows.weights[0] >= rows.weights[2] && rows.weights[1] == 0.0, "{:?}", rows.weights);
        assert!((rows.weights[0] + rows.weights[2] - 1.0).abs() < 1e-6, "{:?}", rows.weights);
        assert_eq!(rows.weights[3..6], [0.0; 3]);
    }

    #[rstest]
    #[case(Distribution::Uniform, 17, "top_k 17 is not in 1..=16 (num_experts)")]
    #[case(Distribution::Uniform, 0, "top_k 0 is not in 1..=16 (num_experts)")]
    #[case(
        Distribution::GroupLimited { n_group: 3, topk_group: 2 }, 2,
        "2 of 3 groups of 16 experts: groups must be equal and have at least 2 experts"
    )]
    #[case(
        Distribution::GroupLimited { n_group: 8, topk_group: 1 }, 3,
        "1 of 8 groups of 16 experts: groups must be equal and have at least 3 experts"
    )]
    #[case(Distribution::Zipf { exponent: -1.0 }, 2, "exponent of the Zipf distribution is -1")]
    #[case(Distribution::Zipf { exponent: f64::NAN }, 2, "exponent of the Zipf distribution is NaN")]
    #[case(Distribution::Recorded { ids: vec![] }, 2, "0 ids are recorded, wanted rows of 2")]
    #[case(Distribution::Recorded { ids: vec![1; 3] }, 2, "3 ids are recorded, wanted rows of 2")]
    #[case(
        Distribution::Recorded { ids: vec![0, 1, 3, 3] }, 2,
        "recorded row 1 has id 3, wanted -1 or distinct ids in 0..16"
    )]
    #[case(
        Distribution::Recorded { ids: vec![0, 16] }, 2,
        "recorded row 0 has id 16, wanted -1 or distinct ids in 0..16"
    )]
    fn refused(#[case] distribution: Distribution, #[case] top_k: usize, #[case] message: &str) {
        let error = Simulator::new(distribution, 16, top_k, 0).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}
