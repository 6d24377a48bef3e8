//! The device kernels, as far as a machine without a device can test them: as host SIMT against the host crates, and the
//! metadata of the objects that were built. `cargo xtask kernels test` runs this.

mod experts;
mod grouped_gemm;
mod mfma;
mod objects;
mod quantize;
#[allow(dead_code, reason = "the tests on a device use more of it")]
#[path = "../device/reference.rs"]
mod reference;
mod router;
mod simt;
