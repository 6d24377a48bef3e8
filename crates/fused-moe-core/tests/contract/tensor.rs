//! Views: what they reach, and what is refused.

use std::collections::HashSet;

use fused_moe_core::{
    Allocation, DType, Device, DeviceKind, Layout, Lease, TensorView, TensorViewMut, ViewError,
};
use half::{bf16, f16};
use proptest::prelude::*;
use rstest::rstest;

/// Every position that `layout` reaches, by enumeration of its index tuples.
fn positions(layout: &Layout) -> Vec<usize> {
    let mut all = vec![layout.offset()];
    for (&dim, &stride) in layout.dims().iter().zip(layout.strides()) {
        all = all.iter().flat_map(|at| (0..dim).map(move |i| at + i * stride)).collect();
    }
    all
}

/// One to three dimensions with a stride each, and an offset.
fn layouts() -> impl Strategy<Value = Layout> {
    let dims = prop::collection::vec((0_usize..5, 0_usize..9), 1..=3);
    (dims, 0_usize..4).prop_map(|(dims, offset)| {
        let (dims, strides): (Vec<_>, Vec<_>) = dims.into_iter().unzip();
        Layout::contiguous(&dims).strided(&strides, offset)
    })
}

proptest! {
    #[test]
    fn bounds_are_those_of_the_enumerated_positions(layout in layouts(), len in 0_usize..60) {
        let memory = vec![0_f32; len];
        let end = positions(&layout).into_iter().max().map_or(layout.offset(), |last| last + 1);
        let view = TensorView::from_slice_with(&memory, DType::F32, layout);
        prop_assert_eq!(view.is_ok(), end <= len, "{:?}", layout);
        if let Err(ViewError::OutOfBounds { end: found, len: have, .. }) = view {
            prop_assert_eq!((found, have), (end, len));
        }
    }

    #[test]
    fn a_writable_layout_never_reaches_an_element_twice(layout in layouts()) {
        let mut memory = vec![0_f32; 200];
        let all = positions(&layout);
        let unique: HashSet<usize> = all.iter().copied().collect();
        let view = TensorViewMut::from_slice_with(&mut memory, DType::F32, layout);
        match view {
            Ok(_) => prop_assert_eq!(unique.len(), all.len(), "{:?}", layout),
            // Each dimension steps over all that the smaller strides reach: such a layout is never refused.
            Err(error) => {
                let overlapping = matches!(error, ViewError::Overlapping { .. });
                prop_assert!(overlapping, "{error}");
                let mut steps: Vec<(usize, usize)> = layout.strides().iter().copied()
                    .zip(layout.dims().iter().copied()).filter(|&(_, dim)| dim > 1).collect();
                steps.sort_unstable();
                let nested = steps.windows(2).all(|w| w[1].0 >= w[0].0 * w[0].1) && steps[0].0 > 0;
                prop_assert!(!nested, "{:?}", layout);
            }
        }
    }

    #[test]
    fn contiguous_means_positions_in_a_row(layout in layouts()) {
        let in_a_row = positions(&layout).into_iter().eq(layout.offset()..layout.offset() + layout.num_elements());
        // An empty tensor is contiguous whatever its strides are; `is_contiguous` may still say no.
        prop_assert_eq!(layout.is_contiguous() || layout.num_elements() == 0, in_a_row, "{:?}", layout);
    }

    #[test]
    fn rows_are_the_enumerated_elements(rows in 1_usize..5, columns in 0_usize..5, gap in 0_usize..4, offset in 0_usize..4) {
        let mut memory: Vec<i32> = (0..64).collect();
        let layout = Layout::contiguous(&[rows, columns]).strided(&[columns + gap, 1], offset);
        let view = TensorView::from_slice_with(&memory, DType::I32, layout).unwrap();
        for row in 0..rows {
            let start = (offset + row * (columns + gap)) as i32;
            let wanted: Vec<i32> = (start..start + columns as i32).collect();
            prop_assert_eq!(view.row::<i32>(row).unwrap(), &wanted[..]);
            let bytes: Vec<u8> = wanted.iter().flat_map(|x| x.to_ne_bytes()).collect();
            prop_assert_eq!(view.row_bytes(row).unwrap(), &bytes[..]);
        }
        let past_the_end = matches!(view.row::<i32>(rows), Err(ViewError::OutOfBounds { .. }));
        prop_assert!(past_the_end);
        if columns + gap > 0 {
            let mut view = TensorViewMut::from_slice_with(&mut memory, DType::I32, layout).unwrap();
            for row in 0..rows {
                view.row_mut::<i32>(row).unwrap().fill(-1);
            }
            let written: HashSet<usize> = positions(&layout).into_iter().collect();
            for (at, &x) in memory.iter().enumerate() {
                prop_assert_eq!(x, if written.contains(&at) { -1 } else { at as i32 });
            }
        }
    }
}

#[rstest]
#[case::product(Layout::contiguous(&[1 << 63, 2]))]
#[case::stride(Layout::contiguous(&[2, 1 << 63, 2]))]
#[case::product_of_three(Layout::contiguous(&[1 << 32, 1 << 32, 2]))]
#[case::end(Layout::contiguous(&[2, 2]).strided(&[usize::MAX, 1], 0))]
#[case::step(Layout::contiguous(&[usize::MAX, 1]).strided(&[usize::MAX, 1], 0))]
#[case::offset(Layout::contiguous(&[2, 2]).strided(&[2, 1], usize::MAX - 1))]
fn sizes_that_wrap_are_out_of_bounds(#[case] layout: Layout) {
    let mut memory = [0_u8; 8];
    let read = TensorView::from_slice_with(&memory, DType::U8, layout);
    assert!(matches!(read, Err(ViewError::OutOfBounds { end: 9.., len: 8, .. })), "{read:?}");
    let write = TensorViewMut::from_slice_with(&mut memory, DType::U8, layout);
    assert!(matches!(write, Err(ViewError::OutOfBounds { end: 9.., len: 8, .. })), "{write:?}");
    assert!(layout.num_elements() > 0, "a saturated size is not empty");
}

#[test]
fn a_broadcast_may_be_read_and_not_written() {
    let mut memory = [7_f32];
    let layout = Layout::contiguous(&[3, 2]).strided(&[0, 0], 0);
    let view = TensorView::from_slice_with(&memory, DType::F32, layout).unwrap();
    assert!(matches!(view.as_slice::<f32>(), Err(ViewError::NotContiguous { .. })));
    let error = TensorViewMut::from_slice_with(&mut memory, DType::F32, layout).unwrap_err();
    assert_eq!(error.to_string(), "writable layout [3, 2] with strides [0, 0] overlaps itself");
}

#[test]
fn a_misaligned_allocation_is_refused() {
    let mut memory = [0_u32; 4];
    let base = memory.as_mut_ptr().cast::<u8>();
    for shift in 0..4 {
        let allocation =
            Allocation { base: base.wrapping_add(shift), bytes: 8, dtype: DType::F32, device: Device::HOST };
        // SAFETY: 8 bytes from `base + shift` lie inside the array, which nobody writes.
        let view = unsafe { TensorView::from_allocation(allocation, Layout::contiguous(&[2])) };
        match view {
            Ok(view) => assert_eq!((shift, view.address()), (0, base as usize)),
            Err(error) => {
                let address = base as usize + shift;
                assert_eq!(error, ViewError::Misaligned { address, dtype: DType::F32 });
                assert_ne!(shift, 0);
            }
        }
    }
}

#[test]
fn device_memory_is_not_read() {
    let device = Device { kind: DeviceKind::Cuda, index: 3 };
    let allocation = Allocation { base: 0x1000 as *mut u8, bytes: 64, dtype: DType::F32, device };
    let layout = Layout::contiguous(&[4, 4]);
    // SAFETY: the address is never read: the host refuses to.
    let view = unsafe { TensorView::from_allocation(allocation, layout) }.unwrap();
    assert_eq!(view.device().to_string(), "cuda:3");
    assert_eq!(view.as_slice::<f32>().unwrap_err(), ViewError::NotHost { device });
    assert_eq!(view.row::<f32>(0).unwrap_err(), ViewError::NotHost { device });
    assert_eq!(view.row_bytes(0).unwrap_err(), ViewError::NotHost { device });
    // SAFETY: as above.
    let mut view = unsafe { TensorViewMut::from_allocation(allocation, layout) }.unwrap();
    assert_eq!(view.as_mut_slice::<f32>().unwrap_err(), ViewError::NotHost { device });
    assert_eq!(view.row_mut::<f32>(0).unwrap_err(), ViewError::NotHost { device });
    assert_eq!(view.into_mut_slice::<f32>().unwrap_err(), ViewError::NotHost { device });
}

#[test]
fn element_types_hold_their_own_dtypes_only() {
    use DType::*;
    let all = [F32, F16, Bf16, Fp8E4M3Fn, Fp8E4M3Fnuz, I32, U8];
    fn held<T: fused_moe_core::Element + Default>(all: &[DType]) -> Vec<DType> {
        let memory = [T::default(); 2];
        let fits = |&dtype: &DType| match TensorView::from_slice(&memory, dtype, &[2]) {
            Ok(view) => view.as_slice::<T>().is_ok(),
            Err(error) => {
                assert!(matches!(error, ViewError::WrongDType { .. }), "{error}");
                false
            }
        };
        all.iter().copied().filter(fits).collect()
    }
    assert_eq!(held::<f32>(&all), [F32]);
    assert_eq!(held::<f16>(&all), [F16]);
    assert_eq!(held::<bf16>(&all), [Bf16]);
    assert_eq!(held::<i32>(&all), [I32]);
    assert_eq!(held::<u8>(&all), [Fp8E4M3Fn, Fp8E4M3Fnuz, U8]);
    for dtype in all {
        let bytes =
            if matches!(dtype, F32 | I32) { 4 } else { 2 - usize::from(dtype.is_fp8() || dtype == U8) };
        assert_eq!(dtype.size_bytes(), bytes, "{dtype}");
    }
    let memory = [0_i32; 2];
    let error = TensorView::from_slice(&memory, I32, &[2]).unwrap().as_slice::<f32>().unwrap_err();
    assert_eq!(error.to_string(), "tensor of i32 was asked for as f32");
}

#[rstest]
#[case(&[0])]
#[case(&[0, 4])]
#[case(&[3, 0])]
#[case(&[2, 0, 5])]
fn empty_tensors_are_views_of_nothing(#[case] dims: &[usize]) {
    let mut memory: [f32; 0] = [];
    let view = TensorView::from_slice(&memory, DType::F32, dims).unwrap();
    assert_eq!((view.dims(), view.as_slice::<f32>().unwrap()), (dims, &[][..]));
    let mut view = TensorViewMut::from_slice(&mut memory, DType::F32, dims).unwrap();
    assert!(view.as_mut_slice::<f32>().unwrap().is_empty());
    if let [rows, 0] = *dims {
        assert!(view.row_mut::<f32>(rows - 1).unwrap().is_empty());
        assert!(view.as_view().row_bytes(0).unwrap().is_empty());
    }
    assert!(view.into_mut_slice::<f32>().unwrap().is_empty());
}

#[test]
fn an_empty_tensor_needs_no_address() {
    let nothing =
        Allocation { base: std::ptr::null_mut(), bytes: 0, dtype: DType::F32, device: Device::HOST };
    // SAFETY: no byte is lent.
    let mut view = unsafe { TensorViewMut::from_allocation(nothing, Layout::contiguous(&[2, 0])) }.unwrap();
    assert!(view.as_view().as_slice::<f32>().unwrap().is_empty());
    assert!(view.as_mut_slice::<f32>().unwrap().is_empty());
    assert!(view.row_mut::<f32>(1).unwrap().is_empty());
}

#[test]
fn rows_need_two_dimensions_and_unit_stride() {
    let memory = [0_f32; 16];
    let refused = |layout| {
        let view = TensorView::from_slice_with(&memory, DType::F32, layout).unwrap();
        matches!(view.row::<f32>(0), Err(ViewError::NotContiguous { .. }))
    };
    assert!(refused(Layout::contiguous(&[16])));
    assert!(refused(Layout::contiguous(&[2, 2, 4])));
    assert!(refused(Layout::contiguous(&[2, 4]).strided(&[8, 2], 0)));
    assert!(!refused(Layout::contiguous(&[2, 1]).strided(&[8, 3], 0)), "one column has no stride");
}

#[test]
fn reborrows_are_the_same_memory() {
    let mut memory = [1_i32, 2, 3];
    let mut view = TensorViewMut::from_slice(&mut memory, DType::I32, &[3]).unwrap();
    view.reborrow().into_mut_slice::<i32>().unwrap()[0] = 9;
    view.as_mut_slice::<i32>().unwrap()[2] = 7;
    let shared = view.into_view();
    assert_eq!(shared.as_slice::<i32>().unwrap(), [9, 2, 7]);
}

#[test]
fn a_lease_keeps_its_guard() {
    struct Guard<'c>(&'c std::cell::Cell<u32>);
    impl Drop for Guard<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    let drops = std::cell::Cell::new(0);
    let memory = [4_f32, 5.0];
    let view = TensorView::from_slice(&memory, DType::F32, &[2]).unwrap();
    let lease = Lease::new(view, Guard(&drops));
    assert_eq!(lease.view().as_slice::<f32>().unwrap(), [4.0, 5.0]);
    assert_eq!(drops.get(), 0);
    drop(lease);
    assert_eq!(drops.get(), 1);
}
