//! Code objects and kernels.

use std::ffi::CString;
use std::sync::Arc;

use crate::driver::{Driver, Handle};
use crate::error::{DeviceError, DeviceResult};
use crate::stream::Stream;

/// A launch of a kernel, in one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Blocks; a launch of 0 does nothing.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// A loaded code object, unloaded when the last kernel of it is gone.
#[derive(Clone, Debug)]
pub struct Module {
    loaded: Arc<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    driver: Arc<dyn Driver>,
    handle: Handle,
}

impl Module {
    pub(crate) fn new(driver: &Arc<dyn Driver>, image: &[u8]) -> DeviceResult<Self> {
        // Drivers find the end of an object in its headers; without them they would read on.
        if !image.starts_with(b"\x7fELF") {
            let (device, text) = (driver.device(), format!("{} bytes that are no ELF object", image.len()));
            return Err(DeviceError { device, call: "load", code: -1, text });
        }
        // SAFETY: the image is an ELF object.
        let handle = unsafe { driver.load(image)? };
        Ok(Self { loaded: Arc::new(Loaded { driver: Arc::clone(driver), handle }) })
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// Of the driver if there is none.
    pub fn kernel(&self, name: &str) -> DeviceResult<Kernel> {
        let Loaded { driver, handle } = &*self.loaded;
        let c_name = CString::new(name).map_err(|_| DeviceError {
            device: driver.device(),
            call: "get a kernel",
            code: -1,
            text: format!("{name:?} is no name"),
        })?;
        // SAFETY: the module is alive, and lives as long as the kernel.
        let function = unsafe { driver.function(*handle, &c_name)? };
        Ok(Kernel { module: self.clone(), function })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: no kernel of the module is left.
        if let Err(error) = unsafe { self.driver.unload(self.handle) } {
            tracing::warn!(%error, "a code object stays loaded");
        }
    }
}

/// A kernel of a code object.
#[derive(Clone, Debug)]
pub struct Kernel {
    module: Module,
    function: Handle,
}

impl Kernel {
    /// Allows launches with up to `bytes` of dynamic shared memory, beyond the 48 KiB that all devices allow.
    ///
    /// # Errors
    /// Of the driver if the device has less.
    pub fn allow_shared(&self, bytes: u32) -> DeviceResult<()> {
        // SAFETY: the module is alive.
        unsafe { self.module.loaded.driver.allow_shared(self.function, bytes) }
    }

    /// Puts a run of the kernel on `stream`. `params` are the bytes of its one argument. Waits for nothing.
    ///
    /// # Errors
    /// Of the driver, for one if a block is too large.
    ///
    /// # Safety
    /// `params` is what the kernel takes: of the size, and naming memory of this device that stays there until the kernel has
    /// run, and that nothing else uses meanwhile unless the kernel allows it.
    pub unsafe fn launch(&self, dims: Dims, stream: &Stream, params: &[u8]) -> DeviceResult<()> {
        if dims.grid == 0 {
            return Ok(());
        }
        // SAFETY: module and stream are alive; the caller vouches for the argument.
        unsafe { self.module.loaded.driver.launch(self.function, dims, stream.handle(), params) }
    }
}
