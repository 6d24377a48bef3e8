//! Oracle and conformance suite for authors of fused-moe backends.

#![forbid(unsafe_code)]

mod seed;

pub mod oracle;

mod case;
mod metrics;
mod outcome;

pub mod layer;

pub mod reference;

pub use case::{Case, EP_SIZES, LayerWeights, RankInput, RoutingPattern, SCHEMES, TokenCounts};
pub use metrics::{TooFar, calc_diff, compare, relative_l2, tolerance};
pub use outcome::{Outcome, Settings};
pub use seed::Seed;
