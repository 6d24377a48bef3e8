//! `fmoe bench`: what this machine does, beside what it can do at most.

pub mod calls;
mod clock;
pub mod comm;
pub mod experts;
pub mod quant;
