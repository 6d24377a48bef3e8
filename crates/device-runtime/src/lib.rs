//! Devices, streams, memory, kernels and graphs of GPUs, behind one small interface.
//!
//! A [`Runtime`] is one device. CUDA's driver is found when it is opened: nothing is linked, and a machine without one gets
//! [`Unavailable`] with what was tried. HIP needs feature `hip`, which links the runtime of the ROCm that the build finds, or of
//! Debian's `libamdhip64-dev` with `HIP_PATH=/usr`: compiled for gfx942/gfx950, not run.
//!
//! An engine that has a stream or buffers of its own lends them as raw handles ([`Runtime::borrow_stream`], addresses in a kernel's
//! params); nothing is copied, and no call but [`Stream::wait`], the copies to the host and [`Event::elapsed`] waits for the
//! device.
//!
//! ```no_run
//! use device_runtime::{Dims, Runtime};
//! use fused_moe_core::{Device, DeviceKind};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (image, params): (&[u8], &[u8]) = (&[], &[]);
//! let runtime = Runtime::open(Device { kind: DeviceKind::Cuda, index: 0 })?;
//! let stream = runtime.stream()?;
//! let kernel = runtime.load(image)?.kernel("quantize_1x128")?;
//! // SAFETY: `params` is what the kernel takes, and the memory that it names is there.
//! unsafe { kernel.launch(Dims { grid: 128, block: 256, shared_bytes: 0 }, &stream, params)? };
//! stream.wait()?;
//! # Ok(())
//! # }
//! ```

mod cuda;
mod driver;
mod error;
mod graph;
#[cfg(feature = "hip")]
mod hip;
mod kernel;
mod memory;
mod runtime;
mod stream;

pub use error::{DeviceError, DeviceResult, Unavailable};
pub use graph::Graph;
pub use kernel::{Dims, Kernel, Module};
pub use memory::DeviceBuffer;
pub use runtime::{DeviceInfo, Runtime, device_count};
pub use stream::{Event, Stream};
