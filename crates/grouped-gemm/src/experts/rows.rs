//! Lent matrices as rows at a pitch, which is how the GEMM and the threads of a call take them.

use fused_moe_core::{DeviceKind, Element, TensorView, TensorViewMut};

use super::error::ExpertsError;
use crate::Rows;

/// The first rows of a lent host matrix. Rows are contiguous and may have gaps between them.
#[derive(Clone, Copy, Debug)]
pub struct Pitched<'a, T> {
    /// The elements; row `i` starts at `i * pitch`, and behind the last row there are none.
    pub values: &'a [T],
    /// Elements from one row to the next.
    pub pitch: usize,
    /// Elements of a row.
    pub columns: usize,
    /// Number of rows.
    pub rows: usize,
}

impl<'a, T: Element> Pitched<'a, T> {
    /// The first `rows` rows of `view`, which must have `columns` columns. Rows behind are not read.
    /// Errors name the view as `tensor`.
    ///
    /// # Errors
    /// [`ExpertsError::Tensor`].
    pub fn new(
        tensor: &'static str,
        view: TensorView<'a>,
        [rows, columns]: [usize; 2],
    ) -> Result<Self, ExpertsError> {
        let pitch = check::<T>(tensor, &view, [rows, columns])?;
        if rows == 0 {
            return Ok(Self { values: &[], pitch, columns, rows });
        }
        let len = (rows - 1) * pitch + columns;
        // SAFETY: `check` found a host tensor of `T` whose first `rows` rows of `columns` elements start `pitch`
        // elements apart. Making the view checked bounds and alignment, and its maker promised that the whole
        // allocation, gaps between rows included, is readable and unwritten for `'a`.
        let values = unsafe { std::slice::from_raw_parts(view.address() as *const T, len) };
        Ok(Self { values, pitch, columns, rows })
    }

    /// Rows without gaps.
    pub fn dense(values: &'a [T], columns: usize) -> Self {
        Self { values, pitch: columns, columns, rows: values.len() / columns }
    }

    /// Row `row`.
    pub fn row(&self, row: usize) -> &'a [T] {
        &self.values[row * self.pitch..][..self.columns]
    }

    /// The same rows as a GEMM takes them.
    pub fn for_gemm(self) -> Rows<'a, T> {
        Rows { values: self.values, pitch: self.pitch }
    }
}

/// The first rows of a lent host matrix, to be written.
#[derive(Debug)]
pub struct PitchedMut<'a, T> {
    /// As in [`Pitched`].
    pub values: &'a mut [T],
    /// Elements from one row to the next.
    pub pitch: usize,
    /// Elements of a row.
    pub columns: usize,
}

impl<'a, T: Element> PitchedMut<'a, T> {
    /// As [`Pitched::new`].
    ///
    /// # Errors
    /// As [`Pitched::new`].
    pub fn new(
        tensor: &'static str,
        view: TensorViewMut<'a>,
        [rows, columns]: [usize; 2],
    ) -> Result<Self, ExpertsError> {
        let pitch = check::<T>(tensor, &view.as_view(), [rows, columns])?;
        if rows == 0 {
            return Ok(Self { values: &mut [], pitch, columns });
        }
        let len = (rows - 1) * pitch + columns;
        let first = view.into_view().address() as *mut T;
        // SAFETY: as in `Pitched::new`; the maker of a writable view promised that nobody else reads or writes
        // the allocation for `'a`, and the view is consumed, so this slice is the only way to it.
        let values = unsafe { std::slice::from_raw_parts_mut(first, len) };
        Ok(Self { values, pitch, columns })
    }
}

/// Checks that `view` has those rows of `T` on the host, and returns the elements from one to the next.
fn check<T: Element>(
    tensor: &'static str,
    view: &TensorView<'_>,
    [rows, columns]: [usize; 2],
) -> Result<usize, ExpertsError> {
    let strides = view.layout().strides();
    let fits = matches!(view.dims(), &[r, c] if r >= rows && c == columns)
        && T::holds(view.dtype())
        && view.device().kind == DeviceKind::Host
        && (columns <= 1 || strides[1] == 1)
        && (rows <= 1 || strides[0] >= columns);
    if !fits {
        let element = std::any::type_name::<T>();
        let wanted = format!("[{rows} or more, {columns}] of {element} in separate rows on the host");
        return Err(ExpertsError::tensor(tensor, view, wanted));
    }
    Ok(if rows <= 1 { columns } else { strides[0] })
}
