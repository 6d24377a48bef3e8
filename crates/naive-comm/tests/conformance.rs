//! The conformance suite on every backend of this crate.

use moe_conformance::conformance_comm;
use naive_comm::{AllGatherReduceScatter, Local, Naive};

conformance_comm!(local, Local, floor = 22);
conformance_comm!(allgather_reducescatter, AllGatherReduceScatter, floor = 126);
conformance_comm!(naive, Naive, floor = 126);
