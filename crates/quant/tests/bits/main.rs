//! Every bit that the crate writes, against an independent reference, on every instruction set.

mod activations;
mod codec;
mod fp4;
mod golden;
mod isa;
mod reference;
mod refusals;
mod weights;
