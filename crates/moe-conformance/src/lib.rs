//! Oracle and conformance suite for authors of fused-moe backends.
//!
//! One line per backend in one of its `tests/`, and every case is a test of its own:
//!
//! ```
//! use moe_conformance::reference::{MonolithicExperts, ReferenceExperts};
//!
//! // A prepare/finalize provider (stages 2 and 4), experts (stage 3), and experts that route (stages 1 and 3).
//! moe_conformance::conformance_comm!(my_comm, moe_conformance::reference::BatchedComm, floor = 20);
//! moe_conformance::conformance_experts!(my_experts, ReferenceExperts, floor = 111);
//! moe_conformance::conformance_monolithic!(my_monolithic, MonolithicExperts, floor = 76);
//! ```
//!
//! A case ends as [`Outcome::Pass`], [`Outcome::Refused`] with reasons, or [`Outcome::Fail`]; nothing is skipped.
//! What is refused must be refused by the factory, too, and at least `floor` cases must pass. The name of a case
//! says what is checked, under which scheme and over how many ranks: `rows_block_ep8`. Ranks are threads unless
//! [`Settings::with_launcher`] says otherwise: with [`Spmd`] the suite runs as one rank of a group of processes.
//! Their heaps are [`Poisoned`](ep_transport::Poisoned): memory that a backend reads and no one wrote is NaN.
//!
//! | comm | checks |
//! |---|---|
//! | `rows`, `deferred`, `monolithic` | every row that a rank needs arrives once, byte for byte; combine is the exact sum; five rounds on one handle |
//! | `faultdispatch`, `faultexperts`, `faultdropped`, `faulttwo` | a rank fails, forgets a ticket: all ranks say the same, the next round is right |
//! | `foreignticket`, `twohandles`, `lostpeer` | tickets of another handle, two micro-batches in flight, a silent rank |
//! | `bytes`, `traffic` | buffers are as announced for any number of layers, rows are counted where they move |
//! | `layer` | with reference experts against the oracle |
//!
//! | experts | checks |
//! |---|---|
//! | `oracle` | every wire format they take, garbage behind the rows, poisoned memory, the same bits again |
//! | `foreignids` | ids of other ranks, -1, one expert, no rows |
//! | `gelu`, `gelutanh`, `swigluoai`, `clamped`, `bias`, `padding`, `gptoss` | `oracle` with another activation, biases, padding full of NaN |
//! | `stage1weight` | `oracle` with the routing weight on the input, applied by the experts |
//! | `weightbytes`, `packing` | FP8 weights stay FP8 and FP4 weights FP4, misfits are refused |
//! | `layer` | behind reference comms against the oracle |
//!
//! Inputs are random and new in every run; a failure prints the seed. [`oracle::Layer`] and [`layer::run`] serve
//! whoever wants to compare whole layers, [`saboteurs`] show that the suite finds what it is made to find.
//!
//! Backends on a device run by [`Settings::with_device`]: inputs are uploaded, outputs poisoned there and downloaded, sizes are
//! multiples of 128, and every round of [`layer::run`] is repeated from a graph that was recorded on other tokens. Bounds are made
//! as on the host, with what tensor cores cut off. Comms on a device are tested in layers alone.
//!
//! What it does not do: it measures no speed, and its [reference](mod@reference) backends are slow and on the host.

#![forbid(unsafe_code)]

mod device;
mod seed;
mod stored;

pub mod oracle;

pub mod bound;
mod case;
mod launcher;
mod metrics;
mod outcome;

pub mod layer;

pub mod reference;

mod batch;
mod comm_suite;
mod experts_suite;
mod macros;
mod monolithic_suite;
mod named;
mod shared;
mod suite;
mod wire;

pub mod saboteurs;

pub use bound::{Agreement, Expected, Rounding, TooFar};
pub use case::{Case, EP_SIZES, LayerWeights, RankInput, RoutingPattern, SCHEMES, TokenCounts, Topology};
pub use device::{Replay, TestDevice};
pub use launcher::{GroupSpec, Launcher, Spmd, Threads};
pub use metrics::{calc_diff, relative_l2};
pub use outcome::{Outcome, Settings};
pub use seed::Seed;
pub use suite::Suite;
