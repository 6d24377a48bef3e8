//! The conformance suite.

moe_conformance::conformance_comm!(batched, batched_comm::Batched, floor = 117);
