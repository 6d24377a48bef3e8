//! Whole rounds of the three backends over threads, with experts whose answer can be computed directly.

mod forwarding;
mod layer;
mod sizes;
