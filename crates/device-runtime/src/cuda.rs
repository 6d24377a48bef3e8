//! CUDA, by the driver API. The library is loaded when a device is asked for.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use fused_moe_core::{Device, DeviceKind};

use crate::driver::{Driver, Handle, ROW_MAP_BYTES};
use crate::error::{DeviceError, DeviceResult, Unavailable};
use crate::kernel::Dims;
use crate::runtime::DeviceInfo;

/// A device and its primary context.
#[derive(Debug)]
pub(crate) struct Cuda {
    device: Device,
    number: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: a context may be made current in any thread, and every call does so first.
unsafe impl Send for Cuda {}
// SAFETY: as above; the driver API may be called from several threads at once.
unsafe impl Sync for Cuda {}

fn unavailable(cause: impl Into<String>) -> Unavailable {
    let tried = vec!["libcuda.so (NVIDIA's driver)".to_owned()];
    Unavailable { kind: DeviceKind::Cuda, tried, cause: cause.into() }
}

fn text(error: DriverError) -> String {
    let of = |found: Result<&CStr, DriverError>| {
        found.map_or_else(|_| String::new(), |t| t.to_string_lossy().into_owned())
    };
    format!("{}: {}", of(error.error_name()), of(error.error_string()))
}

/// The driver, started.
fn start() -> Result<(), Unavailable> {
    // SAFETY: it only tries to open the library. Other calls of the crate panic if it is not there.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("the driver's library cannot be loaded"));
    }
    result::init().map_err(|error| unavailable(text(error)))
}

pub(crate) fn device_count() -> Result<u32, Unavailable> {
    start()?;
    let count = result::device::get_count().map_err(|error| unavailable(text(error)))?;
    Ok(count.unsigned_abs())
}

impl Cuda {
    pub(crate) fn open(index: u32) -> Result<Self, Unavailable> {
        let count = device_count()?;
        if index >= count {
            return Err(unavailable(format!("no device {index} among {count}")));
        }
        let failed = |error| unavailable(text(error));
        let number = result::device::get(index as i32).map_err(failed)?;
        // SAFETY: the device exists.
        let context = unsafe { result::primary_ctx::retain(number) }.map_err(failed)?;
        Ok(Self { device: Device { kind: DeviceKind::Cuda, index }, number, context })
    }

    /// Runs `call` with the context current in this thread.
    fn call<T>(&self, call: &'static str, run: impl FnOnce() -> Result<T, DriverError>) -> DeviceResult<T> {
        // SAFETY: the context is retained as long as `self` lives.
        let done = unsafe { result::ctx::set_current(self.context) }.and_then(|()| run());
        done.map_err(|error| DeviceError {
            device: self.device,
            call,
            code: error.0 as i32,
            text: text(error),
        })
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> DeviceResult<i32> {
        // SAFETY: the device exists.
        self.call("cuDeviceGetAttribute", || unsafe { result::device::get_attribute(self.number, attribute) })
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: it was retained once.
        if let Err(error) = unsafe { result::primary_ctx::release(self.number) } {
            tracing::warn!(error = text(error), "a context is not released");
        }
    }
}

/// A handle as the driver's type. Events, modules and so on are all pointers.
fn raw<T>(handle: Handle) -> *mut T {
    ptr::with_exposed_provenance_mut(handle as usize)
}

fn handle<T>(pointer: *mut T) -> Handle {
    pointer.expose_provenance() as u64
}

// SAFETY of all calls below: the contract of `Driver` says that handles and addresses are alive and of this device.
impl Driver for Cuda {
    fn device(&self) -> Device {
        self.device
    }

    fn info(&self) -> DeviceResult<DeviceInfo> {
        use sys::CUdevice_attribute as A;
        let major = self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let units = self.attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut version = 0;
        // SAFETY: the pointer is to a number.
        self.call("cuDriverGetVersion", || unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
        let (free, total) = self.call("cuMemGetInfo", result::mem_get_info)?;
        Ok(DeviceInfo {
            name: self.call("cuDeviceGetName", || result::device::get_name(self.number))?,
            arch: format!("sm_{major}{minor}"),
            driver_version: format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
            compute_units: units.unsigned_abs(),
            memory_bytes: total as u64,
            free_bytes: free as u64,
        })
    }

    fn can_access(&self, peer: u32) -> DeviceResult<bool> {
        let mut can = 0;
        self.call("cuDeviceCanAccessPeer", || {
            let peer = result::device::get(peer as i32)?;
            // SAFETY: both devices exist, and the pointer is to a number.
            unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.number, peer) }.result()
        })?;
        Ok(can != 0)
    }

    fn alloc(&self, bytes: usize) -> DeviceResult<u64> {
        // SAFETY: the size is not 0, and whoever allocates knows that nothing is in the memory.
        self.call("cuMemAlloc", || unsafe { result::malloc_sync(bytes) })
    }

    unsafe fn free(&self, address: u64) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuMemFree", || unsafe { result::free_sync(address) })
    }

    unsafe fn copy_in(&self, to: u64, from: &[u8]) -> DeviceResult<()> {
        // The call may return when the bytes are on their way; streams that do not wait for the default one would be too early.
        // SAFETY: see above; the null handle is the default stream.
        self.call("cuMemcpyHtoD", || unsafe {
            result::memcpy_htod_sync(to, from)?;
            result::stream::synchronize(ptr::null_mut())
        })
    }

    unsafe fn copy_out(&self, to: &mut [u8], from: u64) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuMemcpyDtoH", || unsafe { result::memcpy_dtoh_sync(to, from) })
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, stream: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuMemcpyDtoDAsync", || unsafe { result::memcpy_dtod_async(to, from, bytes, raw(stream)) })
    }

    unsafe fn copy_rows(
        &self,
        (to, to_pitch): (u64, usize),
        (from, from_pitch): (u64, usize),
        (rows, row_bytes): (usize, usize),
        stream: Handle,
    ) -> DeviceResult<()> {
        let on_device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: on_device,
            srcHost: ptr::null(),
            srcDevice: from,
            srcArray: ptr::null_mut(),
            srcPitch: from_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: on_device,
            dstHost: ptr::null_mut(),
            dstDevice: to,
            dstArray: ptr::null_mut(),
            dstPitch: to_pitch,
            WidthInBytes: row_bytes,
            Height: rows,
        };
        // SAFETY: see above; the driver reads the description before it returns.
        self.call("cuMemcpy2DAsync", || unsafe { sys::cuMemcpy2DAsync_v2(&copy, raw(stream)) }.result())
    }

    unsafe fn row_map(
        &self,
        address: u64,
        rows: usize,
        row_bytes: u32,
        box_rows: u32,
    ) -> DeviceResult<[u8; ROW_MAP_BYTES]> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, pitch) = ([u64::from(row_bytes), rows as u64], [u64::from(row_bytes)]);
        let (of_box, steps) = ([row_bytes, box_rows], [1, 1]);
        // SAFETY: see above; the driver reads the arrays, which are as long as the rank says, and writes the map.
        self.call("cuTensorMapEncodeTiled", || unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2,
                raw(address),
                sizes.as_ptr(),
                pitch.as_ptr(),
                of_box.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
        })?;
        let mut bytes = [0; ROW_MAP_BYTES];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(map.opaque) {
            *to = word.to_ne_bytes();
        }
        Ok(bytes)
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, stream: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuMemsetD8Async", || unsafe { result::memset_d8_async(to, byte, bytes, raw(stream)) })
    }

    fn create_stream(&self) -> DeviceResult<Handle> {
        let kind = result::stream::StreamKind::NonBlocking;
        self.call("cuStreamCreate", || result::stream::create(kind)).map(handle)
    }

    unsafe fn destroy_stream(&self, stream: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuStreamDestroy", || unsafe { result::stream::destroy(raw(stream)) })
    }

    unsafe fn wait_stream(&self, stream: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuStreamSynchronize", || unsafe { result::stream::synchronize(raw(stream)) })
    }

    unsafe fn stream_waits(&self, stream: Handle, event: Handle) -> DeviceResult<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: see above.
        self.call("cuStreamWaitEvent", || unsafe {
            result::stream::wait_event(raw(stream), raw(event), flags)
        })
    }

    fn create_event(&self) -> DeviceResult<Handle> {
        self.call("cuEventCreate", || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)).map(handle)
    }

    unsafe fn destroy_event(&self, event: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuEventDestroy", || unsafe { result::event::destroy(raw(event)) })
    }

    unsafe fn record(&self, event: Handle, stream: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuEventRecord", || unsafe { result::event::record(raw(event), raw(stream)) })
    }

    unsafe fn elapsed(&self, from: Handle, to: Handle) -> DeviceResult<f32> {
        // SAFETY: see above.
        self.call("cuEventElapsedTime", || unsafe {
            result::event::synchronize(raw(to))?;
            result::event::elapsed(raw(from), raw(to))
        })
    }

    unsafe fn load(&self, image: &[u8]) -> DeviceResult<Handle> {
        // SAFETY: the contract of `Driver` says that the image is an ELF object, whose headers say where it ends.
        self.call("cuModuleLoadData", || unsafe { result::module::load_data(image.as_ptr().cast()) })
            .map(handle)
    }

    unsafe fn unload(&self, module: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuModuleUnload", || unsafe { result::module::unload(raw(module)) })
    }

    unsafe fn function(&self, module: Handle, name: &CStr) -> DeviceResult<Handle> {
        // SAFETY: see above.
        let found = self.call("cuModuleGetFunction", || unsafe {
            result::module::get_function(raw(module), name.to_owned())
        });
        found.map(handle)
    }

    unsafe fn allow_shared(&self, function: Handle, bytes: u32) -> DeviceResult<()> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: see above.
        self.call("cuFuncSetAttribute", || unsafe {
            result::function::set_function_attribute(raw(function), attribute, bytes as i32)
        })
    }

    unsafe fn launch(&self, function: Handle, dims: Dims, stream: Handle, params: &[u8]) -> DeviceResult<()> {
        let Dims { grid, block, shared_bytes } = dims;
        // One argument by value; the driver copies it before it returns.
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: see above; the driver reads the argument and does not write it.
        self.call("cuLaunchKernel", || unsafe {
            result::launch_kernel(
                raw(function),
                (grid, 1, 1),
                (block, 1, 1),
                shared_bytes,
                raw(stream),
                &mut arguments,
            )
        })
    }

    unsafe fn begin_capture(&self, stream: Handle) -> DeviceResult<()> {
        // Other threads may go on to allocate.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: see above.
        self.call("cuStreamBeginCapture", || unsafe { result::stream::begin_capture(raw(stream), mode) })
    }

    unsafe fn end_capture(&self, stream: Handle) -> DeviceResult<Handle> {
        // SAFETY: see above; the recorded graph is not needed once it has been made executable.
        self.call("cuStreamEndCapture", || unsafe {
            let graph = result::stream::end_capture(raw(stream))?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph)?;
            executable
        })
        .map(handle)
    }

    unsafe fn replay(&self, graph: Handle, stream: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuGraphLaunch", || unsafe { result::graph::launch(raw(graph), raw(stream)) })
    }

    unsafe fn destroy_graph(&self, graph: Handle) -> DeviceResult<()> {
        // SAFETY: see above.
        self.call("cuGraphExecDestroy", || unsafe { result::graph::exec_destroy(raw(graph)) })
    }
}
