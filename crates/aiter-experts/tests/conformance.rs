//! The conformance suite.

use aiter_experts::AiterExperts;
use moe_conformance::conformance_experts;

conformance_experts!(AiterExperts::default(), floor: 111);
