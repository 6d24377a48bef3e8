//! Arenas and the memory under them.

use fused_moe_core::{
    ARENA_ALIGN, Allocation, Arena, DType, Device, DeviceAllocator, DeviceKind, DeviceMemory, ErrorKind,
    Layout, Source, TensorViewMut, ViewError, Workspace,
};
use proptest::prelude::*;

/// Addresses of the pieces, in order; `None` where the arena was exhausted.
fn addresses(workspace: &mut Workspace, requests: &[usize]) -> Vec<Option<usize>> {
    let mut arena = workspace.arena();
    requests.iter().map(|&len| arena.take::<f32>(len).ok().map(|piece| piece.as_ptr() as usize)).collect()
}

proptest! {
    #[test]
    fn pieces_are_aligned_disjoint_and_the_same_every_time(requests in prop::collection::vec(0_usize..200, 0..12)) {
        let total: usize = requests.iter().map(|&len| Arena::bytes_for::<f32>(len)).sum();
        let mut workspace = Workspace::new(DeviceKind::Host, total).unwrap();
        prop_assert_eq!(workspace.bytes(), total);
        let first = addresses(&mut workspace, &requests);
        prop_assert_eq!(&first, &addresses(&mut workspace, &requests));
        let mut end = 0;
        for (at, &len) in first.iter().zip(&requests) {
            let at = at.expect("what bytes_for says is enough");
            prop_assert_eq!(at % ARENA_ALIGN, 0);
            prop_assert!(at >= end, "pieces overlap");
            end = at + len * 4;
        }
    }
}

#[test]
fn pieces_keep_what_was_written_to_their_neighbours() {
    let mut workspace = Workspace::new(DeviceKind::Host, 3 * ARENA_ALIGN).unwrap();
    let mut arena = workspace.arena();
    let (a, b, c) =
        (arena.take::<u8>(1).unwrap(), arena.take::<i32>(64).unwrap(), arena.take::<u8>(256).unwrap());
    a.fill(1);
    b.fill(2);
    c.fill(3);
    assert_eq!((a, b, c), (&mut [1][..], &mut [2; 64][..], &mut [3; 256][..]));
    assert_eq!(arena.remaining(), 0);
    assert!(arena.take::<f32>(0).unwrap().is_empty());
    let error = arena.take::<u8>(1).unwrap_err();
    assert!(matches!(error, ViewError::OutOfBounds { end: 1, len: 0, .. }), "{error}");
}

#[test]
fn a_refused_request_takes_nothing() {
    let mut workspace = Workspace::new(DeviceKind::Host, 256).unwrap();
    let mut arena = workspace.arena();
    for len in [65, 1 << 62, (1 << 62) + 1, usize::MAX] {
        let error = arena.take::<f32>(len).unwrap_err();
        assert!(matches!(error, ViewError::OutOfBounds { len: 256, .. }), "{len}: {error}");
        assert_eq!(arena.remaining(), 256);
    }
    assert_eq!(arena.take::<f32>(64).unwrap().len(), 64);
}

#[test]
fn a_reborrowed_arena_starts_again() {
    let mut workspace = Workspace::new(DeviceKind::Host, 512).unwrap();
    let mut arena = workspace.arena();
    let at = arena.reborrow().take::<u8>(300).unwrap().as_ptr();
    assert_eq!(arena.remaining(), 512);
    assert_eq!(arena.take::<u8>(300).unwrap().as_ptr(), at);
}

#[test]
fn memory_without_alignment_still_gives_aligned_elements() {
    let mut memory = [0_u64; 16];
    let base = memory.as_mut_ptr().cast::<u8>().wrapping_add(1);
    let allocation = Allocation { base, bytes: 127, dtype: DType::U8, device: Device::HOST };
    // SAFETY: 127 bytes after the first lie inside the array, which is not used otherwise.
    let view = unsafe { TensorViewMut::from_allocation(allocation, Layout::contiguous(&[127])) }.unwrap();
    let piece = Arena::new(view).take::<f32>(31).unwrap();
    assert_eq!(piece.as_ptr() as usize, base as usize + 3);
    assert_eq!(piece.len(), 31);
}

#[test]
fn device_memory_is_not_handed_out_as_slices() {
    let device = Device { kind: DeviceKind::Hip, index: 1 };
    let allocation = Allocation { base: 0x1000 as *mut u8, bytes: 512, dtype: DType::U8, device };
    // SAFETY: the address is never read: the host refuses to.
    let view = unsafe { TensorViewMut::from_allocation(allocation, Layout::contiguous(&[512])) }.unwrap();
    assert_eq!(Arena::new(view).take::<f32>(1).unwrap_err(), ViewError::NotHost { device });
}

#[test]
fn a_workspace_is_zeroed_rounded_and_bounded() {
    for (asked, bytes) in [(0, 0), (1, 256), (256, 256), (257, 512)] {
        let mut workspace = Workspace::new(DeviceKind::Host, asked).unwrap();
        assert_eq!((workspace.bytes(), Workspace::rounded(asked)), (bytes, bytes));
        assert!(workspace.arena().take::<u8>(bytes).unwrap().iter().all(|&byte| byte == 0));
        let view = workspace.tensor(DType::F32, &[bytes / 4]).unwrap();
        assert_eq!(view.address() % ARENA_ALIGN, 0);
        assert!(matches!(workspace.tensor(DType::F32, &[bytes / 4 + 1]), Err(ViewError::OutOfBounds { .. })));
        assert!(workspace.tensor_mut(DType::F32, &[bytes / 4 + 1]).is_err());
    }
}

#[test]
fn a_written_tensor_is_read_back() {
    let mut workspace = Workspace::new(DeviceKind::Host, 64).unwrap();
    workspace.tensor_mut(DType::I32, &[2, 3]).unwrap().row_mut::<i32>(1).unwrap().fill(5);
    assert_eq!(workspace.tensor(DType::I32, &[6]).unwrap().as_slice::<i32>().unwrap(), [0, 0, 0, 5, 5, 5]);
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let bytes = isize::MAX as usize - 255;
    let error = Workspace::new(DeviceKind::Host, bytes).unwrap_err();
    assert_eq!(error.kind, ErrorKind::OutOfMemory { bytes });
    assert_eq!(Workspace::new(DeviceKind::Cuda, 1).unwrap_err().kind, ErrorKind::Contract);
}

/// Addresses of a device that is not there: nothing reads them.
#[derive(Debug)]
struct Addresses {
    address: u64,
    bytes: usize,
}

// SAFETY: nobody else has these addresses, and no memory is behind them that anything could read.
unsafe impl DeviceMemory for Addresses {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Gives `limit` bytes at most, at `address`, `short` less than asked for.
#[derive(Debug)]
pub struct Pretended {
    pub address: u64,
    pub limit: usize,
    pub short: usize,
}

const GPU: Device = Device { kind: DeviceKind::Cuda, index: 3 };

impl DeviceAllocator for Pretended {
    fn device(&self) -> Device {
        GPU
    }

    fn alloc_zeroed(&self, bytes: usize) -> Result<Box<dyn DeviceMemory>, Source> {
        if bytes > self.limit {
            return Err("no memory left".into());
        }
        Ok(Box::new(Addresses { address: self.address, bytes: bytes - self.short }))
    }
}

#[test]
fn a_workspace_in_device_memory_is_divided_without_being_read() {
    let allocator = Pretended { address: 0x7f00_0000_0000, limit: 4096, short: 0 };
    let mut workspace = Workspace::on(&allocator, 1000).unwrap();
    assert_eq!((workspace.bytes(), workspace.device()), (1024, GPU));
    let mut arena = workspace.arena();
    let floats = arena.take_tensor(DType::F32, &[2, 3]).unwrap();
    assert_eq!((floats.as_view().address(), floats.device()), (0x7f00_0000_0000, GPU));
    let rest = arena.take_tensor(DType::U8, &[700]).unwrap();
    assert_eq!(rest.as_view().address(), 0x7f00_0000_0100);
    assert_eq!(arena.remaining(), 0);
    assert!(matches!(arena.take_tensor(DType::U8, &[1]), Err(ViewError::OutOfBounds { .. })));
    assert!(matches!(workspace.arena().take::<f32>(1), Err(ViewError::NotHost { device: GPU })));
    let tensor = workspace.tensor(DType::Bf16, &[512]).unwrap();
    assert!(matches!(tensor.row_bytes(0), Err(ViewError::NotHost { device: GPU })));
    assert!(workspace.tensor_mut(DType::Bf16, &[513]).is_err());
}

#[test]
fn what_an_allocator_cannot_or_must_not_give_is_an_error() {
    let right = Pretended { address: 4096, limit: 4096, short: 0 };
    let error = Workspace::on(&right, 4097).unwrap_err();
    assert_eq!(error.kind, ErrorKind::OutOfMemory { bytes: 4352 });
    assert_eq!(error.source.unwrap().to_string(), "no memory left");
    let error = Workspace::on(&Pretended { address: 128, ..right }, 1).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Contract);
    let error = Workspace::on(&Pretended { address: 4096, limit: 4096, short: 1 }, 1).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Contract);
}
