//! fmoe
fn main() {}
