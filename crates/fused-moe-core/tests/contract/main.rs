//! What the crate promises at its public seam.

mod allocation;
mod factory;
mod fault;
mod groups;
mod kernel;
mod layer;
mod ledger;
mod negotiate;
mod placement;
mod providers;
mod quantization;
mod reduce;
mod tensor;
mod toys;
mod traffic;
mod validation;
mod workspace;
