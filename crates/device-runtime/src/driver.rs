//! What a vendor's driver has to offer. Handles are the driver's own, as numbers.

use std::ffi::CStr;
use std::fmt::Debug;

use fused_moe_core::Device;

use crate::error::DeviceResult;
use crate::kernel::Dims;
use crate::runtime::DeviceInfo;

/// Bytes of what a copy engine is told of rows in memory.
pub(crate) const ROW_MAP_BYTES: usize = 128;

/// A stream, an event, a module, a function or a graph.
pub(crate) type Handle = u64;

/// One device of one driver.
///
/// # Safety
/// Handles come from the same driver and have not been destroyed; addresses are of this device's memory, or of host memory
/// where a slice says so. Methods may be called from any thread.
pub(crate) trait Driver: Debug + Send + Sync {
    fn device(&self) -> Device;
    fn info(&self) -> DeviceResult<DeviceInfo>;
    fn can_access(&self, peer: u32) -> DeviceResult<bool>;

    fn alloc(&self, bytes: usize) -> DeviceResult<u64>;
    unsafe fn free(&self, address: u64) -> DeviceResult<()>;
    /// Both wait until the copy is done.
    unsafe fn copy_in(&self, to: u64, from: &[u8]) -> DeviceResult<()>;
    unsafe fn copy_out(&self, to: &mut [u8], from: u64) -> DeviceResult<()>;
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, stream: Handle) -> DeviceResult<()>;
    /// `size.0` rows of `size.1` bytes, which begin `to.1` and `from.1` bytes apart.
    unsafe fn copy_rows(
        &self,
        to: (u64, usize),
        from: (u64, usize),
        size: (usize, usize),
        stream: Handle,
    ) -> DeviceResult<()>;
    /// What tells the copy engine that `rows` of `row_bytes` bytes begin at `address`, fetched `box_rows` at a time.
    unsafe fn row_map(
        &self,
        address: u64,
        rows: usize,
        row_bytes: u32,
        box_rows: u32,
    ) -> DeviceResult<[u8; ROW_MAP_BYTES]>;
    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, stream: Handle) -> DeviceResult<()>;

    fn create_stream(&self) -> DeviceResult<Handle>;
    unsafe fn destroy_stream(&self, stream: Handle) -> DeviceResult<()>;
    unsafe fn wait_stream(&self, stream: Handle) -> DeviceResult<()>;
    unsafe fn stream_waits(&self, stream: Handle, event: Handle) -> DeviceResult<()>;

    fn create_event(&self) -> DeviceResult<Handle>;
    unsafe fn destroy_event(&self, event: Handle) -> DeviceResult<()>;
    unsafe fn record(&self, event: Handle, stream: Handle) -> DeviceResult<()>;
    /// Waits for both; milliseconds.
    unsafe fn elapsed(&self, from: Handle, to: Handle) -> DeviceResult<f32>;

    /// `image` is an ELF object.
    unsafe fn load(&self, image: &[u8]) -> DeviceResult<Handle>;
    unsafe fn unload(&self, module: Handle) -> DeviceResult<()>;
    unsafe fn function(&self, module: Handle, name: &CStr) -> DeviceResult<Handle>;
    unsafe fn allow_shared(&self, function: Handle, bytes: u32) -> DeviceResult<()>;
    unsafe fn launch(&self, function: Handle, dims: Dims, stream: Handle, params: &[u8]) -> DeviceResult<()>;

    unsafe fn begin_capture(&self, stream: Handle) -> DeviceResult<()>;
    /// An executable graph.
    unsafe fn end_capture(&self, stream: Handle) -> DeviceResult<Handle>;
    unsafe fn replay(&self, graph: Handle, stream: Handle) -> DeviceResult<()>;
    unsafe fn destroy_graph(&self, graph: Handle) -> DeviceResult<()>;
}
