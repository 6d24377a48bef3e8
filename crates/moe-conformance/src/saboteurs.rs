//! Backends with one bug each. The suite must fail every one of them: that is the test of the tests.
//!
//! ```
//! use moe_conformance::{Suite, saboteurs::BrokenComm};
//!
//! assert!(Suite::comm(BrokenComm::LocalOnly).outcome("rows_none_ep2").is_fail());
//! ```

mod comm;
mod experts;
mod roundings;

pub use comm::BrokenComm;
pub use experts::BrokenExperts;
pub use roundings::SlightlyBrokenExperts;
