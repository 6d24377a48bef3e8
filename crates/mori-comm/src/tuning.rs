//! Launch geometry of the device kernels, and up to how many tokens the low-latency kernel is the faster one: measured
//! rows as data, and a heuristic where there is none.
//!
//! Rows are in `tuning/<arch>.csv`. The host's kernels have no geometry.
//!
//! ```
//! use fused_moe_core::DType;
//! use mori_comm::tuning::{Half, Problem, tune};
//! use mori_comm::KernelType;
//!
//! let mut problem = Problem {
//!     arch: "gfx950",
//!     kernel: KernelType::InterNodeV1,
//!     half: Half::Dispatch,
//!     dtype: DType::Fp8E4M3Fn,
//!     hidden: 7168,
//!     top_k: 8,
//!     tokens: 128,
//! };
//! let tuned = tune(&problem);
//! assert_eq!((tuned.launch.block_num, tuned.launch.rdma_block_num), (64, 32));
//! assert_eq!(tuned.source.to_string(), "gfx950.csv: InterNodeV1 dispatch fp8 7168 top-* 128 tokens");
//! problem.hidden = 4096;
//! assert_eq!(tune(&problem).source.to_string(), "heuristic");
//! ```

use std::sync::LazyLock;

use fused_moe_core::DType;

use crate::kernel_type::KernelType;

const FILES: [(&str, &str); 2] =
    [("gfx942", include_str!("../tuning/gfx942.csv")), ("gfx950", include_str!("../tuning/gfx950.csv"))];

/// Up to how many tokens per rank [`KernelType::InterNodeV1LL`] is taken for the faster one where nothing was measured.
const LOW_LATENCY_TOKENS: usize = 1024;

/// Which half of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// Dispatch.
    Dispatch,
    /// Combine.
    Combine,
}

impl Half {
    const fn name(self) -> &'static str {
        match self {
            Half::Dispatch => "dispatch",
            Half::Combine => "combine",
        }
    }
}

/// What is to be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem<'a> {
    /// Architecture as the compiler names it: `gfx942`.
    pub arch: &'a str,
    /// Kernel.
    pub kernel: KernelType,
    /// Which half of it.
    pub half: Half,
    /// Element type of the payload.
    pub dtype: DType,
    /// Elements of a token.
    pub hidden: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Tokens per rank.
    pub tokens: usize,
}

/// Geometry of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Thread blocks.
    pub block_num: u32,
    /// Of these, the first ones, which do the network's part; 0 inside a node, fewer than all between nodes.
    pub rdma_block_num: u32,
    /// Warps of a block.
    pub warps_per_block: u32,
}

/// Where a geometry is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A measured row.
    Row {
        /// File in `tuning/`.
        file: String,
        /// Kernel, half, element type, hidden, top-k and tokens of the row.
        key: String,
    },
    /// None was measured.
    Heuristic,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Row { file, key } => write!(f, "{file}: {key}"),
            Source::Heuristic => f.write_str("heuristic"),
        }
    }
}

/// An answer of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuned {
    /// What to launch.
    pub launch: Launch,
    /// Says who.
    pub source: Source,
}

/// A measured row.
#[derive(Debug, PartialEq)]
struct Row {
    arch: &'static str,
    kernel: &'static str,
    half: &'static str,
    dtype: &'static str,
    hidden: usize,
    /// `None` is any.
    top_k: Option<usize>,
    tokens: usize,
    launch: Launch,
    latency_us: f64,
}

static ROWS: LazyLock<Vec<Row>> = LazyLock::new(|| {
    let rows = |&(arch, text): &(&'static str, &'static str)| {
        let lines = text.lines().filter(|line| !line.starts_with('#')).skip(1);
        // The files are a part of this crate, and every line is tested to be a row.
        lines.filter_map(move |line| Row::parse(arch, line))
    };
    FILES.iter().flat_map(rows).collect()
});

impl Row {
    fn parse(arch: &'static str, line: &'static str) -> Option<Self> {
        let fields: Vec<&str> = line.split(',').collect();
        let [kernel, half, dtype, hidden, top_k, tokens, block_num, rdma_block_num, warps, latency_us] =
            fields.try_into().ok()?;
        Some(Self {
            arch,
            kernel,
            half,
            dtype,
            hidden: hidden.parse().ok()?,
            top_k: if top_k == "*" { None } else { Some(top_k.parse().ok()?) },
            tokens: tokens.parse().ok()?,
            launch: Launch {
                block_num: block_num.parse().ok()?,
                rdma_block_num: rdma_block_num.parse().ok()?,
                warps_per_block: warps.parse().ok()?,
            },
            latency_us: latency_us.parse().ok()?,
        })
    }

    fn source(&self) -> Source {
        let Self { kernel, half, dtype, hidden, tokens, .. } = self;
        let top_k = self.top_k.map_or("*".into(), |k| k.to_string());
        Source::Row {
            file: format!("{}.csv", self.arch),
            key: format!("{kernel} {half} {dtype} {hidden} top-{top_k} {tokens} tokens"),
        }
    }

    /// Whether the row is for the problem at some number of tokens, and some top-k that it does not contradict.
    fn is_for(&self, problem: &Problem<'_>) -> bool {
        let wanted = (problem.arch, problem.kernel.name(), problem.half.name(), problem.hidden);
        (self.arch, self.kernel, self.half, self.hidden) == wanted
            && Some(self.dtype) == short_name(problem.dtype)
            && self.top_k.is_none_or(|k| k == problem.top_k)
    }
}

/// The name of an element type in the files: both FP8 flavours move alike.
fn short_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::Bf16 => Some("bf16"),
        DType::Fp8E4M3Fn | DType::Fp8E4M3Fnuz => Some("fp8"),
        _ => None,
    }
}

/// The geometry for a problem: the row of its top-k, or else of any, with as many tokens or the next more that were
/// measured, or the most. Without such a row, what MoRI falls back to.
pub fn tune(problem: &Problem<'_>) -> Tuned {
    let rows = || ROWS.iter().filter(|row| row.is_for(problem));
    let rank = |row: &&Row| (row.top_k.is_none(), row.tokens);
    let enough = rows().filter(|row| row.tokens >= problem.tokens).min_by_key(rank);
    match enough.or_else(|| rows().max_by_key(|row| (row.top_k.is_some(), row.tokens))) {
        Some(row) => Tuned { launch: row.launch, source: row.source() },
        None => Tuned { launch: heuristic(problem.kernel), source: Source::Heuristic },
    }
}

const fn heuristic(kernel: KernelType) -> Launch {
    let (block_num, rdma_block_num, warps_per_block) = match kernel {
        KernelType::IntraNode => (128, 0, 16),
        KernelType::InterNodeV1 => (96, 64, 8),
        KernelType::InterNodeV1LL => (256, 128, 8),
    };
    Launch { block_num, rdma_block_num, warps_per_block }
}

/// Up to how many tokens per rank dispatch and combine together are no slower with [`KernelType::InterNodeV1LL`] than
/// with [`KernelType::InterNodeV1`]: the most of those that were measured with both, or a guess, and whether it is
/// measured.
pub fn low_latency_up_to(arch: &str, dtype: DType, hidden: usize) -> (usize, bool) {
    let latency = |kernel: KernelType, half: Half, dtype: DType, tokens: usize| {
        let problem = Problem { arch, kernel, half, dtype, hidden, top_k: 0, tokens };
        ROWS.iter().find(|row| row.is_for(&problem) && row.tokens == tokens).map(|row| row.latency_us)
    };
    let total = |kernel, tokens| {
        // Outputs come back in bf16, whatever tokens travel in.
        let combine = latency(kernel, Half::Combine, DType::Bf16, tokens)?;
        Some(latency(kernel, Half::Dispatch, dtype, tokens)? + combine)
    };
    let tokens = ROWS.iter().map(|row| row.tokens);
    let no_slower = tokens.filter(|&tokens| {
        let both = total(KernelType::InterNodeV1LL, tokens).zip(total(KernelType::InterNodeV1, tokens));
        both.is_some_and(|(low_latency, high_throughput)| low_latency <= high_throughput)
    });
    no_slower.max().map_or((LOW_LATENCY_TOKENS, false), |tokens| (tokens, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNELS: [KernelType; 3] =
        [KernelType::IntraNode, KernelType::InterNodeV1, KernelType::InterNodeV1LL];

    fn problem(
        kernel: KernelType,
        half: Half,
        dtype: DType,
        top_k: usize,
        tokens: usize,
    ) -> Problem<'static> {
        Problem { arch: "gfx942", kernel, half, dtype, hidden: 7168, top_k, tokens }
    }

    #[test]
    fn every_line_is_a_row_that_can_be_launched() {
        let lines: usize =
            FILES.iter().map(|(_, text)| text.lines().filter(|l| !l.starts_with('#')).count() - 1).sum();
        assert_eq!(ROWS.len(), lines);
        for row in ROWS.iter() {
            let Launch { block_num, rdma_block_num, warps_per_block } = row.launch;
            assert!(KERNELS.iter().any(|kernel| kernel.name() == row.kernel), "{row:?}");
            // All blocks on the network leave none for the node, which hangs MoRI.
            assert!(rdma_block_num < block_num, "{row:?}");
            assert_eq!(rdma_block_num == 0, row.kernel == "IntraNode", "{row:?}");
            assert!(["bf16", "fp8"].contains(&row.dtype) && row.latency_us > 0.0, "{row:?}");
            // A block has 1024 threads at most, a wavefront 64.
            assert!((1..=16).contains(&warps_per_block), "{row:?}");
        }
        for kernel in KERNELS {
            let Launch { block_num, rdma_block_num, .. } = heuristic(kernel);
            assert!(rdma_block_num < block_num);
        }
    }

    #[test]
    fn the_next_row_up_is_taken_and_the_last_beyond() {
        let key = |tokens| {
            tune(&problem(KernelType::InterNodeV1, Half::Dispatch, DType::Fp8E4M3Fnuz, 8, tokens))
                .source
                .to_string()
        };
        assert_eq!(key(1), "gfx942.csv: InterNodeV1 dispatch fp8 7168 top-* 64 tokens");
        assert_eq!(key(64), key(1));
        assert_eq!(key(65), "gfx942.csv: InterNodeV1 dispatch fp8 7168 top-* 128 tokens");
        assert_eq!(key(1 << 20), "gfx942.csv: InterNodeV1 dispatch fp8 7168 top-* 4096 tokens");
    }

    #[test]
    fn a_row_of_the_same_top_k_goes_before_one_of_any() {
        let key = |top_k| {
            tune(&problem(KernelType::IntraNode, Half::Combine, DType::Bf16, top_k, 100)).source.to_string()
        };
        assert_eq!(key(6), "gfx942.csv: IntraNode combine bf16 7168 top-6 128 tokens");
        assert_eq!(key(8), "gfx942.csv: IntraNode combine bf16 7168 top-* 128 tokens");
    }

    #[test]
    fn what_was_not_measured_is_a_heuristic() {
        let known = problem(KernelType::InterNodeV1LL, Half::Dispatch, DType::Fp8E4M3Fn, 8, 128);
        assert_ne!(tune(&known).source, Source::Heuristic);
        for unknown in [
            Problem { arch: "sm_90", ..known },
            Problem { hidden: 4096, ..known },
            Problem { dtype: DType::F16, ..known },
            // IntraNode's dispatch was measured for top-6 and top-16.
            Problem { kernel: KernelType::IntraNode, ..known },
        ] {
            assert_eq!(
                tune(&unknown),
                Tuned { launch: heuristic(unknown.kernel), source: Source::Heuristic }
            );
        }
    }

    #[test]
    fn low_latency_ends_where_the_tables_say() {
        assert_eq!(low_latency_up_to("gfx950", DType::Fp8E4M3Fn, 7168), (2048, true));
        assert_eq!(low_latency_up_to("gfx950", DType::Fp8E4M3Fn, 4096), (LOW_LATENCY_TOKENS, false));
        assert_eq!(low_latency_up_to("sm_90", DType::Bf16, 7168), (LOW_LATENCY_TOKENS, false));
    }
}
