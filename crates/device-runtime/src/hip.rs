//! HIP, by the runtime that the build was linked with. Compiled for gfx942/gfx950, not run.
//!
//! Only functions that are the same from HIP 5 to 7 are called. So there are no `hipDeviceProp_t`, whose fields have moved, and no
//! `hipFuncSetAttribute`, which does not take functions of modules.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem::transmute;
use std::ptr;

use fused_moe_core::{Device, DeviceKind};
use hip_sys::hiprt as sys;

use crate::driver::{Driver, Handle, ROW_MAP_BYTES};
use crate::error::{DeviceError, DeviceResult, Unavailable};
use crate::kernel::Dims;
use crate::runtime::DeviceInfo;

macro_rules! functions {
    ($($name:ident($($parameter:ty),*);)*) => {
        /// Functions of HIP, with the number that they return instead of the binding's enum: a newer HIP has errors that the
        /// enum lacks, and a value that an enum lacks must not exist.
        #[allow(non_upper_case_globals)]
        mod hip {
            use super::*;

            $(pub(super) const $name: unsafe extern "C" fn($($parameter),*) -> u32 =
                // SAFETY: `hipError_t` is `repr(u32)`, so both are called in the same way.
                unsafe {
                    transmute::<
                        unsafe extern "C" fn($($parameter),*) -> sys::hipError_t,
                        unsafe extern "C" fn($($parameter),*) -> u32,
                    >(sys::$name)
                };)*
        }
    };
}

functions! {
    hipRuntimeGetVersion(*mut c_int);
    hipGetDeviceCount(*mut c_int);
    hipSetDevice(c_int);
    hipDeviceGetAttribute(*mut c_int, sys::hipDeviceAttribute_t, c_int);
    hipDeviceGetName(*mut c_char, c_int, c_int);
    hipDeviceCanAccessPeer(*mut c_int, c_int, c_int);
    hipMemGetInfo(*mut usize, *mut usize);
    hipMalloc(*mut *mut c_void, usize);
    hipFree(*mut c_void);
    hipMemcpyHtoD(*mut c_void, *mut c_void, usize);
    hipMemcpyDtoH(*mut c_void, *mut c_void, usize);
    hipMemcpyDtoDAsync(*mut c_void, *mut c_void, usize, sys::hipStream_t);
    hipMemcpy2DAsync(
        *mut c_void,
        usize,
        *const c_void,
        usize,
        usize,
        usize,
        sys::hipMemcpyKind,
        sys::hipStream_t
    );
    hipMemsetD8Async(*mut c_void, u8, usize, sys::hipStream_t);
    hipStreamCreateWithFlags(*mut sys::hipStream_t, c_uint);
    hipStreamDestroy(sys::hipStream_t);
    hipStreamSynchronize(sys::hipStream_t);
    hipStreamWaitEvent(sys::hipStream_t, sys::hipEvent_t, c_uint);
    hipEventCreateWithFlags(*mut sys::hipEvent_t, c_uint);
    hipEventDestroy(sys::hipEvent_t);
    hipEventRecord(sys::hipEvent_t, sys::hipStream_t);
    hipEventSynchronize(sys::hipEvent_t);
    hipEventElapsedTime(*mut f32, sys::hipEvent_t, sys::hipEvent_t);
    hipModuleLoadData(*mut sys::hipModule_t, *const c_void);
    hipModuleUnload(sys::hipModule_t);
    hipModuleGetFunction(*mut sys::hipFunction_t, sys::hipModule_t, *const c_char);
    hipModuleLaunchKernel(
        sys::hipFunction_t, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, sys::hipStream_t,
        *mut *mut c_void, *mut *mut c_void
    );
    hipStreamBeginCapture(sys::hipStream_t, sys::hipStreamCaptureMode);
    hipStreamEndCapture(sys::hipStream_t, *mut sys::hipGraph_t);
    hipGraphInstantiateWithFlags(*mut sys::hipGraphExec_t, sys::hipGraph_t, c_ulonglong);
    hipGraphDestroy(sys::hipGraph_t);
    hipGraphLaunch(sys::hipGraphExec_t, sys::hipStream_t);
    hipGraphExecDestroy(sys::hipGraphExec_t);
}

/// Name and text of an error, which may be one that the binding's enum lacks.
fn text(code: u32) -> String {
    type OfEnum = unsafe extern "C" fn(sys::hipError_t) -> *const c_char;
    type OfNumber = unsafe extern "C" fn(u32) -> *const c_char;
    let of = |function: OfEnum| {
        // SAFETY: `hipError_t` is `repr(u32)`, so both are called in the same way.
        let found = unsafe { transmute::<OfEnum, OfNumber>(function)(code) };
        // SAFETY: HIP's texts are constants that end with 0.
        if found.is_null() { "".into() } else { unsafe { CStr::from_ptr(found) }.to_string_lossy() }
    };
    match (of(sys::hipGetErrorName), of(sys::hipGetErrorString)) {
        // HIP 5 has no other text than the name.
        (name, text) if name == text => name.into_owned(),
        (name, text) => format!("{name}: {text}"),
    }
}

fn unavailable(cause: impl Into<String>) -> Unavailable {
    let tried = vec!["libamdhip64.so (AMD's HIP runtime)".to_owned()];
    Unavailable { kind: DeviceKind::Hip, tried, cause: cause.into() }
}

/// A runtime without AMD's kernel driver says that there is no device, and so does one with a driver and no device.
pub(crate) fn device_count() -> Result<u32, Unavailable> {
    let mut count = 0;
    // SAFETY: the pointer is to a number.
    match unsafe { hip::hipGetDeviceCount(&mut count) } {
        0 => Ok(count.unsigned_abs()),
        code => Err(unavailable(format!("{} ({code})", text(code)))),
    }
}

/// A device and its primary context.
#[derive(Debug)]
pub(crate) struct Hip {
    device: Device,
}

/// Calls a function of HIP with the device current in this thread.
macro_rules! call {
    ($self:ident, $name:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: the contract of `Driver` says that handles and addresses are alive and of this device; all other pointers are
        // to variables of the caller.
        $self.call(stringify!($name), || unsafe { hip::$name($($argument),*) })
    };
}

impl Hip {
    pub(crate) fn open(index: u32) -> Result<Self, Unavailable> {
        let count = device_count()?;
        if index >= count {
            return Err(unavailable(format!("no device {index} among {count}")));
        }
        Ok(Self { device: Device { kind: DeviceKind::Hip, index } })
    }

    fn call(&self, call: &'static str, run: impl FnOnce() -> u32) -> DeviceResult<()> {
        // SAFETY: it takes a number.
        let code = match unsafe { hip::hipSetDevice(self.number()) } {
            0 => run(),
            code => code,
        };
        match code {
            0 => Ok(()),
            code => Err(DeviceError { device: self.device, call, code: code as i32, text: text(code) }),
        }
    }

    fn number(&self) -> c_int {
        self.device.index as c_int
    }

    fn attribute(&self, attribute: sys::hipDeviceAttribute_t) -> DeviceResult<u32> {
        let mut value = 0;
        call!(self, hipDeviceGetAttribute(&mut value, attribute, self.number()))?;
        Ok(value.unsigned_abs())
    }
}

/// What objects have to be for. HIP gives the stepping only with fields that move from version to version; of these families one
/// was sold.
fn arch(major: u32, minor: u32) -> String {
    match (major, minor) {
        (9, 4) => "gfx942".to_owned(),
        (9, 5) => "gfx950".to_owned(),
        _ => format!("gfx{major}{minor:x}x"),
    }
}

/// A handle as HIP's type, or an address.
fn raw<T>(handle: Handle) -> *mut T {
    ptr::with_exposed_provenance_mut(handle as usize)
}

fn handle<T>(pointer: *mut T) -> Handle {
    pointer.expose_provenance() as u64
}

impl Driver for Hip {
    fn device(&self) -> Device {
        self.device
    }

    fn info(&self) -> DeviceResult<DeviceInfo> {
        use sys::hipDeviceAttribute_t as A;
        let major = self.attribute(A::hipDeviceAttributeComputeCapabilityMajor)?;
        let minor = self.attribute(A::hipDeviceAttributeComputeCapabilityMinor)?;
        let mut name: [c_char; 256] = [0; 256];
        // One less, so that there is a 0 behind whatever it writes.
        call!(self, hipDeviceGetName(name.as_mut_ptr(), 255, self.number()))?;
        let mut version = 0;
        call!(self, hipRuntimeGetVersion(&mut version))?;
        let (mut free, mut total) = (0, 0);
        call!(self, hipMemGetInfo(&mut free, &mut total))?;
        Ok(DeviceInfo {
            // SAFETY: it ends with 0, see above.
            name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
            arch: arch(major, minor),
            driver_version: format!(
                "HIP {}.{}.{}",
                version / 10_000_000,
                version / 100_000 % 100,
                version % 100_000
            ),
            compute_units: self.attribute(A::hipDeviceAttributeMultiprocessorCount)?,
            memory_bytes: total as u64,
            free_bytes: free as u64,
        })
    }

    fn can_access(&self, peer: u32) -> DeviceResult<bool> {
        let mut can = 0;
        call!(self, hipDeviceCanAccessPeer(&mut can, self.number(), peer as c_int))?;
        Ok(can != 0)
    }

    fn alloc(&self, bytes: usize) -> DeviceResult<u64> {
        let mut address = ptr::null_mut();
        call!(self, hipMalloc(&mut address, bytes))?;
        Ok(handle(address))
    }

    unsafe fn free(&self, address: u64) -> DeviceResult<()> {
        call!(self, hipFree(raw(address)))
    }

    unsafe fn copy_in(&self, to: u64, from: &[u8]) -> DeviceResult<()> {
        // It only reads, whatever the binding says.
        call!(self, hipMemcpyHtoD(raw(to), from.as_ptr().cast_mut().cast(), from.len()))
    }

    unsafe fn copy_out(&self, to: &mut [u8], from: u64) -> DeviceResult<()> {
        call!(self, hipMemcpyDtoH(to.as_mut_ptr().cast(), raw(from), to.len()))
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, stream: Handle) -> DeviceResult<()> {
        call!(self, hipMemcpyDtoDAsync(raw(to), raw(from), bytes, raw(stream)))
    }

    unsafe fn copy_rows(
        &self,
        (to, to_pitch): (u64, usize),
        (from, from_pitch): (u64, usize),
        (rows, row_bytes): (usize, usize),
        stream: Handle,
    ) -> DeviceResult<()> {
        let (from, kind): (*mut c_void, _) = (raw(from), sys::hipMemcpyKind::hipMemcpyDeviceToDevice);
        call!(
            self,
            hipMemcpy2DAsync(
                raw(to),
                to_pitch,
                from.cast_const(),
                from_pitch,
                row_bytes,
                rows,
                kind,
                raw(stream)
            )
        )
    }

    unsafe fn row_map(&self, _: u64, _: usize, _: u32, _: u32) -> DeviceResult<[u8; ROW_MAP_BYTES]> {
        let text = "AMD's devices have no copy engine that takes maps of rows".to_owned();
        Err(DeviceError { device: self.device, call: "row_map", code: -1, text })
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, stream: Handle) -> DeviceResult<()> {
        call!(self, hipMemsetD8Async(raw(to), byte, bytes, raw(stream)))
    }

    fn create_stream(&self) -> DeviceResult<Handle> {
        let mut stream = ptr::null_mut();
        call!(self, hipStreamCreateWithFlags(&mut stream, sys::hipStreamNonBlocking))?;
        Ok(handle(stream))
    }

    unsafe fn destroy_stream(&self, stream: Handle) -> DeviceResult<()> {
        call!(self, hipStreamDestroy(raw(stream)))
    }

    unsafe fn wait_stream(&self, stream: Handle) -> DeviceResult<()> {
        call!(self, hipStreamSynchronize(raw(stream)))
    }

    unsafe fn stream_waits(&self, stream: Handle, event: Handle) -> DeviceResult<()> {
        call!(self, hipStreamWaitEvent(raw(stream), raw(event), 0))
    }

    fn create_event(&self) -> DeviceResult<Handle> {
        let mut event = ptr::null_mut();
        call!(self, hipEventCreateWithFlags(&mut event, sys::hipEventDefault))?;
        Ok(handle(event))
    }

    unsafe fn destroy_event(&self, event: Handle) -> DeviceResult<()> {
        call!(self, hipEventDestroy(raw(event)))
    }

    unsafe fn record(&self, event: Handle, stream: Handle) -> DeviceResult<()> {
        call!(self, hipEventRecord(raw(event), raw(stream)))
    }

    unsafe fn elapsed(&self, from: Handle, to: Handle) -> DeviceResult<f32> {
        let mut milliseconds = 0.0;
        call!(self, hipEventSynchronize(raw(to)))?;
        call!(self, hipEventElapsedTime(&mut milliseconds, raw(from), raw(to)))?;
        Ok(milliseconds)
    }

    unsafe fn load(&self, image: &[u8]) -> DeviceResult<Handle> {
        let mut module = ptr::null_mut();
        call!(self, hipModuleLoadData(&mut module, image.as_ptr().cast()))?;
        Ok(handle(module))
    }

    unsafe fn unload(&self, module: Handle) -> DeviceResult<()> {
        call!(self, hipModuleUnload(raw(module)))
    }

    unsafe fn function(&self, module: Handle, name: &CStr) -> DeviceResult<Handle> {
        let mut function = ptr::null_mut();
        call!(self, hipModuleGetFunction(&mut function, raw(module), name.as_ptr()))?;
        Ok(handle(function))
    }

    unsafe fn allow_shared(&self, _function: Handle, _bytes: u32) -> DeviceResult<()> {
        // A launch may ask for all that a compute unit has.
        Ok(())
    }

    unsafe fn launch(&self, function: Handle, dims: Dims, stream: Handle, params: &[u8]) -> DeviceResult<()> {
        let Dims { grid, block, shared_bytes } = dims;
        // All arguments as one block of bytes, which is copied before this returns: AITER's kernels have dozens of them, ours one.
        let mut bytes = params.len();
        let mut extra: [*mut c_void; 5] = [
            BUFFER_POINTER,
            params.as_ptr().cast_mut().cast(),
            BUFFER_SIZE,
            (&raw mut bytes).cast(),
            BUFFER_END,
        ];
        call!(
            self,
            hipModuleLaunchKernel(
                raw(function),
                grid,
                1,
                1,
                block,
                1,
                1,
                shared_bytes,
                raw(stream),
                ptr::null_mut(),
                extra.as_mut_ptr(),
            )
        )
    }

    unsafe fn begin_capture(&self, stream: Handle) -> DeviceResult<()> {
        // Other threads may go on to allocate.
        let mode = sys::hipStreamCaptureMode::hipStreamCaptureModeThreadLocal;
        call!(self, hipStreamBeginCapture(raw(stream), mode))
    }

    unsafe fn end_capture(&self, stream: Handle) -> DeviceResult<Handle> {
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        call!(self, hipStreamEndCapture(raw(stream), &mut graph))?;
        let made = call!(self, hipGraphInstantiateWithFlags(&mut executable, graph, 0));
        // The recorded graph is not needed once it has been made executable.
        call!(self, hipGraphDestroy(graph))?;
        made.map(|()| handle(executable))
    }

    unsafe fn replay(&self, graph: Handle, stream: Handle) -> DeviceResult<()> {
        call!(self, hipGraphLaunch(raw(graph), raw(stream)))
    }

    unsafe fn destroy_graph(&self, graph: Handle) -> DeviceResult<()> {
        call!(self, hipGraphExecDestroy(raw(graph)))
    }
}

/// `HIP_LAUNCH_PARAM_*`: what the entry that follows is, and that none does.
const BUFFER_POINTER: *mut c_void = ptr::without_provenance_mut(1);
const BUFFER_SIZE: *mut c_void = ptr::without_provenance_mut(2);
const BUFFER_END: *mut c_void = ptr::without_provenance_mut(3);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Runtime;

    /// With AMD's driver or without: there is an answer, and no device beyond those that are counted.
    #[test]
    fn a_device_that_is_not_there_is_refused_with_what_hip_says() {
        let (beyond, said) = match device_count() {
            Ok(count) => (count, format!("no device {count} among {count}")),
            Err(_) => (0, "hipErrorNoDevice".to_owned()),
        };
        let refused = Runtime::open(Device { kind: DeviceKind::Hip, index: beyond }).unwrap_err();
        assert_eq!(refused.kind, DeviceKind::Hip);
        assert!(refused.cause.contains(&said), "{refused}");
        assert!(refused.to_string().contains("libamdhip64.so"), "{refused}");
    }

    #[test]
    fn a_call_without_its_device_is_an_error_with_its_name() {
        let none = Hip { device: Device { kind: DeviceKind::Hip, index: i32::MAX as u32 } };
        let error = none.alloc(16).unwrap_err();
        assert_eq!((error.device, error.call), (none.device, "hipMalloc"));
        assert!(error.code != 0 && error.text.starts_with("hipError"), "{error}");
    }

    /// Errors that are newer than the binding are values that its enum lacks.
    #[test]
    fn an_error_that_the_binding_lacks_has_a_text() {
        assert!(!text(0x7fff_fff0).is_empty());
    }

    #[test]
    fn devices_are_called_as_their_objects() {
        assert_eq!((arch(9, 4), arch(9, 5), arch(9, 0)), ("gfx942".into(), "gfx950".into(), "gfx90x".into()));
    }
}
