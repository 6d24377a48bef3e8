//! Whole rounds of the three backends over threads, with experts whose answer can be computed directly.

mod failures;
mod forwarding;
mod layer;
mod sizes;
