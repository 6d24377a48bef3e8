//! See `moe_fuzz::checkpoint`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| moe_fuzz::checkpoint(bytes));
