//! AITER's own one-stage fused-MoE code objects, for who has them: the `hsa` folder of the wheel `amd-aiter`. None is in this
//! repository.
//!
//! Compiled and checked, not run: what an object says about its arguments is held against [`FusedMoeParams`] before it is loaded,
//! and nobody has launched one from here.
//!
//! One kernel does gemm1, the activation, the second quantisation (in registers, so without the rounding to bf16 of the other
//! experts), gemm2, the weights and the sum. Only persistent kernels are used: their grid is a matter of the device, so a
//! launch does not depend on how many tokens there are, and can be captured.
//!
//! ```no_run
//! use device_runtime::Runtime;
//! use fused_moe_core::{Device, DeviceKind};
//! use moe_kernels::Arch;
//! use moe_kernels::aiter_co::{FusedMoe, Gate, Manifest, MoeBuffers, OneStageKernel, Scheme, Sizes};
//!
//! # fn on_lent_buffers(buffers: MoeBuffers) -> Result<(), Box<dyn std::error::Error>> {
//! let runtime = Runtime::open(Device { kind: DeviceKind::Hip, index: 0 })?;
//! let units = runtime.info()?.compute_units;
//! let manifest = Manifest::read("aiter_meta/hsa".as_ref(), Arch::Gfx942, Scheme::PerToken, Gate::Silu)?;
//! let sizes = Sizes { rows: 128, hidden: 7168, intermediate: 2048, experts: 32, top_k: 8 };
//! let tile = manifest.choose(&sizes, units)?;
//! let kernel = OneStageKernel::load(&runtime, &tile.object()?)?;
//! let launch = FusedMoe { sizes, tile, compute_units: units }.launch(&buffers)?;
//! // SAFETY: the buffers are as `MoeBuffers` says.
//! unsafe { kernel.launch(&launch, &runtime.stream()?)? };
//! # Ok(())
//! # }
//! ```

mod arguments;
mod error;
mod loaded;
mod manifest;
mod moe;
mod shuffle;

pub use arguments::{FusedMoeParams, check_arguments};
pub use error::{AiterCoError, ArgumentMismatch};
pub use loaded::{AiterObject, OneStageKernel};
pub use manifest::{Gate, Manifest, Scheme, Tile};
pub use moe::{FusedMoe, MoeBuffers, OneStageLaunch, Sizes};
pub use shuffle::shuffle_weights;
