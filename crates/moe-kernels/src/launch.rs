//! What is launched, and on how many threads.

use fused_moe_core::ScaleOrder;

/// The argument of a kernel, as the device reads it.
///
/// # Safety
/// The type is `repr(C)`, has no padding, and is what the kernel reads: for ours the struct of the same name in `kernels/`, for
/// an object of somebody else what its metadata has been checked for. So the bytes that [`KernelParams::as_bytes`] gives are
/// what the kernel takes them for.
pub unsafe trait KernelParams: Copy + 'static {
    /// The argument's bytes.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: the type has no padding, so every byte is initialised; they are borrowed as long as `self`.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

/// A call of a kernel, but for its stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch<P> {
    /// The kernel.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Its argument.
    pub params: P,
}

/// What a kernel writes numbers as, or reads them as. It sums in f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// 4 bytes.
    F32,
    /// 2 bytes, rounded to nearest, ties to even.
    Bf16,
}

impl Float {
    /// Bytes of a number.
    pub const fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::Bf16 => 2,
        }
    }

    /// As kernels are told.
    pub(crate) const fn is_bf16(self) -> u32 {
        match self {
            Float::F32 => 0,
            Float::Bf16 => 1,
        }
    }
}

/// Sizes that a kernel cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadLaunch {
    /// A size has to be a multiple of what a lane reads at once.
    #[error("{what} {size} is not a multiple of {of} ({kernel})")]
    NotMultiple {
        /// The kernel.
        kernel: &'static str,
        /// Which size.
        what: &'static str,
        /// The size.
        size: usize,
        /// What it should be a multiple of.
        of: usize,
    },
    /// Scales in an order that the kernel does not write.
    #[error("scales in the order {order:?} ({kernel} writes RowMajor and Transposed)")]
    ScaleOrder {
        /// The kernel.
        kernel: &'static str,
        /// The order.
        order: ScaleOrder,
    },
    /// A size is beyond what the kernel counts in.
    #[error("{what} {size} is more than {limit} ({kernel})")]
    TooLarge {
        /// The kernel.
        kernel: &'static str,
        /// Which size.
        what: &'static str,
        /// The size.
        size: usize,
        /// The largest that can be.
        limit: usize,
    },
}

impl BadLaunch {
    /// `size`, if it is a multiple of `of`.
    pub(crate) fn multiple(
        kernel: &'static str,
        what: &'static str,
        size: usize,
        of: usize,
    ) -> Result<usize, Self> {
        if size.is_multiple_of(of) { Ok(size) } else { Err(Self::NotMultiple { kernel, what, size, of }) }
    }

    /// `size` in 32 bits.
    pub(crate) fn narrow(kernel: &'static str, what: &'static str, size: usize) -> Result<u32, Self> {
        u32::try_from(size).map_err(|_| Self::TooLarge { kernel, what, size, limit: u32::MAX as usize })
    }
}
