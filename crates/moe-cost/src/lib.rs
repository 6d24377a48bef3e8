//! What dispatch and combine cost on a machine: from what a backend moves per token and link, microseconds.
//!
//! A half takes `α + tokens · β`. β is the time of a token's bytes on the link that takes longest, since a protocol keeps
//! all of them busy at once; collectives cross theirs one after the other, so theirs add up. α and the bandwidth that is
//! reached are constants of a machine and a [`fused_moe_core::Protocol`], read from a file: [`Machine::named`] has those
//! of published tables, with the source of each in a comment.
//!
//! ```
//! use fused_moe_core::{CommTraffic, PerLink, Protocol};
//! use moe_cost::{CostModel, Machine};
//!
//! let machine = Machine::named("mi300x")?;
//! let traffic = CommTraffic {
//!     protocol: Protocol::ONE_HOP,
//!     dispatch: PerLink { scale_up: 34_600.0, network: 0.0 },
//!     combine: PerLink { scale_up: 66_400.0, network: 0.0 },
//! };
//! let cost = machine.layer(&traffic, 128)?;
//! assert!((cost.dispatch - 41.1).abs() < 0.1 && (cost.combine - 47.3).abs() < 0.1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`published`] holds figures that others have published, and says of each whether a constant was fitted to it or the
//! model predicts it. [`vllm_28664`] takes the speed-ups of one pull request apart.
//!
//! What this crate does not do: it knows no backend, and nothing about load that is uneven over ranks, experts that
//! compute at the same time, or a network that others use too.

#![forbid(unsafe_code)]

mod machine;
mod model;
pub mod published;
pub mod vllm_28664;

pub use machine::{Machine, MachineError};
pub use model::{CostError, CostModel, Half, LayerCost};
