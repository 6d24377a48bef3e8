//! The arguments of AITER's one-stage kernels: 28 slots of 16 bytes.

use std::mem::offset_of;

use super::error::ArgumentMismatch;
use crate::launch::KernelParams;
use crate::metadata::KernelMetadata;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// What AITER calls bytes that nobody reads.
const PADDING: &str = "pad";

/// A slot with an address in the device's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Address {
    address: u64,
    unread: u64,
}

/// A slot with a number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number {
    number: u32,
    unread: [u32; 3],
}

impl From<u64> for Address {
    fn from(address: u64) -> Self {
        Self { address, unread: 0 }
    }
}

impl From<u32> for Number {
    fn from(number: u32) -> Self {
        Self { number, unread: [0; 3] }
    }
}

macro_rules! params {
    ($($(#[$doc:meta])* $field:ident: $slot:ident = $name:literal, $size:literal;)*) => {
        /// The argument block. Fields are in the order of AITER's `KernelArgs` (`asm_fmoe.cu`); strides are bytes.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct FusedMoeParams {
            $($(#[$doc])* pub(super) $field: $slot,)*
        }

        /// Name in the metadata, offset and size in bytes of every argument.
        const ARGUMENTS: &[(&str, usize, usize)] =
            &[$(($name, offset_of!(FusedMoeParams, $field), $size)),*];
    };
}

params! {
    output: Address = "O", 8;
    rows_fp8: Address = "X", 8;
    gate_up: Address = "G", 8;
    // The metadata has names of an older argument block, in which this was the address of up.
    valid_ids: Address = "U", 8;
    down: Address = "D", 8;
    row_scales: Address = "XQ", 8;
    gate_up_scales: Address = "GQ", 8;
    down_scales: Address = "DQ", 8;
    smooth_scales: Address = "SMQ", 8;
    sorted_ids: Address = "STP", 8;
    sorted_weights: Address = "SW", 8;
    sorted_experts: Address = "SEP", 8;
    hidden: Number = "dim", 4;
    intermediate: Number = "hdim", 4;
    rows: Number = "batch", 4;
    experts: Number = "eprt", 4;
    row_stride: Number = "Xs", 4;
    gate_up_stride: Number = "GUs", 4;
    down_stride: Number = "Ds", 4;
    output_stride: Number = "Os", 4;
    gate_up_expert: Number = "eGUs", 4;
    down_expert: Number = "eDs", 4;
    gate_up_scales_expert: Number = "eGUQs", 4;
    down_scales_expert: Number = "eDQs", 4;
    smooth_scales_expert: Number = "eSMQs", 4;
    top_k: Number = "topk", 4;
    // Blocks that get work, a multiple of the tiles of an intermediate row.
    blocks: Number = "total_tgs", 4;
    tiles: Number = "ps_deno", 4;
}

const _: () = assert!(size_of::<FusedMoeParams>() == 448 && ARGUMENTS.len() == 28);

// SAFETY: `repr(C)` of slots of 16 bytes, 448 bytes in all, so there is no padding that is not a field; `check_arguments`
// holds the fields against the metadata of an object before it is loaded.
unsafe impl KernelParams for FusedMoeParams {}

/// Whether `kernel` takes a [`FusedMoeParams`], by what its object says: names, offsets and sizes of all arguments, the bytes of
/// all, and the threads of a block.
///
/// # Errors
/// The first difference.
pub fn check_arguments(kernel: &KernelMetadata) -> Result<(), ArgumentMismatch> {
    let name = || kernel.name.clone();
    let wanted = size_of::<FusedMoeParams>();
    if kernel.kernarg_bytes != wanted {
        return Err(ArgumentMismatch::Bytes { kernel: name(), found: kernel.kernarg_bytes, wanted });
    }
    let named: Vec<_> = kernel.arguments.iter().filter(|argument| argument.name != PADDING).collect();
    if named.len() != ARGUMENTS.len() {
        return Err(ArgumentMismatch::Count { kernel: name(), found: named.len(), wanted: ARGUMENTS.len() });
    }
    for (index, (found, &wanted)) in named.iter().zip(ARGUMENTS).enumerate() {
        if (found.name.as_str(), found.offset, found.size) != wanted {
            return Err(ArgumentMismatch::Argument {
                kernel: name(),
                index,
                found: (found.name.clone(), found.offset, found.size),
                wanted: (wanted.0.to_owned(), wanted.1, wanted.2),
            });
        }
    }
    if kernel.max_block < THREADS as usize {
        let wanted = THREADS as usize;
        return Err(ArgumentMismatch::Block { kernel: name(), found: kernel.max_block, wanted });
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use rmpv::Value;

    use super::*;
    use crate::metadata::CodeObject;
    use crate::metadata::tests::{object, one_kernel};

    /// Metadata of a kernel that takes what it should, with padding as AITER has it, but for what `change` does.
    pub(crate) fn metadata(
        kernel: &str,
        bytes: usize,
        change: impl Fn(&mut Vec<(&'static str, usize, usize)>),
    ) -> Value {
        let mut arguments = Vec::new();
        for &(name, offset, size) in ARGUMENTS {
            arguments.push((name, offset, size));
            arguments.extend((size..16).step_by(size).map(|past| (PADDING, offset + past, size)));
        }
        change(&mut arguments);
        one_kernel(kernel, bytes, &arguments)
    }

    fn check(bytes: usize, change: impl Fn(&mut Vec<(&'static str, usize, usize)>)) -> Result<(), String> {
        let read = CodeObject::parse(&object(0x54c, &metadata("k", bytes, change))).unwrap();
        check_arguments(&read.kernels[0]).map_err(|error| error.to_string())
    }

    #[test]
    fn slots_are_of_16_bytes() {
        for (index, &(name, offset, _)) in ARGUMENTS.iter().enumerate() {
            assert_eq!(offset, 16 * index, "{name}");
        }
    }

    #[test]
    fn only_the_right_arguments_pass() {
        assert_eq!(check(448, |_| ()), Ok(()));
        assert_eq!(check(440, |_| ()).unwrap_err(), "k takes 440 bytes of arguments, not 448");
        let fewer = check(448, |arguments| arguments.truncate(2)).unwrap_err();
        assert_eq!(fewer, "k takes 1 arguments, not 28");
        let renamed = check(448, |arguments| arguments[2].0 = "Y").unwrap_err();
        assert_eq!(renamed, "k: argument 1 is \"Y\" of 8 bytes at 16, not \"X\" of 8 bytes at 16");
        let moved = check(448, |arguments| arguments[2].1 = 8).unwrap_err();
        assert_eq!(moved, "k: argument 1 is \"X\" of 8 bytes at 8, not \"X\" of 8 bytes at 16");
        let shrunk = check(448, |arguments| arguments[2].2 = 4).unwrap_err();
        assert_eq!(shrunk, "k: argument 1 is \"X\" of 4 bytes at 16, not \"X\" of 8 bytes at 16");
    }
}
