//! Device code objects built from `kernels/`, and how they are launched.
//!
//! A kernel takes one plain struct, a [`KernelParams`], whose bytes are the same for HIP, CUDA and host SIMT. A [`Launch`] names
//! the kernel and says on how many blocks and threads it runs; [`Kernels`] puts it on a stream of a device.
//!
//! Objects are embedded if `cargo xtask kernels build` has made them before this crate is built; otherwise [`object()`]
//! says how to. With feature `host-simt` the same sources run on the CPU (module `host_simt`), slowly, as the tests want it.

#[cfg(feature = "aiter-co")]
pub mod aiter_co;
mod arch;
pub mod experts;
mod gpu;
pub mod grouped_gemm;
#[cfg(feature = "host-simt")]
pub mod host_simt;
mod launch;
mod loaded;
#[cfg(feature = "metadata")]
pub mod metadata;
pub mod pack;
pub mod quantize;
mod registry;
pub mod router;
#[cfg(feature = "host-simt")]
pub mod selftest;
pub mod sorting;
pub mod weighted_sum;

pub use arch::Arch;
pub use gpu::{Gpu, LentError, OpenError, Target};
pub use launch::{BadLaunch, Float, KernelParams, Launch};
pub use loaded::{Kernels, LoadError};
pub use registry::{NoObject, object, objects};
