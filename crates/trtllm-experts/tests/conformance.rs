//! The conformance suite, for both forms.

use moe_conformance::{conformance_experts, conformance_monolithic};
use trtllm_experts::{TrtllmExperts, TrtllmRoutedExperts};

conformance_monolithic!(monolithic, TrtllmExperts::default(), floor = 46);
conformance_experts!(routed, TrtllmRoutedExperts::default(), floor = 43);
