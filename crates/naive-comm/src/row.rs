//! What travels with every token, as columns of a table with one row per token.

use fused_moe_core::{
    Allocation, DType, Device, KernelKind, Layout, MoeConfig, Plan, TensorView, TensorViewMut, ViewError,
};
use half::bf16;

/// Columns of a row: payload, scales, and what routes it. Routing is ids and weights in a modular round,
/// logits and an empty column in a monolithic one.
pub(crate) const COLUMNS: usize = 4;

/// One tensor `[rows, width]`, row-major without gaps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    dtype: DType,
    width: usize,
}

/// The columns that `plan` sends.
pub(crate) fn columns(config: &MoeConfig, plan: &Plan) -> [Column; COLUMNS] {
    let wire = plan.wire();
    let [first, second] = match plan.kind() {
        KernelKind::Modular => [(DType::I32, config.top_k), (DType::F32, config.top_k)],
        KernelKind::Monolithic => [(DType::F32, config.num_experts()), (DType::F32, 0)],
    };
    let scales = (wire.scale.map_or(DType::F32, |s| s.dtype), wire.scales_per_token(config.hidden));
    [(wire.payload, config.hidden), scales, first, second].map(|(dtype, width)| Column { dtype, width })
}

impl Column {
    /// The column of expert outputs.
    pub(crate) fn outputs(config: &MoeConfig) -> Self {
        Self { dtype: config.in_dtype, width: config.hidden }
    }

    /// Bytes of `rows` rows.
    pub(crate) fn bytes(&self, rows: usize) -> usize {
        rows.saturating_mul(self.width.saturating_mul(self.dtype.size_bytes()))
    }

    /// `bytes` as `[rows, width]`.
    pub(crate) fn view<'a>(&self, bytes: &'a [u8], rows: usize) -> Result<TensorView<'a>, ViewError> {
        let allocation = self.allocation(bytes.as_ptr().cast_mut(), bytes.len());
        // SAFETY: the bytes are initialised and borrowed for `'a`, so nobody writes them for that long.
        unsafe { TensorView::from_allocation(allocation, Layout::contiguous(&[rows, self.width])) }
    }

    /// `bytes` as a writable `[rows, width]`.
    pub(crate) fn view_mut<'a>(
        &self,
        bytes: &'a mut [u8],
        rows: usize,
    ) -> Result<TensorViewMut<'a>, ViewError> {
        let allocation = self.allocation(bytes.as_mut_ptr(), bytes.len());
        // SAFETY: the bytes are initialised and borrowed exclusively for `'a`.
        unsafe { TensorViewMut::from_allocation(allocation, Layout::contiguous(&[rows, self.width])) }
    }

    fn allocation(&self, base: *mut u8, bytes: usize) -> Allocation {
        Allocation { base, bytes, dtype: self.dtype, device: Device::HOST }
    }
}

/// The memory of `elements`.
pub(crate) fn bytes_of(elements: &[bf16]) -> &[u8] {
    // SAFETY: a bf16 is a transparent u16, so all of its bytes are initialised, and bytes need no alignment;
    // the borrow is the same.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// `bytes` as elements. Buffers begin at a cache line and hold whole rows, so no byte is left over.
pub(crate) fn elements_of(bytes: &[u8]) -> &[bf16] {
    // SAFETY: every bit pattern is a bf16.
    let (head, elements, tail) = unsafe { bytes.align_to() };
    debug_assert!(head.is_empty() && tail.is_empty());
    elements
}

/// As [`elements_of`], writable.
pub(crate) fn elements_of_mut(bytes: &mut [u8]) -> &mut [bf16] {
    // SAFETY: every bit pattern is a bf16, and a bf16 is initialised bytes.
    let (head, elements, tail) = unsafe { bytes.align_to_mut() };
    debug_assert!(head.is_empty() && tail.is_empty());
    elements
}
