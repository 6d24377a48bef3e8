//! Where the elements of a tensor lie, and why a view of it can be refused.

use crate::dtype::{DType, Device};

/// Highest number of dimensions a view can have.
pub const MAX_DIMS: usize = 3;

/// Where the elements of a tensor lie inside a lent allocation.
///
/// `offset` and `strides` are in elements. Dimensions that are not there are `1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    dims: [usize; MAX_DIMS],
    strides: [usize; MAX_DIMS],
    rank: u8,
    offset: usize,
}

impl Layout {
    /// Row-major layout of `dims` (1 to 3 of them) without gaps, starting at element 0.
    ///
    /// # Panics
    /// If `dims` is empty or longer than [`MAX_DIMS`]: that is a bug at the call site, not input.
    pub const fn contiguous(dims: &[usize]) -> Self {
        assert!(!dims.is_empty() && dims.len() <= MAX_DIMS, "a tensor has 1 to 3 dimensions");
        let mut full = [1; MAX_DIMS];
        let mut strides = [1; MAX_DIMS];
        let mut stride: usize = 1;
        let mut i = dims.len();
        while i > 0 {
            i -= 1;
            full[i] = dims[i];
            strides[i] = stride;
            // Saturated dimensions fail the bounds check of every view; wrapped ones could pass it.
            stride = stride.saturating_mul(dims[i]);
        }
        Self { dims: full, strides, rank: dims.len() as u8, offset: 0 }
    }

    /// The same dimensions with other strides (in elements, one per dimension) and a first element at `offset`.
    ///
    /// # Panics
    /// If the number of strides is not the number of dimensions.
    pub const fn strided(mut self, strides: &[usize], offset: usize) -> Self {
        assert!(strides.len() == self.rank as usize, "one stride per dimension");
        let mut i = 0;
        while i < strides.len() {
            self.strides[i] = strides[i];
            i += 1;
        }
        self.offset = offset;
        self
    }

    /// Dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.rank as usize]
    }

    /// Position of the first element, in elements from the start of the allocation.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Number of elements (saturated).
    pub fn num_elements(&self) -> usize {
        if self.dims().contains(&0) {
            return 0;
        }
        self.dims().iter().fold(1, |product, &dim| product.saturating_mul(dim))
    }

    /// Whether the elements follow each other in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut stride: usize = 1;
        for (&dim, &s) in self.dims().iter().zip(self.strides()).rev() {
            if dim > 1 && s != stride {
                return false;
            }
            stride = stride.saturating_mul(dim);
        }
        true
    }

    /// One past the last element that is reached, in elements from the start of the allocation; `None` on overflow.
    pub(crate) fn end(&self) -> Option<usize> {
        if self.num_elements() == 0 {
            return Some(self.offset);
        }
        let mut last = self.offset;
        for (&dim, &stride) in self.dims().iter().zip(self.strides()) {
            last = last.checked_add((dim - 1).checked_mul(stride)?)?;
        }
        last.checked_add(1)
    }

    /// Whether two index tuples may reach the same element: a stride no larger than what the smaller ones reach.
    ///
    /// Never false for an overlap. Also true for interleaved layouts without one (strides `[3, 2]` of `[2, 3]`), which
    /// no kernel writes.
    pub(crate) fn overlaps_itself(&self) -> bool {
        let mut dims: [(usize, usize); MAX_DIMS] = [(0, 0); MAX_DIMS];
        let mut n = 0;
        for (&dim, &stride) in self.dims().iter().zip(self.strides()) {
            if dim > 1 {
                dims[n] = (stride, dim);
                n += 1;
            }
        }
        let dims = &mut dims[..n];
        dims.sort_unstable();
        let mut reach: usize = 0;
        for &(stride, dim) in dims.iter() {
            if stride <= reach {
                return true;
            }
            reach = (dim - 1).saturating_mul(stride).saturating_add(reach);
        }
        false
    }
}

/// Why a view cannot be made or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The layout reaches past the allocation.
    #[error(
        "layout {dims:?} with strides {strides:?} at offset {offset} reaches element {end}, the allocation holds {len}"
    )]
    OutOfBounds {
        /// Dimensions.
        dims: Vec<usize>,
        /// Strides in elements.
        strides: Vec<usize>,
        /// Offset in elements.
        offset: usize,
        /// One past the last element reached (saturated).
        end: usize,
        /// Elements in the allocation.
        len: usize,
    },
    /// A writable view in which two indices name the same element.
    #[error("writable layout {dims:?} with strides {strides:?} overlaps itself")]
    Overlapping {
        /// Dimensions.
        dims: Vec<usize>,
        /// Strides in elements.
        strides: Vec<usize>,
    },
    /// The address is not a multiple of the element size.
    #[error("address {address:#x} is not aligned for {dtype}")]
    Misaligned {
        /// The address.
        address: usize,
        /// The element type.
        dtype: DType,
    },
    /// The view was asked for as another element type.
    #[error("tensor of {found} was asked for as {wanted}")]
    WrongDType {
        /// Rust type asked for.
        wanted: &'static str,
        /// What the view holds.
        found: DType,
    },
    /// The memory is not on the host.
    #[error("tensor lives on {device}, not in host memory")]
    NotHost {
        /// Where it lives.
        device: Device,
    },
    /// A slice was asked for, the elements have gaps.
    #[error("tensor {dims:?} with strides {strides:?} is not contiguous")]
    NotContiguous {
        /// Dimensions.
        dims: Vec<usize>,
        /// Strides in elements.
        strides: Vec<usize>,
    },
}
