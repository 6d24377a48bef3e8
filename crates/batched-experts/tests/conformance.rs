//! The conformance suite. Its layers over several ranks are refused, since no reference comm serves those in the
//! batched format; the matrix of the workspace runs them with `batched`.

moe_conformance::conformance_experts!(batched, batched_experts::BatchedExperts::default(), floor = 89);
