//! Memory of a device.

use std::sync::Arc;

use fused_moe_core::{Allocation, DType, Device, DeviceMemory, Layout, TensorView, TensorViewMut, ViewError};

use crate::driver::Driver;
use crate::error::DeviceResult;
use crate::stream::Stream;

/// Bytes of a device's memory, freed with the value.
#[derive(Debug)]
pub struct DeviceBuffer {
    driver: Arc<dyn Driver>,
    address: u64,
    bytes: usize,
}

impl DeviceBuffer {
    pub(crate) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> DeviceResult<Self> {
        // Drivers refuse to allocate nothing, and an address is wanted all the same.
        let address = driver.alloc(bytes.max(1))?;
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// The device whose memory it is.
    pub fn device(&self) -> Device {
        self.driver.device()
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its start as a tensor without gaps, to lend to a call. Whoever writes the buffer next waits for the stream of that call
    /// first.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] if it is shorter.
    pub fn tensor(&self, dtype: DType, dims: &[usize]) -> Result<TensorView<'_>, ViewError> {
        // SAFETY: the allocation is this buffer's, and borrowed: `write` and `fill` need it exclusively.
        unsafe { TensorView::from_allocation(self.allocation(dtype), Layout::contiguous(dims)) }
    }

    /// As [`DeviceBuffer::tensor`], writable.
    ///
    /// # Errors
    /// As [`DeviceBuffer::tensor`].
    pub fn tensor_mut(&mut self, dtype: DType, dims: &[usize]) -> Result<TensorViewMut<'_>, ViewError> {
        // SAFETY: the allocation is this buffer's, and borrowed exclusively.
        unsafe { TensorViewMut::from_allocation(self.allocation(dtype), Layout::contiguous(dims)) }
    }

    fn allocation(&self, dtype: DType) -> Allocation {
        let base = std::ptr::without_provenance_mut(self.address as usize);
        Allocation { base, bytes: self.bytes, dtype, device: self.device() }
    }

    /// Copies `from` to its start, and waits until that is done.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Panics
    /// If `from` is longer than the buffer.
    pub fn write(&mut self, from: &[u8]) -> DeviceResult<()> {
        self.write_at(0, from)
    }

    /// Copies `from` to where `offset` bytes are before it, and waits until that is done.
    ///
    /// # Errors
    /// Of the driver.
    ///
    /// # Panics
    /// If `from` does not fit the rest of the buffer.
    pub fn write_at(&mut self, offset: usize, from: &[u8]) -> DeviceResult<()> {
        let fits = self.bytes.checked_sub(offset).is_some_and(|rest| from.len() <= rest);
        assert!(fits, "{} bytes at {offset} of a buffer of {}", from.len(), self.bytes);
        // SAFETY: the buffer is alive, and the rest of it at least as long as `from`.
        unsafe { self.driver.copy_in(self.address + offset as u64, from) }
    }

    /// Copies its start to `to`, and waits until that is done. Work on streams that do not wait for the default stream has to
    /// be waited for before.
    ///
    /// # Errors
    /// Of the driver; failures of kernels that ran before come up here, too.
    ///
    /// # Panics
    /// If `to` is longer than the buffer.
    pub fn read(&self, to: &mut [u8]) -> DeviceResult<()> {
        assert!(to.len() <= self.bytes, "{} bytes from a buffer of {}", to.len(), self.bytes);
        // SAFETY: the buffer is alive and at least as long as `to`.
        unsafe { self.driver.copy_out(to, self.address) }
    }

    /// Sets all bytes, in the order of `stream`.
    ///
    /// # Errors
    /// Of the driver.
    pub fn fill(&mut self, byte: u8, stream: &Stream) -> DeviceResult<()> {
        // SAFETY: the buffer and the stream are alive; a buffer is freed only after what uses it.
        unsafe { self.driver.fill(self.address, byte, self.bytes, stream.handle()) }
    }

    /// Copies as many bytes as both have from `from`, in the order of `stream`.
    ///
    /// # Errors
    /// Of the driver.
    pub fn copy_from(&mut self, from: &DeviceBuffer, stream: &Stream) -> DeviceResult<()> {
        let bytes = self.bytes.min(from.bytes);
        // SAFETY: both buffers and the stream are alive, and both are that long.
        unsafe { self.driver.copy(self.address, from.address, bytes, stream.handle()) }
    }
}

// SAFETY: a buffer is its own allocation, freed when it is dropped.
unsafe impl DeviceMemory for DeviceBuffer {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: nobody has the address but for work on streams, for which a driver's free waits.
        if let Err(error) = unsafe { self.driver.free(self.address) } {
            tracing::warn!(%error, "memory of a device is lost");
        }
    }
}
