//! What a stage runs with: a stream and a lent piece of workspace.

use crate::dtype::{DType, Device, DeviceKind, Element};
use crate::layout::{Layout, ViewError};
use crate::tensor::{Allocation, TensorViewMut};

/// The order in which device work happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stream {
    /// The calling thread; work is done when a call returns.
    Host,
    /// A stream of a device. Work is done when the stream has come to it; a call waits for nothing.
    Device(DeviceStream),
}

/// A stream that an engine lends, by its raw handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStream {
    device: Device,
    handle: u64,
}

impl DeviceStream {
    /// The stream `handle` (`CUstream`, `hipStream_t`) of `device`.
    ///
    /// # Safety
    /// It is a stream of the device's primary context and is not destroyed before the last call that is given the value has
    /// returned. What such calls were lent in the device's memory stays there until the stream has come to the end of them.
    pub unsafe fn new(device: Device, handle: u64) -> Self {
        Self { device, handle }
    }

    /// The device it belongs to.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The raw handle.
    pub fn handle(&self) -> u64 {
        self.handle
    }
}

/// Alignment in bytes of every piece that an [`Arena`] hands out, if the memory under it has it, too; a
/// [`crate::Workspace`] has.
pub const ARENA_ALIGN: usize = 256;

/// A lent byte range that a stage divides among its temporaries, front to back.
///
/// The same sequence of requests gives the same addresses in every call, which graph replay relies on.
#[derive(Debug)]
pub struct Arena<'a> {
    rest: TensorViewMut<'a>,
}

impl<'a> Arena<'a> {
    /// An arena over `memory`, a contiguous [`DType::U8`] tensor.
    pub fn new(memory: TensorViewMut<'a>) -> Self {
        Self { rest: memory }
    }

    /// Bytes that a request for `len` elements of `T` takes of memory aligned to [`ARENA_ALIGN`].
    pub const fn bytes_for<T>(len: usize) -> usize {
        (len * size_of::<T>()).next_multiple_of(ARENA_ALIGN)
    }

    /// The whole arena again, for a shorter time.
    pub fn reborrow(&mut self) -> Arena<'_> {
        Arena { rest: self.rest.reborrow() }
    }

    /// Bytes that are left.
    pub fn remaining(&self) -> usize {
        self.rest.dims()[0]
    }

    /// Takes `len` elements from the front of a host arena. Their values are whatever was there.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] if less is left: the backend asked for less in `workspace_bytes` than it uses.
    /// [`ViewError::NotHost`] for an arena in a device's memory, of which [`Arena::take_tensor`] takes.
    pub fn take<T: Element>(&mut self, len: usize) -> Result<&'a mut [T], ViewError> {
        let device = self.rest.device();
        if device.kind != DeviceKind::Host {
            return Err(ViewError::NotHost { device });
        }
        let start = self.cut(len, size_of::<T>(), align_of::<T>())?;
        // SAFETY: `cut` took that many elements, aligned for `T`, out of the range that was exclusively borrowed for
        // `'a`, and any bit pattern is a `T` (`Element`).
        Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), len) })
    }

    /// Takes a contiguous tensor from the front of an arena on any device. Its values are whatever was there.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] as in [`Arena::take`].
    pub fn take_tensor(&mut self, dtype: DType, dims: &[usize]) -> Result<TensorViewMut<'a>, ViewError> {
        let (layout, device) = (Layout::contiguous(dims), self.rest.device());
        let base = self.cut(layout.num_elements(), dtype.size_bytes(), dtype.size_bytes())?;
        let bytes = layout.num_elements() * dtype.size_bytes();
        // SAFETY: `cut` took these bytes out of the range that was exclusively borrowed for `'a`.
        unsafe { TensorViewMut::from_allocation(Allocation { base, bytes, dtype, device }, layout) }
    }

    /// Cuts `len` elements of `size` bytes, aligned to `align`, off the front: what it returns is no longer part of the arena.
    fn cut(&mut self, len: usize, size: usize, align: usize) -> Result<*mut u8, ViewError> {
        let (have, device) = (self.remaining(), self.rest.device());
        let base = self.rest.as_view().address();
        let skip = base.next_multiple_of(align) - base;
        let end = len.saturating_mul(size).saturating_add(skip);
        if end > have {
            return Err(ViewError::OutOfBounds {
                dims: vec![len],
                strides: vec![1],
                offset: 0,
                end,
                len: have,
            });
        }
        let used = end.next_multiple_of(ARENA_ALIGN).min(have);
        let start = base as *mut u8;
        let rest =
            Allocation { base: start.wrapping_add(used), bytes: have - used, dtype: DType::U8, device };
        // SAFETY: `rest` is the tail of the exclusively borrowed range; the head is given away below, so the two
        // never overlap.
        self.rest = unsafe { TensorViewMut::from_allocation(rest, Layout::contiguous(&[have - used]))? };
        Ok(start.wrapping_add(skip))
    }
}

/// What a stage runs with.
#[derive(Debug)]
pub struct ExecCx<'a> {
    /// Where device work is enqueued.
    pub stream: Stream,
    /// Memory for temporaries, at least as large as the stage's `workspace_bytes`.
    pub workspace: Arena<'a>,
}

impl ExecCx<'_> {
    /// The same context for a shorter time, with all of its workspace.
    pub fn reborrow(&mut self) -> ExecCx<'_> {
        ExecCx { stream: self.stream, workspace: self.workspace.reborrow() }
    }
}
