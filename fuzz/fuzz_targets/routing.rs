//! See `moe_fuzz::routing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| moe_fuzz::routing(bytes));
