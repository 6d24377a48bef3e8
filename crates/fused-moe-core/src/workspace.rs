//! Memory that a kernel owns: allocated once, when the kernel is built.

use crate::dtype::{DType, Device, DeviceKind};
use crate::error::{Error, ErrorKind, Result, Stage};
use crate::exec::{ARENA_ALIGN, Arena};
use crate::layout::Layout;
use crate::tensor::{Allocation, TensorView, TensorViewMut};

#[derive(Clone, Copy)]
#[repr(align(256))]
struct Line(#[expect(dead_code, reason = "read and written through views only")] [u8; ARENA_ALIGN]);

/// Bytes on one device, aligned to [`ARENA_ALIGN`].
pub struct Workspace {
    lines: Vec<Line>,
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workspace").field("bytes", &self.bytes()).finish()
    }
}

impl Workspace {
    /// What an allocation of `bytes` occupies.
    pub const fn rounded(bytes: usize) -> usize {
        bytes.next_multiple_of(ARENA_ALIGN)
    }

    /// At least `bytes` on `device`, zeroed.
    ///
    /// # Errors
    /// `OutOfMemory`; `Contract` for a device other than the host.
    pub fn new(device: DeviceKind, bytes: usize) -> Result<Self> {
        const BACKEND: &str = "workspace";
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
        Ok(Self { lines })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    /// The whole memory as an arena.
    pub fn arena(&mut self) -> Arena<'_> {
        let layout = Layout::contiguous(&[self.bytes()]);
        let allocation = self.allocation(DType::U8);
        // SAFETY: the lines are initialised plain bytes, exclusively borrowed through `self`.
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
        let base = self.lines.as_ptr().cast_mut().cast();
        let allocation = Allocation { base, bytes: self.bytes(), dtype, device: Device::HOST };
        // SAFETY: the lines are initialised plain bytes, borrowed through `self`; the view only reads.
        unsafe { TensorView::from_allocation(allocation, Layout::contiguous(dims)) }
    }

    fn allocation(&mut self, dtype: DType) -> Allocation {
        let base = self.lines.as_mut_ptr().cast();
        Allocation { base, bytes: self.bytes(), dtype, device: Device::HOST }
    }
}
