//! `fmoe bench`: what this machine does, beside what it can do at most.

pub mod calls;
mod clock;
pub mod comm;
pub mod experts;
mod experts_device;
mod experts_f32;
pub mod quant;
mod replays;
pub mod router;
