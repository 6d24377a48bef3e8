//! The conformance suite. Its layers over several ranks need a comm that serves them in the batched format: see
//! `tests/batched.rs` of the workspace.

moe_conformance::conformance_experts!(batched, batched_experts::BatchedExperts::default(), floor = 44);
