//! How a sort runs: AITER's `dispatch_policy` by name.

use std::fmt;
use std::str::FromStr;

/// How (token, slot) pairs are sorted. The result is the same bits whichever is chosen; only the time differs.
///
/// AITER calls it `dispatch_policy` and numbers it 0, 1, 2 in the order of the variants. There it chooses between one
/// kernel that keeps all tokens in LDS and several kernels with a workspace. Here it chooses between one thread and
/// all of them.
///
/// What others measured, on AMD Instinct GPUs with AITER's kernels (no AMD GPU was used for this crate, whose `Auto`
/// goes by times on a CPU):
///
/// - vLLM PR 39177 ran models under all policies: 0 (auto) was best for DeepSeek, MiniMax-M2.5 and gpt-oss-120b, 2
///   (multi-phase) only for Qwen3-Next-80B. So the default is auto, and the policy is a setting of whoever builds the
///   layer, read once.
/// - AITER #2576: the parameter was annotated `bool` on its way, which turned 2 into `true` and that into 1. Fixed
///   (#2639), policy 2 gave Qwen3-Next-80B FP8 on an MI355X 1551.8 tokens/s where it had been 1527.8 (+1.6 %). An enum
///   has no such conversion.
///
/// ```
/// use aiter_experts::SortPolicy;
///
/// assert_eq!("multi".parse(), Ok(SortPolicy::MultiPhase));
/// assert_eq!(SortPolicy::default().to_string(), "auto");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SortPolicy {
    /// One of the others, by [`SortPolicy::for_batch`].
    #[default]
    Auto,
    /// One thread visits the pairs once and chains those of each expert.
    SinglePass,
    /// Threads count the pairs of each expert in chunks of tokens, places are summed over experts and chunks, and
    /// threads scatter the pairs.
    MultiPhase,
}

/// What [`SortPolicy::Auto`] goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SortBatch {
    /// (token, slot) pairs: tokens times top-k.
    pub pairs: usize,
    /// Local experts.
    pub experts: usize,
    /// Threads that may take part.
    pub threads: usize,
}

/// Where several phases begin to pay.
struct Thresholds {
    /// Threads without which there is nothing to gain: the phases visit the pairs twice.
    threads: usize,
    /// Pairs below which starting the threads costs more than they save.
    pairs: usize,
    /// Pairs for each counter of an expert in a chunk, below which summing the counters costs more.
    pairs_per_counter: usize,
}

const THRESHOLDS: Thresholds = Thresholds { threads: 2, pairs: 1 << 16, pairs_per_counter: 4 };

impl SortPolicy {
    /// All policies, in AITER's order.
    pub const ALL: [Self; 3] = [Self::Auto, Self::SinglePass, Self::MultiPhase];

    /// The policy that runs for a batch; never [`SortPolicy::Auto`].
    pub fn for_batch(self, batch: SortBatch) -> Self {
        let SortBatch { pairs, experts, threads } = batch;
        match self {
            SortPolicy::Auto
                if threads >= THRESHOLDS.threads
                    && pairs >= THRESHOLDS.pairs
                    && pairs / THRESHOLDS.pairs_per_counter >= experts.saturating_mul(super::MAX_CHUNKS) =>
            {
                SortPolicy::MultiPhase
            }
            SortPolicy::Auto => SortPolicy::SinglePass,
            chosen => chosen,
        }
    }

    /// Name as it is parsed and printed.
    pub const fn name(self) -> &'static str {
        match self {
            SortPolicy::Auto => "auto",
            SortPolicy::SinglePass => "single",
            SortPolicy::MultiPhase => "multi",
        }
    }
}

impl fmt::Display for SortPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no policy has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no sort policy (auto, single, multi)")]
pub struct UnknownSortPolicy {
    /// The name.
    pub name: String,
}

impl FromStr for SortPolicy {
    type Err = UnknownSortPolicy;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|policy| policy.name() == name);
        named.ok_or_else(|| UnknownSortPolicy { name: name.into() })
    }
}
