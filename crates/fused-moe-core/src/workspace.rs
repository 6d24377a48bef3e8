//! Memory that a kernel owns, on the host or on a device: allocated once, when the kernel is built.

use crate::dtype::{DType, Device, DeviceKind};
use crate::error::{Error, ErrorKind, Result, Source, Stage};
use crate::exec::{ARENA_ALIGN, Arena};
use crate::layout::Layout;
use crate::tensor::{Allocation, TensorView, TensorViewMut};

#[derive(Clone, Copy)]
#[repr(align(256))]
struct Line(#[expect(dead_code, reason = "read and written through views only")] [u8; ARENA_ALIGN]);

/// Memory of a device, freed with the value.
///
/// # Safety
/// [`DeviceMemory::bytes`] bytes from [`DeviceMemory::address`] on belong to the value alone, and stay where they are as long as
/// it lives.
pub unsafe trait DeviceMemory: std::fmt::Debug + Send + Sync {
    /// Address of the first byte on its device.
    fn address(&self) -> u64;

    /// Size in bytes.
    fn bytes(&self) -> usize;
}

/// Allocates memory of one device. The core has no device code: whoever opens a device gives it one
/// ([`crate::Registry::with_memory`]).
pub trait DeviceAllocator: std::fmt::Debug + Send + Sync {
    /// The device whose memory it is.
    fn device(&self) -> Device;

    /// At least `bytes` zeroed bytes, which may be 0, aligned to [`ARENA_ALIGN`]. Called when kernels are built, never in a
    /// call of a layer, so it may wait for the device.
    ///
    /// # Errors
    /// Of the device's driver.
    fn alloc_zeroed(&self, bytes: usize) -> std::result::Result<Box<dyn DeviceMemory>, Source>;
}

const BACKEND: &str = "workspace";

enum Memory {
    Host(Vec<Line>),
    /// The allocator may have given more than `bytes`.
    Device {
        memory: Box<dyn DeviceMemory>,
        device: Device,
        bytes: usize,
    },
}

/// Bytes on one device, aligned to [`ARENA_ALIGN`].
pub struct Workspace {
    memory: Memory,
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let device = self.device().to_string();
        f.debug_struct("Workspace").field("bytes", &self.bytes()).field("device", &device).finish()
    }
}

impl Workspace {
    /// What an allocation of `bytes` occupies.
    pub const fn rounded(bytes: usize) -> usize {
        bytes.next_multiple_of(ARENA_ALIGN)
    }

    /// At least `bytes` on the host, zeroed.
    ///
    /// # Errors
    /// `OutOfMemory`; `Contract` for a device other than the host, whose memory [`Workspace::on`] takes.
    pub fn new(device: DeviceKind, bytes: usize) -> Result<Self> {
        if device != DeviceKind::Host {
            let why = format!("no allocator for {device:?}");
            return Err(Error::contract(Stage::Experts, BACKEND, why));
        }
        let mut lines = Vec::new();
        let count = bytes.div_ceil(ARENA_ALIGN);
        if lines.try_reserve_exact(count).is_err() {
            return Err(Error::new(ErrorKind::OutOfMemory { bytes }, Stage::Experts, BACKEND));
        }
        lines.resize(count, Line([0; ARENA_ALIGN]));
        Ok(Self { memory: Memory::Host(lines) })
    }

    /// At least `bytes` on the device of `allocator`, zeroed.
    ///
    /// # Errors
    /// `OutOfMemory` with the allocator's own error; `Contract` if what it gives is too short or not aligned.
    pub fn on(allocator: &dyn DeviceAllocator, bytes: usize) -> Result<Self> {
        let (device, bytes) = (allocator.device(), Self::rounded(bytes));
        let out_of_memory = |why: Source| {
            Error::new(ErrorKind::OutOfMemory { bytes }, Stage::Experts, BACKEND).caused_by(why)
        };
        let memory = allocator.alloc_zeroed(bytes).map_err(out_of_memory)?;
        let (address, found) = (memory.address(), memory.bytes());
        if found < bytes || !address.is_multiple_of(ARENA_ALIGN as u64) {
            let why =
                format!("{found} bytes at {address:#x} of {device} for {bytes} aligned to {ARENA_ALIGN}");
            return Err(Error::contract(Stage::Experts, BACKEND, why));
        }
        Ok(Self { memory: Memory::Device { memory, device, bytes } })
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match &self.memory {
            Memory::Host(_) => Device::HOST,
            Memory::Device { device, .. } => *device,
        }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match &self.memory {
            Memory::Host(lines) => size_of_val(lines.as_slice()),
            Memory::Device { bytes, .. } => *bytes,
        }
    }

    /// The whole memory as an arena.
    pub fn arena(&mut self) -> Arena<'_> {
        let layout = Layout::contiguous(&[self.bytes()]);
        let allocation = self.allocation(DType::U8);
        // SAFETY: lines are initialised plain bytes, and a device's memory is its owner's; both are exclusively borrowed
        // through `self`.
        let view = unsafe { TensorViewMut::from_allocation(allocation, layout) };
        Arena::new(view.expect("the layout is that of the allocation"))
    }

    /// The front of the memory as a writable tensor.
    ///
    /// # Errors
    /// [`crate::ViewError::OutOfBounds`] if it is larger than the workspace.
    pub fn tensor_mut(
        &mut self,
        dtype: DType,
        dims: &[usize],
    ) -> Result<TensorViewMut<'_>, crate::ViewError> {
        let allocation = self.allocation(dtype);
        // SAFETY: as in `arena`.
        unsafe { TensorViewMut::from_allocation(allocation, Layout::contiguous(dims)) }
    }

    /// The front of the memory as a tensor.
    ///
    /// # Errors
    /// As [`Workspace::tensor_mut`].
    pub fn tensor(&self, dtype: DType, dims: &[usize]) -> Result<TensorView<'_>, crate::ViewError> {
        let base = match &self.memory {
            Memory::Host(lines) => lines.as_ptr().cast_mut().cast(),
            Memory::Device { memory, .. } => on_device(&**memory),
        };
        let allocation = Allocation { base, bytes: self.bytes(), dtype, device: self.device() };
        // SAFETY: as in `arena`, but borrowed shared; the view only reads.
        unsafe { TensorView::from_allocation(allocation, Layout::contiguous(dims)) }
    }

    fn allocation(&mut self, dtype: DType) -> Allocation {
        let (bytes, device) = (self.bytes(), self.device());
        let base = match &mut self.memory {
            Memory::Host(lines) => lines.as_mut_ptr().cast(),
            Memory::Device { memory, .. } => on_device(&**memory),
        };
        Allocation { base, bytes, dtype, device }
    }
}

/// A device's address as views keep it. It is never read through on the host.
fn on_device(memory: &dyn DeviceMemory) -> *mut u8 {
    std::ptr::without_provenance_mut(memory.address() as usize)
}
