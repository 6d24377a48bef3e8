//! Views of tensors that an engine lends. Nothing here allocates or copies.

use std::marker::PhantomData;

use crate::dtype::{DType, Device, DeviceKind, Element};
use crate::layout::{Layout, ViewError};

/// A read-only tensor lent by its owner for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    base: *const u8,
    dtype: DType,
    device: Device,
    layout: Layout,
    _memory: PhantomData<&'a [u8]>,
}

// SAFETY: a view is a shared borrow of plain bytes; sharing it between threads is sharing `&[u8]`.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}

/// A writable tensor lent exclusively for `'a`.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    view: TensorView<'a>,
    _memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: an exclusive borrow of plain bytes moves between threads like `&mut [u8]`.
unsafe impl Send for TensorViewMut<'_> {}
// SAFETY: a shared reference to it only allows reading, like `&&mut [u8]`.
unsafe impl Sync for TensorViewMut<'_> {}

/// A lent allocation: where it is, how long, what it holds. The raw material of a view.
#[derive(Clone, Copy, Debug)]
pub struct Allocation {
    /// First byte.
    pub base: *mut u8,
    /// Length in bytes.
    pub bytes: usize,
    /// Element type.
    pub dtype: DType,
    /// Where the memory lives.
    pub device: Device,
}

fn check(allocation: Allocation, layout: &Layout) -> Result<(), ViewError> {
    let len = allocation.bytes / allocation.dtype.size_bytes();
    let end = layout.end().unwrap_or(usize::MAX);
    if end > len {
        return Err(ViewError::OutOfBounds {
            dims: layout.dims().to_vec(),
            strides: layout.strides().to_vec(),
            offset: layout.offset(),
            end,
            len,
        });
    }
    let address = allocation.base as usize;
    if !address.is_multiple_of(allocation.dtype.size_bytes()) {
        return Err(ViewError::Misaligned { address, dtype: allocation.dtype });
    }
    Ok(())
}

impl<'a> TensorView<'a> {
    /// A view of `layout` inside `allocation`.
    ///
    /// # Safety
    /// `allocation` is readable on its device for `bytes` bytes and is not written until `'a` ends, nor, on a device, before the
    /// work that was put on its streams in the meantime has run.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] and [`ViewError::Misaligned`].
    pub unsafe fn from_allocation(allocation: Allocation, layout: Layout) -> Result<Self, ViewError> {
        check(allocation, &layout)?;
        Ok(Self {
            base: allocation.base,
            dtype: allocation.dtype,
            device: allocation.device,
            layout,
            _memory: PhantomData,
        })
    }

    /// A contiguous view of a host slice. `dtype` must be one that `T` holds.
    ///
    /// # Errors
    /// [`ViewError::WrongDType`] and [`ViewError::OutOfBounds`].
    pub fn from_slice<T: Element>(slice: &'a [T], dtype: DType, dims: &[usize]) -> Result<Self, ViewError> {
        Self::from_slice_with(slice, dtype, Layout::contiguous(dims))
    }

    /// A view of `layout` inside a host slice.
    ///
    /// # Errors
    /// As [`TensorView::from_slice`].
    pub fn from_slice_with<T: Element>(
        slice: &'a [T],
        dtype: DType,
        layout: Layout,
    ) -> Result<Self, ViewError> {
        if !T::holds(dtype) {
            return Err(ViewError::WrongDType { wanted: std::any::type_name::<T>(), found: dtype });
        }
        let allocation = Allocation {
            base: slice.as_ptr().cast_mut().cast(),
            bytes: size_of_val(slice),
            dtype,
            device: Device::HOST,
        };
        // SAFETY: the slice is borrowed for `'a`, so it is readable and unwritten for that long.
        unsafe { Self::from_allocation(allocation, layout) }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory lives.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The layout inside the lent allocation.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        self.layout.dims()
    }

    /// Address of the first element on its device.
    pub fn address(&self) -> usize {
        self.base as usize + self.layout.offset() * self.dtype.size_bytes()
    }

    /// All elements as a slice.
    ///
    /// # Errors
    /// [`ViewError::NotHost`], [`ViewError::WrongDType`], [`ViewError::NotContiguous`].
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T], ViewError> {
        self.readable_as::<T>()?;
        if !self.layout.is_contiguous() {
            return Err(self.not_contiguous());
        }
        let len = self.layout.num_elements();
        if len == 0 {
            // An empty allocation may have no address that a slice can have.
            return Ok(&[]);
        }
        // SAFETY: bounds and alignment were checked when the view was made, the memory is on the host and
        // borrowed for `'a`, the elements have no gaps, and every bit pattern of `T` is valid (`Element`).
        Ok(unsafe { std::slice::from_raw_parts(self.address() as *const T, len) })
    }

    /// Row `row` of a two-dimensional host tensor whose rows are contiguous; the rows themselves may have gaps
    /// between them.
    ///
    /// # Errors
    /// As [`TensorView::as_slice`]; an index past the end is [`ViewError::OutOfBounds`].
    pub fn row<T: Element>(&self, row: usize) -> Result<&'a [T], ViewError> {
        self.readable_as::<T>()?;
        let at = self.row_address(row)?;
        if self.dims()[1] == 0 {
            return Ok(&[]);
        }
        // SAFETY: `row_address` checked the index; the rest as in `as_slice`.
        Ok(unsafe { std::slice::from_raw_parts(at as *const T, self.dims()[1]) })
    }

    /// The bytes of row `row` of a two-dimensional host tensor of any element type.
    ///
    /// # Errors
    /// As [`TensorView::row`].
    pub fn row_bytes(&self, row: usize) -> Result<&'a [u8], ViewError> {
        if self.device.kind != DeviceKind::Host {
            return Err(ViewError::NotHost { device: self.device });
        }
        let at = self.row_address(row)?;
        if self.dims()[1] == 0 {
            return Ok(&[]);
        }
        // SAFETY: as in `row`; bytes have no alignment or validity requirement.
        Ok(unsafe { std::slice::from_raw_parts(at as *const u8, self.dims()[1] * self.dtype.size_bytes()) })
    }

    fn row_address(&self, row: usize) -> Result<usize, ViewError> {
        let (dims, strides) = (self.dims(), self.layout.strides());
        if dims.len() != 2 || (dims[1] > 1 && strides[1] != 1) {
            return Err(self.not_contiguous());
        }
        if row >= dims[0] {
            return Err(ViewError::OutOfBounds {
                dims: dims.to_vec(),
                strides: strides.to_vec(),
                offset: row,
                end: row + 1,
                len: dims[0],
            });
        }
        // Wraps only in a tensor without columns, whose rows have no address.
        Ok(self.address().wrapping_add(row.wrapping_mul(strides[0]).wrapping_mul(self.dtype.size_bytes())))
    }

    fn readable_as<T: Element>(&self) -> Result<(), ViewError> {
        if self.device.kind != DeviceKind::Host {
            return Err(ViewError::NotHost { device: self.device });
        }
        if !T::holds(self.dtype) {
            return Err(ViewError::WrongDType { wanted: std::any::type_name::<T>(), found: self.dtype });
        }
        Ok(())
    }

    fn not_contiguous(&self) -> ViewError {
        ViewError::NotContiguous { dims: self.dims().to_vec(), strides: self.layout.strides().to_vec() }
    }
}

impl<'a> TensorViewMut<'a> {
    /// A writable view of `layout` inside `allocation`.
    ///
    /// # Safety
    /// As [`TensorView::from_allocation`], and nobody else reads or writes the allocation until `'a` ends.
    ///
    /// # Errors
    /// As [`TensorView::from_allocation`], and [`ViewError::Overlapping`].
    pub unsafe fn from_allocation(allocation: Allocation, layout: Layout) -> Result<Self, ViewError> {
        check(allocation, &layout)?;
        if layout.num_elements() > 1 && layout.overlaps_itself() {
            return Err(ViewError::Overlapping {
                dims: layout.dims().to_vec(),
                strides: layout.strides().to_vec(),
            });
        }
        // SAFETY: the caller's contract contains that of the read-only view.
        let view = unsafe { TensorView::from_allocation(allocation, layout)? };
        Ok(Self { view, _memory: PhantomData })
    }

    /// A contiguous writable view of a host slice. `dtype` must be one that `T` holds.
    ///
    /// # Errors
    /// As [`TensorView::from_slice`].
    pub fn from_slice<T: Element>(
        slice: &'a mut [T],
        dtype: DType,
        dims: &[usize],
    ) -> Result<Self, ViewError> {
        Self::from_slice_with(slice, dtype, Layout::contiguous(dims))
    }

    /// A writable view of `layout` inside a host slice.
    ///
    /// # Errors
    /// As [`TensorViewMut::from_allocation`] and [`ViewError::WrongDType`].
    pub fn from_slice_with<T: Element>(
        slice: &'a mut [T],
        dtype: DType,
        layout: Layout,
    ) -> Result<Self, ViewError> {
        if !T::holds(dtype) {
            return Err(ViewError::WrongDType { wanted: std::any::type_name::<T>(), found: dtype });
        }
        let allocation = Allocation {
            base: slice.as_mut_ptr().cast(),
            bytes: size_of_val(slice),
            dtype,
            device: Device::HOST,
        };
        // SAFETY: the slice is borrowed exclusively for `'a`.
        unsafe { Self::from_allocation(allocation, layout) }
    }

    /// The same memory, read-only, as long as `self` is not used.
    pub fn as_view(&self) -> TensorView<'_> {
        self.view
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { view: self.view, _memory: PhantomData }
    }

    /// Gives the exclusive borrow up for a shared one of the same length.
    pub fn into_view(self) -> TensorView<'a> {
        self.view
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.view.dtype
    }

    /// Where the memory lives.
    pub fn device(&self) -> Device {
        self.view.device
    }

    /// Dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        self.view.dims()
    }

    /// All elements as a slice.
    ///
    /// # Errors
    /// As [`TensorView::as_slice`].
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], ViewError> {
        let len = self.view.as_slice::<T>()?.len();
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: `as_slice` checked bounds, alignment, space and type; `self` is an exclusive borrow, which the
        // returned slice holds.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.view.address() as *mut T, len) })
    }

    /// All elements as a slice that lives as long as the lent memory.
    ///
    /// # Errors
    /// As [`TensorView::as_slice`].
    pub fn into_mut_slice<T: Element>(self) -> Result<&'a mut [T], ViewError> {
        let len = self.view.as_slice::<T>()?.len();
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `as_mut_slice`; `self` is consumed, so the slice is the only way to the memory for `'a`.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.view.address() as *mut T, len) })
    }

    /// Row `row` of a two-dimensional host tensor with contiguous rows.
    ///
    /// # Errors
    /// As [`TensorView::row`].
    pub fn row_mut<T: Element>(&mut self, row: usize) -> Result<&mut [T], ViewError> {
        let len = self.view.row::<T>(row)?.len();
        let at = self.view.row_address(row)?;
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: `row` checked everything; `self` is an exclusive borrow, which the returned slice holds.
        Ok(unsafe { std::slice::from_raw_parts_mut(at as *mut T, len) })
    }
}

/// A view together with the guard that keeps its memory lent (a lock guard, a stream event).
///
/// The view borrows from the lease, so the guard is dropped after the last use of the view:
///
/// ```
/// # use fused_moe_core::Lease;
/// fn late(lease: Lease<'_, ()>) {
///     let view = lease.view();
///     let _ = view.address();
///     drop(lease);
/// }
/// ```
///
/// and cannot be dropped before:
///
/// ```compile_fail,E0505
/// # use fused_moe_core::Lease;
/// fn early(lease: Lease<'_, ()>) {
///     let view = lease.view();
///     drop(lease);
///     let _ = view.address();
/// }
/// ```
#[derive(Debug)]
pub struct Lease<'t, G> {
    view: TensorView<'t>,
    _guard: G,
}

impl<'t, G> Lease<'t, G> {
    /// Ties `guard` to `view`.
    pub fn new(view: TensorView<'t>, guard: G) -> Self {
        Self { view, _guard: guard }
    }

    /// The view, for as long as the lease is borrowed.
    pub fn view(&self) -> TensorView<'_> {
        self.view
    }
}
