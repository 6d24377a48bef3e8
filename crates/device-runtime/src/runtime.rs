//! Devices and how they are found.

use std::sync::Arc;

use fused_moe_core::{Device, DeviceAllocator, DeviceKind, DeviceMemory, DeviceStream, Source};

use crate::cuda;
use crate::driver::Driver;
use crate::error::{DeviceResult, Unavailable};
#[cfg(feature = "hip")]
use crate::hip;
use crate::kernel::Module;
use crate::memory::DeviceBuffer;
use crate::stream::{Event, Stream};

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As the vendor calls it.
    pub name: String,
    /// What code objects have to be for: `sm_90`, `gfx942`.
    pub arch: String,
    /// Version of the driver, as the vendor numbers them.
    pub driver_version: String,
    /// Multiprocessors, or compute units.
    pub compute_units: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of it that are free.
    pub free_bytes: u64,
}

/// One device. Clones are the same device.
#[derive(Clone, Debug)]
pub struct Runtime {
    driver: Arc<dyn Driver>,
}

/// How many devices of `kind` this machine has.
///
/// # Errors
/// [`Unavailable`] without a driver. A driver of CUDA without devices has 0; HIP does not tell the two apart.
pub fn device_count(kind: DeviceKind) -> Result<u32, Unavailable> {
    match kind {
        DeviceKind::Cuda => cuda::device_count(),
        #[cfg(feature = "hip")]
        DeviceKind::Hip => hip::device_count(),
        _ => Err(no_driver(kind)),
    }
}

fn no_driver(kind: DeviceKind) -> Unavailable {
    let cause = match kind {
        DeviceKind::Host => "the host needs no device runtime".to_owned(),
        DeviceKind::Hip => "this build is without feature `hip`".to_owned(),
        _ => "this build has no runtime for it".to_owned(),
    };
    Unavailable { kind, tried: vec![format!("drivers for {kind:?} in this build")], cause }
}

impl Runtime {
    /// Opens a device. Its primary context is shared with whatever else uses it in this process.
    ///
    /// # Errors
    /// [`Unavailable`] if there is no driver, no such device, or this build has no runtime for its kind.
    pub fn open(device: Device) -> Result<Self, Unavailable> {
        let driver: Arc<dyn Driver> = match device.kind {
            DeviceKind::Cuda => Arc::new(cuda::Cuda::open(device.index)?),
            #[cfg(feature = "hip")]
            DeviceKind::Hip => Arc::new(hip::Hip::open(device.index)?),
            kind => return Err(no_driver(kind)),
        };
        tracing::debug!(%device, "opened");
        Ok(Self { driver })
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.driver.device()
    }

    /// What it is, and how much of its memory is free now.
    ///
    /// # Errors
    /// Of the driver.
    pub fn info(&self) -> DeviceResult<DeviceInfo> {
        self.driver.info()
    }

    /// Whether kernels of this device can read and write the memory of device `peer` of the same kind.
    ///
    /// # Errors
    /// Of the driver, for one if there is no such device.
    pub fn can_access(&self, peer: u32) -> DeviceResult<bool> {
        self.driver.can_access(peer)
    }

    /// Allocates `bytes`, aligned to 256. Their values are whatever was there. Not for the path of a call: it may wait for
    /// the device.
    ///
    /// # Errors
    /// Of the driver, for one if there is not enough memory.
    pub fn alloc(&self, bytes: usize) -> DeviceResult<DeviceBuffer> {
        DeviceBuffer::new(&self.driver, bytes)
    }

    /// A map of `buffer` for the copy engine of NVIDIA's devices (a tensor map), in memory of the device: `buffer` as rows of
    /// `row_bytes` bytes, at most 256, of which `box_rows`, at most 256 too, are fetched at a time. It names the buffer, and is of
    /// no use once that is freed.
    ///
    /// # Errors
    /// Of the driver; on AMD's devices, that there is no such thing.
    pub fn row_map(
        &self,
        buffer: &DeviceBuffer,
        row_bytes: u32,
        box_rows: u32,
    ) -> DeviceResult<DeviceBuffer> {
        // Drivers refuse a map of nothing; that of an empty buffer is one that nobody uses.
        let rows = (buffer.bytes() / row_bytes.max(1) as usize).max(1);
        // SAFETY: the buffer is alive and has that many rows.
        let map = unsafe { self.driver.row_map(buffer.address(), rows, row_bytes, box_rows)? };
        let mut there = self.alloc(map.len())?;
        there.write(&map)?;
        Ok(there)
    }

    /// A new stream, which does not wait for the default stream.
    ///
    /// # Errors
    /// Of the driver.
    pub fn stream(&self) -> DeviceResult<Stream> {
        Stream::new(&self.driver)
    }

    /// A stream that an engine lends. It is not destroyed with the value, which is for the call that it was lent to.
    ///
    /// # Errors
    /// The stream, if it is one of another device.
    pub fn borrow_stream(&self, stream: DeviceStream) -> Result<Stream, DeviceStream> {
        if stream.device() != self.device() {
            return Err(stream);
        }
        Ok(Stream::lent(&self.driver, stream.handle()))
    }

    /// A new event, which takes times.
    ///
    /// # Errors
    /// Of the driver.
    pub fn event(&self) -> DeviceResult<Event> {
        Event::new(&self.driver)
    }

    /// Loads a code object.
    ///
    /// # Errors
    /// Of the driver, for one if it is for another device.
    pub fn load(&self, image: &[u8]) -> DeviceResult<Module> {
        Module::new(&self.driver, image)
    }
}

impl DeviceAllocator for Runtime {
    fn device(&self) -> Device {
        self.driver.device()
    }

    fn alloc_zeroed(&self, bytes: usize) -> Result<Box<dyn DeviceMemory>, Source> {
        let mut buffer = self.alloc(bytes)?;
        if bytes > 0 {
            let stream = self.stream()?;
            buffer.fill(0, &stream)?;
            stream.wait()?;
        }
        Ok(Box::new(buffer))
    }
}
