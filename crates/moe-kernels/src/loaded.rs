//! The kernels of one device, loaded.

use std::collections::BTreeMap;

use device_runtime::{DeviceError, Dims, Kernel, Runtime, Stream};
use fused_moe_core::Device;

use crate::arch::Arch;
use crate::grouped_gemm::{GemmScheme, SHARED_BYTES};
use crate::launch::{KernelParams, Launch};
use crate::registry::{NoObject, object};

/// Kernels by their object, for all devices.
const FOR_ALL: &[(&str, &[&str])] = &[
    ("quantize_1x128", &["quantize_1x128"]),
    ("quantize_per_token", &["quantize_per_token"]),
    ("moe_sorting", &["moe_sorting", "moe_sorting_count", "moe_sorting_place"]),
    ("router", &["router_128", "router_256", "router_512", "router_1024"]),
    ("weighted_sum", &["weighted_sum"]),
];

/// Why kernels cannot be had for a device.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// It is none of the devices that kernels are written for.
    #[error("no kernels for {arch} ({name}): there are some for {}", Arch::ALL.map(Arch::name).join(", "))]
    UnknownArch {
        /// What it calls itself.
        name: String,
        /// Its architecture.
        arch: String,
    },
    /// This build has no object for it.
    #[error(transparent)]
    NoObject(#[from] NoObject),
    /// The driver does not take the object.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// All kernels, loaded on one device. Launching one allocates nothing and waits for nothing.
#[derive(Debug)]
pub struct Kernels {
    device: Device,
    arch: Arch,
    loaded: BTreeMap<&'static str, Kernel>,
}

impl Kernels {
    /// Loads them.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(runtime: &Runtime) -> Result<Self, LoadError> {
        let info = runtime.info()?;
        // Objects for sm_90a run on every sm_90.
        let of_device = |arch: &Arch| {
            arch.name().trim_end_matches('a') == info.arch.split(':').next().unwrap_or_default()
        };
        let arch = Arch::ALL.into_iter().find(of_device);
        let arch = arch.ok_or(LoadError::UnknownArch { name: info.name, arch: info.arch })?;
        let mut loaded = BTreeMap::new();
        for &(name, kernels) in FOR_ALL {
            let module = runtime.load(object(arch, name)?)?;
            for &kernel in kernels {
                loaded.insert(kernel, module.kernel(kernel)?);
            }
        }
        for (name, kernels) in GemmScheme::ALL.map(|scheme| scheme.kernels(arch)) {
            let module = runtime.load(object(arch, name)?)?;
            for kernel in kernels {
                let found = module.kernel(kernel)?;
                if arch == Arch::Sm90a {
                    found.allow_shared(SHARED_BYTES)?;
                }
                loaded.insert(kernel, found);
            }
        }
        Ok(Self { device: runtime.device(), arch, loaded })
    }

    /// What they are compiled for.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Puts a run on `stream`.
    ///
    /// # Errors
    /// Of the driver, or that this device has no such kernel.
    ///
    /// # Safety
    /// The memory that the params name is this device's, as large as the kernel takes it for, stays there until it has run, and
    /// is not used by anything else meanwhile.
    pub unsafe fn launch<P: KernelParams>(
        &self,
        launch: &Launch<P>,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let Launch { kernel, grid, block, shared_bytes, ref params } = *launch;
        let found = self.loaded.get(kernel).ok_or_else(|| DeviceError {
            device: self.device,
            call: "launch",
            code: -1,
            text: format!("no kernel {kernel} for {}", self.arch),
        })?;
        let dims = Dims { grid, block, shared_bytes };
        // SAFETY: `KernelParams` is the struct that the kernel reads; the caller vouches for the memory.
        unsafe { found.launch(dims, stream, params.as_bytes()) }
    }
}
