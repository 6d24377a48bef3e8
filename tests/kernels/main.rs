//! The device kernels, as far as a machine without a device can test them: as host SIMT against the host crates, and the
//! metadata of the objects that were built. `cargo xtask kernels test` runs this.

mod experts;
mod objects;
mod quantize;
mod router;
mod simt;
