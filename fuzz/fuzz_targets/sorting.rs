//! See `moe_fuzz::sorting`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| moe_fuzz::sorting(bytes));
